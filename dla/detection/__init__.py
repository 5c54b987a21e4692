"""Detectors on our ResNets: Faster R-CNN and Mask R-CNN with a feature pyramid, torchvision's but for the backbone.

model = fasterrcnn_resnet50_dla_l_fpn(weights="runs/resnet50_dla_l-imagenet/best.ckpt")
losses = model(images, targets)     # in training; in eval mode `model(images)` gives boxes, labels and scores
"""

import re
from functools import partial
from pathlib import Path

from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import MultiScaleRoIAlign

import dla
from dla.checkpoints import load_model
from dla.resnet import Bottleneck

KINDS = {"fasterrcnn": FasterRCNN, "maskrcnn": MaskRCNN}
MODEL_ARGS = ("cell", "config", "reduction", "drop_path_rate")


class Backbone(BackboneWithFPN):
    """A ResNet without its classifier, under a feature pyramid.

    Args:
        net: the ResNet.
        out_channels: of the pyramid's maps, one for each stage and one of half the last one's size.
        trainable_layers: how many layers are trained, from the last stage up; the stem is a layer too. The others stay
            in eval mode.
        frozen_norm: whether every BatchNorm, also those of layer attention, keeps its statistics, scale and shift.
    """

    def __init__(self, net: dla.ResNet, out_channels: int, trainable_layers: int, frozen_norm: bool):
        layers = [("conv1", "bn1"), *((stage,) for stage in net.stage_names)]
        if not 0 <= trainable_layers <= len(layers):
            raise ValueError(f"`trainable_layers` must be 0 to {len(layers)}, got {trainable_layers}")
        channels = [width * Bottleneck.expansion for width in net.arguments["widths"]]
        super().__init__(net, {name: str(i) for i, name in enumerate(net.stage_names)}, channels, out_channels)
        self.strides = [(4 if net.arguments["stem"] == "imagenet" else 1) * 2**i for i in range(len(channels) + 1)]
        self.frozen = [name for layer in layers[: len(layers) - trainable_layers] for name in layer]
        self.frozen_norm = frozen_norm
        #: Arguments of :func:`create_detector` that give this backbone.
        self.arguments = {key: net.arguments[key] for key in ("cell", "config", "reduction")} | {
            "trainable_layers": trainable_layers, "frozen_norm": frozen_norm, "fpn_channels": out_channels
        }  # fmt: skip
        for module in self._frozen_modules():
            module.requires_grad_(False)
        self.train()  # a new module says that it trains without having been told

    def _frozen_modules(self) -> list[nn.Module]:
        norms = (m for m in self.body.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)))
        return [*(self.body[name] for name in self.frozen), *(norms if self.frozen_norm else ())]

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self


def list_detectors() -> list[str]:
    """The names that :func:`create_detector` knows, such as ``maskrcnn_resnet101_dla_b_fpn``."""
    return [f"{kind}_{model}_fpn" for kind in KINDS for model in dla.list_models()]


def create_detector(
    name: str,
    num_classes: int = 91,
    weights: str | Path | None = None,
    trainable_layers: int | None = None,
    frozen_norm: bool | None = None,
    fpn_channels: int = 256,
    **options,
) -> FasterRCNN:
    """Builds a detector by name, ``fasterrcnn_{model}_fpn`` or ``maskrcnn_{model}_fpn``, model of `dla.list_models()`.

    Anchors are 8 strides of their map wide: 32 to 512 pixels on the ResNets for ImageNet, 8 to 64 on those for CIFAR.

    Args:
        name: one of :func:`list_detectors`.
        num_classes: classes and the background, which is class 0.
        weights: of the classifier to start from, a checkpoint of ``dla train`` or a folder of ``save_pretrained``; its
            cell, config and reduction come along.
        trainable_layers: see :class:`Backbone`. Default: with weights all but the stem and the first stage, else all.
        frozen_norm: see :class:`Backbone`. Default: with weights true, for detection has few images in a batch.
        fpn_channels: of the feature pyramid.
        **options: cell, config, reduction and drop_path_rate as of `dla.create_model`, any other as of torchvision's
            ``FasterRCNN`` or ``MaskRCNN``, such as min_size.

    Returns:
        A detector that takes and gives what torchvision's take and give; images have three channels in [0, 1].

    Raises:
        FileNotFoundError: ``weights`` lead to no file.
        ValueError: an unknown name, weights of another model, or an argument out of what is allowed.
    """
    if name not in list_detectors():
        raise ValueError(
            f"`name` must be {' or '.join(KINDS)}, then _MODEL_fpn with a model of {', '.join(dla.list_models())}, "
            f"got {name!r}"
        )
    if num_classes < 2:
        raise ValueError(f"`num_classes` must be at least 2, the background is one, got {num_classes}")
    kind, model = re.fullmatch(r"([a-z]+)_(\w+)_fpn", name).groups()
    net = _classifier(model, weights, {key: options.pop(key) for key in MODEL_ARGS if key in options})
    if trainable_layers is None:
        trainable_layers = len(net.stage_names) + (1 if weights is None else -1)
    if frozen_norm is None:
        frozen_norm = weights is not None
    backbone = Backbone(net, fpn_channels, trainable_layers, frozen_norm)
    pool = partial(MultiScaleRoIAlign, [str(i) for i in range(len(net.stage_names))], sampling_ratio=2)
    defaults = {
        "rpn_anchor_generator": AnchorGenerator(
            tuple((8 * stride,) for stride in backbone.strides), ((0.5, 1.0, 2.0),) * len(backbone.strides)
        ),
        "box_roi_pool": pool(output_size=7),
        # RoI pooling takes the scale of a map from its size and the images': more padding would falsify small ones.
        "size_divisible": backbone.strides[-2],
    }
    if kind == "maskrcnn":
        defaults["mask_roi_pool"] = pool(output_size=14)
    return KINDS[kind](backbone, num_classes, **(defaults | options))


def _classifier(name: str, weights: str | Path | None, given: dict) -> dla.ResNet:
    if weights is None:
        return dla.create_model(name, **given)
    source = load_model(weights)
    adopted = {key: source.arguments[key] for key in ("cell", "reduction", "num_classes")}
    adopted["config"] = dla.Config(**source.arguments["config"])
    net = dla.create_model(name, **(adopted | given))
    other = {
        key: (value, source.arguments[key])
        for key, value in net.arguments.items()
        if key not in ("drop_path_rate", "drop_rate", "global_pool") and value != source.arguments[key]
    }
    if other:
        text = "; ".join(f"{key} {theirs} where {ours} is asked for" for key, (ours, theirs) in other.items())
        raise ValueError(f"`weights` {weights} are of another model: {text}")
    net.load_state_dict(source.state_dict())
    return net


fasterrcnn_resnet50_dla_l_fpn = partial(create_detector, "fasterrcnn_resnet50_dla_l_fpn")
fasterrcnn_resnet50_dla_b_fpn = partial(create_detector, "fasterrcnn_resnet50_dla_b_fpn")
fasterrcnn_resnet101_dla_l_fpn = partial(create_detector, "fasterrcnn_resnet101_dla_l_fpn")
fasterrcnn_resnet101_dla_b_fpn = partial(create_detector, "fasterrcnn_resnet101_dla_b_fpn")
maskrcnn_resnet50_dla_l_fpn = partial(create_detector, "maskrcnn_resnet50_dla_l_fpn")
maskrcnn_resnet50_dla_b_fpn = partial(create_detector, "maskrcnn_resnet50_dla_b_fpn")
maskrcnn_resnet101_dla_l_fpn = partial(create_detector, "maskrcnn_resnet101_dla_l_fpn")
maskrcnn_resnet101_dla_b_fpn = partial(create_detector, "maskrcnn_resnet101_dla_b_fpn")
