"""ResNets of bottleneck blocks, for CIFAR and ImageNet, whose stages take a layer interaction."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint

from dla.attention import DropPath
from dla.config import PAPER, Config
from dla.conv_norm import conv_norm
from dla.hub import Shared
from dla.stage import INTERACTIONS, create_stage
from dla_kernels.common import gap

#: Of the images that the models take, by channel.
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

CIFAR_DEPTHS = (20, 29, 47, 56, 110, 164)
IMAGENET_STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions, each with BatchNorm; four times as many channels out."""

    expansion = 4
    owns_output = True

    def __init__(self, in_channels: int, width: int, stride: int = 1, drop_path: float = 0.0):
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU(inplace=True)
        self.drop_path = DropPath(drop_path)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The residual branch and the shortcut, both [B, C, H, W]; the shortcut is ``x`` itself where it can be."""
        branch = self.act(self.bn1(self.conv1(x)))
        branch = self.act(self.bn2(self.conv2(branch)))
        return self.bn3(self.conv3(branch)), x if self.downsample is None else self.downsample(x)

    def output(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output without drop path [B, C, H, W], its GAP [B, C], and the shortcut: what layer attention takes."""
        branch, _ = conv_norm(self.conv1, self.bn1, x, relu="branch")
        branch, _ = conv_norm(self.conv2, self.bn2, branch, relu="branch")
        shortcut = x if self.downsample is None else conv_norm(*self.downsample, x)[0]
        return *conv_norm(self.conv3, self.bn3, branch, shortcut, relu="sum"), shortcut

    def forward(self, x: Tensor) -> Tensor:
        branch, shortcut = self.branches(x)
        return self.act(self.drop_path(branch) + shortcut)


class ResNet(
    nn.Module,
    Shared,
    library_name="dla-kernels",
    pipeline_tag="image-classification",
    paper_url="https://arxiv.org/abs/2406.13392",
):
    """A residual network whose stages take a layer interaction.

    Drop path falls on the attention output where there is attention, else on the residual branch. ``save_pretrained``,
    ``from_pretrained`` and ``push_to_hub`` are those of :class:`huggingface_hub.PyTorchModelHubMixin`.

    Args:
        stem: "cifar", a 3x3 convolution; "imagenet", a 7x7 one of stride 2 and a max pool.
        depths: blocks of each stage.
        widths: inner channels of each stage's blocks.
        interaction, cell, config, reduction: see :func:`dla.stage.create_stage`.
        num_classes: logits; 0 for pooled features instead.
        in_chans: channels of the images.
        drop_path_rate: probability of drop path, the same for every block, as the paper has it.
        zero_init_last: whether the last BatchNorm of every block starts with scale 0, the block then as identity.
        drop_rate: probability of dropout before the classifier.
        global_pool: "avg", or "" for the last stage's map, which goes with ``num_classes=0``.

    The interface is timm's; ``feature_info`` is what its ``features_only`` reads.
    """

    def __init__(
        self,
        stem: str,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        interaction: str | None = None,
        cell: str = "dsu",
        config: Config = PAPER,
        reduction: int = 4,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__()
        if num_classes < 0 or in_chans < 1:
            raise ValueError(f"`num_classes` must be at least 0, `in_chans` 1, got {num_classes} and {in_chans}")
        for name, rate in (("drop_path_rate", drop_path_rate), ("drop_rate", drop_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {rate}")
        self.arguments = {
            "stem": stem, "depths": list(depths), "widths": list(widths), "interaction": interaction, "cell": cell,
            "config": asdict(config), "reduction": reduction, "num_classes": num_classes, "in_chans": in_chans,
            "drop_path_rate": drop_path_rate, "drop_rate": drop_rate, "global_pool": global_pool,
        }  # fmt: skip
        channels = widths[0]
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.in_chans = in_chans
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_chans, channels, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        self.feature_info = [{"num_chs": channels, "reduction": 2 if stem == "imagenet" else 1, "module": "act"}]
        reduction_ratio = 4 if stem == "imagenet" else 1
        attends = interaction not in (None, "lii")
        self.stage_names = [f"layer{i}" for i in range(1, len(depths) + 1)]
        for name, depth, width in zip(self.stage_names, depths, widths, strict=True):
            blocks = []
            for _ in range(depth):
                stride = 2 if name != "layer1" and not blocks else 1
                reduction_ratio *= stride
                blocks.append(Bottleneck(channels, width, stride, 0.0 if attends else drop_path_rate))
                channels = width * Bottleneck.expansion
            stage = create_stage(blocks, channels, interaction, cell, config, reduction, drop_path=drop_path_rate)
            self.add_module(name, stage)
            self.feature_info.append({"num_chs": channels, "reduction": reduction_ratio, "module": name})
        self.num_features = self.head_hidden_size = channels
        self.reset_classifier(num_classes, global_pool)
        self._init_weights(zero_init_last)

    def _init_weights(self, zero_init_last: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_last and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier, of the model's mode, device and dtype.

        Args:
            num_classes: logits, or 0 for none.
            global_pool: see the class. Default: "avg" before a classifier, else as it is.

        Raises:
            ValueError: an unknown pooling, or none before a classifier.
        """
        if global_pool is None:
            global_pool = "avg" if num_classes else self.global_pool
        if global_pool not in ("avg", "") or (num_classes and not global_pool):
            raise ValueError(
                f'`global_pool` must be "avg", or "" with `num_classes` 0, got {global_pool!r} with {num_classes}'
            )
        self.num_classes, self.global_pool = num_classes, global_pool
        self.arguments |= {"num_classes": num_classes, "global_pool": global_pool}
        like = {"device": self.conv1.weight.device, "dtype": self.conv1.weight.dtype}
        self.fc = nn.Linear(self.num_features, num_classes, **like) if num_classes else nn.Identity()
        self.fc.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps only the maps between stages and computes the others again.

        BatchNorm's running statistics may then take a batch twice, as under any checkpointing.
        """
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """The parameters that weight decay leaves out beside biases and BatchNorms: lambda."""
        return {name for name, _ in self.named_parameters() if name.endswith(".lambda_")}

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of the parameters' groups by depth, for timm's layer-wise learning rates: one for each stage."""
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)"}

    def _maps(self, x: Tensor) -> Iterator[Tensor]:
        """The maps at the levels of ``feature_info``: the stem's and each stage's."""
        check_images(x, self.in_chans)
        x = self.act(self.bn1(self.conv1(x)))
        yield x
        for i, name in enumerate(self.stage_names):
            x, stage = x if i else self.maxpool(x), getattr(self, name)
            x = checkpoint(stage, x, use_reentrant=False) if self.grad_checkpointing and self.training else stage(x)
            yield x

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> the last stage's map [B, num_features, H', W']."""
        return self.forward_intermediates(x, [-1])[0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps at some levels of ``feature_info``, as timm's models give them.

        Args:
            x: [B, in_chans, H, W].
            indices: the levels, from the end where negative; a number takes so many last ones, None takes all.
            norm: for timm's interface; there is no norm at the end.
            stop_early: whether nothing is computed behind the last of them.
            output_fmt: "NCHW".
            intermediates_only: whether only they are returned, else also the last map that was computed, before them.

        Raises:
            ValueError: no such level or format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"`output_fmt` must be NCHW, got {output_fmt!r}")
        levels, maps, last = self._levels(indices), [], x
        for level, last in enumerate(self._maps(x)):
            if level in levels:
                maps.append(last)
            if stop_early and level == max(levels):
                break
        return maps if intermediates_only else (last, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages behind the levels that :meth:`forward_intermediates` takes, and then the classifier too.

        Args:
            indices, prune_norm: as there.
            prune_head: whether the classifier is dropped in any case.

        Returns:
            The levels, counted from the front.

        Raises:
            ValueError: no such level.
        """
        levels = self._levels(indices)
        kept, dropped = self.stage_names[: max(levels)], self.stage_names[max(levels) :]
        for name in dropped:
            delattr(self, name)
        self.stage_names = kept
        self.arguments |= {key: self.arguments[key][: len(kept)] for key in ("depths", "widths")}
        self.num_features = self.head_hidden_size = self.feature_info[len(kept)]["num_chs"]
        if prune_head or dropped:
            self.reset_classifier(0, "")
        return levels

    def _levels(self, indices: int | Sequence[int] | None) -> list[int]:
        count = 1 + len(self.stage_names)
        given = range(count) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
        levels = [i + count if i < 0 else i for i in given]
        if not levels or not all(0 <= i < count for i in levels):
            raise ValueError(f"`indices` must be of the {count} levels, or how many of them, got {indices!r}")
        return levels

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last stage's map -> logits [B, num_classes], or its GAP [B, num_features] with ``pre_logits``."""
        if not self.global_pool:
            return x
        x = dropout(gap(x).to(x.dtype), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def check_images(x: Tensor, in_chans: int) -> None:
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"`x` must have shape (B, in_chans={in_chans}, H, W), got {tuple(x.shape)}")


def resnet_cifar(
    depth: int,
    interaction: str | None = None,
    cell: str = "dsu",
    config: Config = PAPER,
    num_classes: int = 10,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    reduction: int = 4,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> ResNet:
    """A ResNet for small images such as CIFAR's: three stages of n bottleneck blocks, depth = 9n + 2.

    Args:
        depth: 9n + 2, such as 20, 29, 47, 56, 110 or 164.
        interaction: None, "lii", "mrla_b", "mrla_l", "dla_b" or "dla_l".
        cell: "dsu", "dia", "lstm" or "rnn".
        config: the reading, :data:`dla.PAPER`, :data:`dla.OFFICIAL`, :data:`dla.RELEASED` or one's own.
        num_classes, in_chans, drop_path_rate, drop_rate, global_pool: see :class:`ResNet`.
        reduction: r of the cell.

    Raises:
        ValueError: an argument out of what is allowed.
    """
    n, rest = divmod(depth - 2, 9)
    if rest or n < 1:
        known = ", ".join(map(str, CIFAR_DEPTHS))
        raise ValueError(f"`depth` must be 9n + 2 with n >= 1, such as {known}, got {depth}")
    return ResNet(
        "cifar", (n, n, n), (16, 32, 64), interaction, cell, config, reduction,
        num_classes, in_chans, drop_path_rate, drop_rate=drop_rate, global_pool=global_pool,
    )  # fmt: skip


def resnet(
    depth: int,
    interaction: str | None = None,
    cell: str = "dsu",
    config: Config = PAPER,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    reduction: int = 20,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> ResNet:
    """A ResNet for ImageNet, of depth 50, 101 or 152; the arguments are those of :func:`resnet_cifar`.

    The last BatchNorm of every block starts with scale 0. The paper's reduction is 20, the authors' code has 16.

    Raises:
        ValueError: an argument out of what is allowed.
    """
    if depth not in IMAGENET_STAGES:
        raise ValueError(f"`depth` must be one of {', '.join(map(str, IMAGENET_STAGES))}, got {depth}")
    return ResNet(
        "imagenet", IMAGENET_STAGES[depth], (64, 128, 256, 512), interaction, cell, config, reduction,
        num_classes, in_chans, drop_path_rate, zero_init_last=True, drop_rate=drop_rate, global_pool=global_pool,
    )  # fmt: skip


def list_models() -> list[str]:
    """The names that :func:`create_model` knows, such as ``resnet20_dla_l`` (CIFAR) and ``resnet50_mrla_b``."""
    return [
        f"resnet{depth}{suffix}"
        for depth in (*CIFAR_DEPTHS, *IMAGENET_STAGES)
        for suffix in ("", *(f"_{i}" for i in INTERACTIONS))
    ]


def create_model(name: str, **kwargs) -> ResNet:
    """Builds a model by name, ``resnet{depth}`` or ``resnet{depth}_{interaction}``.

    Args:
        name: one of :func:`list_models`.
        **kwargs: of :func:`resnet_cifar` or :func:`resnet`, but for depth and interaction.

    Raises:
        ValueError: an unknown name, or an argument out of what is allowed.
    """
    if name not in list_models():
        raise ValueError(f"`name` must be one of {', '.join(list_models())}, got {name!r}")
    depth, interaction = re.fullmatch(r"resnet(\d+)(?:_(\w+))?", name).groups()
    factory = resnet if int(depth) in IMAGENET_STAGES else resnet_cifar
    return factory(int(depth), interaction, **kwargs)
