"""Layer attention in residual networks of others: torchvision's, timm's, one's own.

A stage is an ``nn.Sequential`` of residual blocks: blocks with a ``downsample`` or a ``shortcut`` (None where the input
itself is the shortcut) whose output is act(branch + shortcut), where act may be nothing. The Sequential becomes the
stage with the layer interaction in its place, under its name, its blocks under theirs. A block is run unchanged; what
else is needed of it, its shortcut or its branch, is taken by a forward hook.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dla.attention import BaseLayerAttention
from dla.cells import DIA, State
from dla.config import PAPER, Config
from dla.probe import random_copies, relative_difference
from dla.stage import INTERACTIONS, BaseStage, LightStage, LIIStage, Stage, create_stage
from dla_kernels import BatchNorm
from dla_kernels.common import gap
from dla_kernels.ops.layer_attention import Layer

#: The scale that the BatchNorm of a softmax attention (MRLA-B, DLA-B) starts with. A ReLU follows it, whose gradient at
#: 0 is 0: a scale of 0 would stay. This one's gradient is whole, and what it adds is lost in any sum but that with 0,
#: of which :class:`InsertedBaseAttention` takes care.
ALMOST_ZERO = 1e-30

#: What a block may call the module of its shortcut.
SHORTCUTS = ("downsample", "shortcut")


def insert(
    model: nn.Module,
    interaction: str,
    stages: Iterable[str] | None = None,
    cell: str = "dsu",
    config: Config = PAPER,
    reduction: int = 20,
    head_dim: int = 32,
    drop_path: float = 0.0,
    inplace: bool = False,
) -> nn.Module:
    """Puts a layer interaction into the residual stages of a network.

    The network computes what it did until it is trained: the last BatchNorm of each layer attention starts with scale
    0 (with a ReLU behind it 1e-30), and under layer-wise integration (LII) a branch is multiplied by h / h0 = 1, h0
    being the cell's hidden state while its gates are 0 (1/2 of DSU, 1/4 of DIA), as they are at first. A trained
    branch's BatchNorm could take the factor 1 / h0 into its scale, so the network is the paper's.

    The network's own state-dict keys stay, so its weights load with ``strict=False`` before or after; the new keys are
    those of ``attention``, ``cell`` and ``carry_conv`` below each stage. New parameters are float32, or float64.

    Args:
        model: such as ``torchvision.models.resnet50()`` or ``timm.create_model("ecaresnet50d")``.
        interaction: "lii", "mrla_b", "mrla_l", "dla_b" or "dla_l".
        stages: names of the stages, such as ("layer3", "layer4"); all of them where none are given.
        cell, config, reduction, head_dim, drop_path: see :func:`dla.create_stage`. LII takes the cells "dsu" and "dia".
        inplace: whether ``model`` itself is changed, else a copy is.

    Returns:
        The network with layer interaction.

    Raises:
        ValueError: a network without residual stages, an unknown stage, or an argument out of what is allowed.
    """
    if interaction not in INTERACTIONS:
        raise ValueError(f"`interaction` must be one of {', '.join(INTERACTIONS)}, got {interaction!r}")
    if interaction == "lii" and (cell not in ("dsu", "dia") or config.activation not in (None, "sigmoid")):
        raise ValueError(
            f"`cell` must be dsu or dia with the activation sigmoid for lii to start as the identity, got {cell!r}"
            f"{f' with {config.activation}' if config.activation else ''}"
        )
    model = model if inplace else copy.deepcopy(model)
    found = {name: _examined(module) for name, module in model.named_modules() if _is_sequence_of_blocks(module)}
    stages = _chosen(model, found, stages)
    made = []  # all of them before the first is put in its place
    for name in stages:
        blocks, channels = model.get_submodule(name), found[name].channels
        try:
            made.append(create_stage(blocks, channels, interaction, cell, config, reduction, head_dim, drop_path))
        except ValueError as error:
            raise ValueError(f"{error}, for the stage {name or 'that the model is'}") from error
    for name, stage in zip(stages, made, strict=True):
        _start_as_identity(stage)
        _put(stage, model.get_submodule(name), found[name].tails)
    return model


def remove(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The network without the layer interaction that :func:`insert` put into it, its own weights as they are now.

    Raises:
        ValueError: nothing was inserted into the model.
    """
    model = model if inplace else copy.deepcopy(model)
    stages = [m for m in model.modules() if isinstance(m, _InsertedStage)]
    if not stages:
        raise ValueError("`model` has no layer interaction that was inserted")
    for stage in stages:
        stage.take_out()
    return model


# ---------------------------------------------------------------------------------------------------------------------
# The stages


class _InsertedStage(Stage):
    """Base of the inserted stages, whose blocks are children under the names that they had."""

    block_names: tuple[str, ...]
    tails: tuple[str, ...]  # of each block, the child that gives its branch
    plain: type  # the class of the sequence that it was
    added: tuple[str, ...]  # the attributes that the sequence did not have

    @property
    def blocks(self) -> list[nn.Module]:
        return [self._modules[name] for name in self.block_names]

    def __getitem__(self, index: int) -> nn.Module:
        return self.blocks[index]

    def __iter__(self) -> Iterator[nn.Module]:
        """One step of a sequence: what walks through it, as timm's checkpointing does, must not miss the attention."""
        yield self

    def take_out(self) -> None:
        """Makes it the sequence that it was."""
        for block in self.blocks:
            for module in block.children():
                for key, hook in list(module._forward_hooks.items()):
                    if hook in (_gate_branch, _keep_output):
                        del module._forward_hooks[key]
        for name in self._modules.keys() - set(self.block_names):
            del self._modules[name]
        self.__class__ = self.plain
        for name in ("backend", "block_names", "tails", "plain", *self.added, "added"):
            vars(self).pop(name, None)


class _InsertedAttention(_InsertedStage):
    def output_of(self, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shortcut, downsample = x, _shortcut(block) if _takes_shortcuts(self) else None
        if downsample is not None:
            downsample.kept = None
        x = block(x)
        if downsample is not None:
            shortcut = downsample.kept
            del downsample.kept
        return x, gap(x), shortcut.to(x.dtype)


class InsertedLightStage(_InsertedAttention, LightStage):
    """MRLA-L or DLA-L in a network of others."""


class InsertedBaseStage(_InsertedAttention, BaseStage):
    """MRLA-B or DLA-B in a network of others."""


class InsertedBaseAttention(BaseLayerAttention):
    """In eval mode it leaves channels as they are, also where they are 0, while their scale is :data:`ALMOST_ZERO`."""

    def forward(self, x: Tensor, *args) -> tuple[Tensor, Layer]:
        out, layer = super().forward(x, *args)
        if not self.training and torch.is_grad_enabled():  # the values of x with the gradients of out
            out = torch.where(self._untrained()[:, None, None], x + (out - out.detach()), out)
        return out, layer

    def batch_norm(self) -> BatchNorm:
        norm = super().batch_norm()
        if self.training or torch.is_grad_enabled():
            return norm
        return norm._replace(weight=norm.weight.masked_fill(self._untrained(), 0))

    def _untrained(self) -> Tensor:
        return self.bn.weight.abs() <= ALMOST_ZERO


class InsertedLIIStage(_InsertedStage, LIIStage):
    """Layer-wise information integration in a network of others."""

    def step(self, block: nn.Module, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        tail = block._modules[self.tails[self.blocks.index(block)]]
        tail.gated = self, state
        x = block(x)
        _, state = tail.gated
        del tail.gated
        return x, state


def _keep_output(downsample: nn.Module, args: tuple, output: Tensor) -> None:
    """Hook of a shortcut: a stage that asks for it finds it in ``kept``."""
    if hasattr(downsample, "kept"):
        downsample.kept = output


def _gate_branch(tail: nn.Module, args: tuple, branch: Tensor) -> Tensor | None:
    """Hook of a residual branch: gates it by the cell of the stage in ``gated``, where the new state is left."""
    if not hasattr(tail, "gated"):
        return None
    stage, state = tail.gated
    branch, state = stage.gate(branch, state)
    tail.gated = stage, state
    return branch


def _takes_shortcuts(stage: Stage) -> bool:
    return isinstance(stage, LightStage) and stage.config.carry == "shortcut"


def _start_as_identity(stage: Stage) -> None:
    if isinstance(stage, LIIStage):
        branches = (
            [stage.cell.expand]
            if getattr(stage.cell, "form", "") == "joint"
            else [stage.cell.input[-1], stage.cell.hidden[-1]]
        )
        for linear in branches:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        stage.gain = 4.0 if isinstance(stage.cell, DIA) else 2.0
        return
    for attention in stage.attention:
        if isinstance(attention, BaseLayerAttention):
            attention.__class__ = InsertedBaseAttention
            nn.init.constant_(attention.bn.weight, ALMOST_ZERO)
        else:
            nn.init.zeros_(attention.bn.weight)


def _put(stage: Stage, sequence: nn.Sequential, tails: tuple[str, ...]) -> None:
    """Makes the sequence the stage, so that whoever holds it has the stage and its hooks and blocks stay."""
    names = tuple(sequence._modules)
    del stage.blocks
    parameter = next(sequence.parameters())
    stage.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32)).train(sequence.training)
    sequence._modules.update(stage._modules)
    added = {name: value for name, value in vars(stage).items() if name not in vars(sequence)}
    vars(sequence).update(added)
    sequence.block_names, sequence.tails, sequence.plain, sequence.added = names, tails, type(sequence), tuple(added)
    forms = {LightStage: InsertedLightStage, BaseStage: InsertedBaseStage, LIIStage: InsertedLIIStage}
    sequence.__class__ = forms[type(stage)]
    for block, tail in zip(sequence.blocks, tails, strict=True):
        if isinstance(stage, LIIStage):
            block._modules[tail].register_forward_hook(_gate_branch)
        elif _takes_shortcuts(stage) and _shortcut(block) is not None:
            _shortcut(block).register_forward_hook(_keep_output)


# ---------------------------------------------------------------------------------------------------------------------
# What is in a network


class _Found(NamedTuple):
    channels: int = 0
    tails: tuple[str, ...] = ()
    problem: str = ""  # why it takes no layer interaction


def _is_sequence_of_blocks(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) > 0 and all(_shortcut_name(block) for block in module)


def _shortcut_name(block: nn.Module) -> str | None:
    names = (name for name in SHORTCUTS if hasattr(block, name))
    return next((name for name in names if isinstance(getattr(block, name), nn.Module | None)), None)


def _shortcut(block: nn.Module) -> nn.Module | None:
    """The module of a block's shortcut; None where that is the input itself."""
    return getattr(block, _shortcut_name(block))


def _chosen(model: nn.Module, found: dict[str, _Found], stages: Iterable[str] | None) -> list[str]:
    usable = [name for name, sequence in found.items() if not sequence.problem]
    if not usable:
        problems = [f"{name or 'the model'}: {sequence.problem}" for name, sequence in found.items()]
        problems += [f"{n or 'the model'} has one already" for n, m in model.named_modules() if isinstance(m, Stage)]
        raise ValueError(
            "`model` has no stage that takes a layer interaction, an nn.Sequential of blocks that have a `downsample` "
            f"or `shortcut` and end with act(branch + shortcut){''.join(f'; {p}' for p in problems)}"
        )
    if stages is None:
        return usable
    stages = [stages] if isinstance(stages, str) else list(stages)
    for name in stages:
        if name not in usable:
            reason = found[name].problem if name in found else "no stage"
            raise ValueError(f"`stages` must be of {', '.join(usable)}, got {name!r} ({reason})")
    if not stages or len(set(stages)) < len(stages):
        raise ValueError(f"`stages` must be different ones of {', '.join(usable)}, got {stages}")
    return stages


@torch.no_grad()
def _examined(sequence: nn.Sequential) -> _Found:
    """The channels of a stage and the ends of its blocks' branches, by running a copy with random weights."""
    (sequence,), maps = random_copies([sequence])
    tried = []
    # A block may split its input: the first of its convolutions need not take all channels.
    for width in dict.fromkeys(m.in_channels for m in sequence[0].modules() if isinstance(m, nn.Conv2d)):
        tried.append(_followed(sequence, maps(2, width, 8, 8)))
        if not tried[-1].problem:
            return tried[-1]
    return tried[0] if tried else _Found(problem="it has no convolution")


def _followed(sequence: nn.Sequential, x: Tensor) -> _Found:
    tails, shapes = [], []
    for name, block in sequence.named_children():
        try:
            x, tail = _run(block, x)
        except Exception as error:
            return _Found(problem=f"its block {name} does not take a map ({type(error).__name__}: {error})")
        if tail is None:
            return _Found(problem=f"its block {name} does not end with act(branch + shortcut)")
        tails.append(tail)
        shapes.append(x.shape)
    if len(set(shapes)) > 1:
        return _Found(problem="its blocks give maps of different shapes")
    return _Found(shapes[0][1], tuple(tails))


def _run(block: nn.Module, x: Tensor) -> tuple[Tensor, str | None]:
    """A block's output act(branch + shortcut), and the name of the child that gives the branch; None where none does.

    The act is the child called last. Maps are cloned when they are seen: blocks work in place.
    """
    calls = []
    hooks = [
        child.register_forward_hook(lambda module, args, output, name=name: calls.append((name, output.clone())))
        for name, child in block.named_children()
    ]
    out = block(x.clone())
    for hook in hooks:
        hook.remove()
    act, names = block._modules[calls[-1][0]], [name for name, _ in calls]
    shortcut = dict(calls).get(_shortcut_name(block), x)
    if shortcut.shape != out.shape or any(True for _ in act.parameters()):
        return out, None
    for name, branch in calls[:-1]:
        once = names.count(name) == 1
        if once and branch.shape == out.shape and relative_difference(act(branch + shortcut), out) < 1e-5:
            return out, name
    return out, None
