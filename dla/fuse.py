"""Layer attention on the fused ops, in models that exist already.

What can be fused is recognised by its structure, no code of others is imported:

- the stages of this package;
- the stages of the authors' DLA code: children ``layers``, ``attention`` and ``lstm``, for DLA-L also the filter
  ``excite`` or ``extict``;
- the residual blocks of the MRLA code: children ``mrla`` and ``bn_mrla``.

A layer of others stays the module that it was, under another class, see :mod:`dla.released`; a stage of this package
is told its backend.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dla.checkpoints import ATTENTION, CARRY_CONV, NORM
from dla.config import OFFICIAL, RELEASED, Config
from dla.probe import hooks_of, random_copies, relative_difference
from dla.released import (
    Fused,
    FusedBaseAttention,
    FusedBaseBlock,
    FusedBaseStage,
    FusedBlock,
    FusedDsu,
    FusedLightAttention,
    FusedLightBlock,
    FusedLightStage,
    Settings,
    become,
    child,
    eager_class,
    restore,
)
from dla.stage import Stage
from dla_kernels.backend import choose

CAN_BE_FUSED = (
    "the stages of this package, the stages of the DLA code (layers, attention and lstm) and the residual blocks of "
    "the MRLA code (mrla and bn_mrla)"
)

#: Largest relative difference of a fused layer from the eager one on random weights.
LIMIT = 1e-2


class Fusion(NamedTuple):
    """What became of one layer."""

    layer: str  # its name in the model
    was: str  # its class
    now: str  # its fused class; "" where it was left
    backend: str  # that its ops run on; "" where it was left
    note: str  # why it was left, or what else is to know


class FusionReport(list[Fusion]):
    """The layers of a model with layer attention; prints as a table."""

    def __str__(self) -> str:
        rows = [Fusion._fields, *self]
        widths = [max(len(row[i]) for row in rows) for i in range(len(Fusion._fields))]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def fuse(model: nn.Module, backend: str = "auto", inplace: bool = False, context: str = "first") -> nn.Module:
    """Puts layer attention on the fused ops, and changes nothing else; :func:`unfuse` undoes it.

    Outputs, gradients, running statistics and optimiser steps are those of the eager model. Drop path is drawn by the
    model's own modules, in MRLA the same numbers from the same seed; in DLA others, for its cell also draws a dropout
    that nothing reads. Before a layer is replaced it is compared with its fused form on random weights; one that
    computes something else is left, and :func:`fusion_report` says so.

    Args:
        model: a model with layers of the kinds that :mod:`dla.fuse` lists.
        backend: what their ops run on, "auto", "native", "triton" or "reference".
        inplace: whether ``model`` itself is changed. Else it is left, and what is returned shares its Parameters and
            buffers: two forms of one model. Move it to its device and dtype before.
        context: in the authors' DLA, whose context refreshes a sample's layers: the "first" sample's of the batch, as
            their code has it, or its "own"; see ``docs/paper-vs-code.md``.

    Returns:
        The fused model. One that was fused before is fused anew.

    Raises:
        ValueError: an unknown choice, or nothing in the model can be fused.
        RuntimeError: the backend cannot run on the model's device.
    """
    if context not in ("first", "own"):
        raise ValueError(f"`context` must be first or own, got {context!r}")
    choose(_device(model), backend)
    model = model if inplace else _twin(model)
    _undo(model)
    layers = list(_layers(model))
    reasons = {layer.names[0]: _why_not(layer, backend) for layer in layers}
    if all(reasons.values()):
        raise ValueError(
            f"`model` has nothing that can be fused, which are {CAN_BE_FUSED}"
            + "".join(f"; {name} was left: {reason}" for name, reason in reasons.items())
        )
    for layer in layers:
        if not reasons[layer.names[0]]:
            layer.fuse(backend, RELEASED if context == "first" else OFFICIAL)
    return model


def unfuse(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The eager model again, with the same Parameters; the stages of this package choose their backend themselves.

    Raises:
        ValueError: nothing in the model is fused.
    """
    model = model if inplace else _twin(model)
    if not _undo(model):
        raise ValueError("`model` has nothing that was fused")
    return model


def _undo(model: nn.Module) -> bool:
    """Makes a model eager; whether anything in it was fused."""
    fused = [m for m in model.modules() if isinstance(m, Fused)]
    for module in fused:
        restore(module)
    own = [m for m in model.modules() if isinstance(m, Stage) and "backend" in vars(m)]
    for module in own:
        del module.backend
    return bool(fused or own)


def fusion_report(model: nn.Module) -> FusionReport:
    """Layer by layer: what it was, what it is now, on which backend, or why it was left."""
    report = FusionReport()
    for layer in _layers(model):
        note = layer.note() if layer.fused else _why_not(layer, "auto") or "can be fused"
        for name, module in zip(layer.names, layer.modules, strict=True):
            now, backend = (type(module).__name__, choose(_device(module), layer.backend)) if layer.fused else ("", "")
            report.append(Fusion(name, eager_class(module).__name__, now, backend, note))
    return report


# ---------------------------------------------------------------------------------------------------------------------
# What is in a model


class _Layer:
    """What is fused as one: the ``modules`` of these ``names``."""

    def __init__(self, names: list[str], modules: list[nn.Module]):
        self.names = names
        self.modules = modules

    @property
    def fused(self) -> bool:
        return isinstance(self.modules[0], Fused)

    @property
    def backend(self) -> str:
        return self.modules[0].backend

    def note(self) -> str:
        return self.modules[0].note


class _OwnStage(_Layer):
    @property
    def fused(self) -> bool:
        return "backend" in vars(self.modules[0])

    def note(self) -> str:
        return ""

    def problem(self) -> str:
        return ""

    def fuse(self, backend: str, config: Config) -> None:
        self.modules[0].backend = backend


class _Released(_Layer):
    """A layer of the authors' code."""

    eager_fails = ""

    def attentions(self) -> list[nn.Module]:
        return self.modules

    def blocks(self) -> list[nn.Module]:
        return self.modules

    def problem(self) -> str:
        """Why its structure does not allow to fuse it; "" where it does."""
        for module in self.attentions():
            projections = child(child(module, ATTENTION) or nn.Module(), ATTENTION)
            if not all(hasattr(projections, name) for name in ("Wq", "Wk", "Wv", "heads")):
                return "an attention without Wq, Wk, Wv and heads"
            if not _is_batch_norm(child(module, NORM)):
                return "its attention is not normalised by a BatchNorm2d with scale and shift"
            drop_path = module._modules.get("drop_path")
            if not (isinstance(drop_path, nn.Identity | None) or hasattr(drop_path, "drop_prob")):
                return f"its drop_path is a {type(drop_path).__name__} without drop_prob"
        hooked = [n for m in self.modules for n, inner in m.named_modules() if n and any(hooks_of(inner))]
        return f"{hooked[0]} has a hook that the fused form would not call" if hooked else ""

    def settings(self, backend: str, config: Config) -> Settings:
        return Settings(backend, config, note=self.eager_fails and f"not compared: {self.eager_fails}")


class _DlaStage(_Released):
    """A stage of the authors' DLA."""

    def attentions(self) -> list[nn.Module]:
        return list(self.modules[0].attention)

    def blocks(self) -> list[nn.Module]:
        return list(self.modules[0].layers)

    def light(self) -> bool:
        return child(self.modules[0], CARRY_CONV) is not None

    def problem(self) -> str:
        stage = self.modules[0]
        if len(self.blocks()) != len(self.attentions()) or not self.blocks():
            return f"{len(self.blocks())} layers for {len(self.attentions())} attentions"
        cells = [getattr(stage.lstm, name, ()) for name in ("w_ih", "w_hh")]
        if [len(cell) for cell in cells] != [1, 1]:
            return "its lstm is not a cell of one layer"
        if not all([type(m) for m in getattr(c[0], "seq", ())] == [nn.Linear, nn.ReLU, nn.Linear] for c in cells):
            return "the branches of its lstm are not Linear, ReLU, Linear"
        return super().problem()

    def fuse(self, backend: str, config: Config) -> None:
        settings = self.settings(backend, config)
        stage, light = self.modules[0], self.light()
        for attention in self.attentions():
            become(attention, FusedLightAttention if light else FusedBaseAttention, settings)
        for block in self.blocks():
            if _is_residual_block(block):
                become(block, FusedBlock, settings)
        become(stage.lstm, FusedDsu, settings)
        become(stage, FusedLightStage if light else FusedBaseStage, settings)

    def run(self, x: Tensor) -> Tensor:
        return self.modules[0](x)


class _MrlaBlock(_Released):
    """A block of the authors' MRLA-L."""

    def problem(self) -> str:
        unknown = [n for n, m in zip(self.names, self.modules, strict=True) if not _is_residual_block(m)]
        return f"{unknown[0]} is not a residual block as the MRLA code has it" if unknown else super().problem()

    def fuse(self, backend: str, config: Config) -> None:
        become(self.modules[0], FusedLightBlock, self.settings(backend, config))

    def run(self, x: Tensor) -> Tensor:
        return self.modules[0](x)


class _MrlaRun(_MrlaBlock):
    """The blocks of a stage of the authors' MRLA-B, which hand one another what they attend to."""

    def problem(self) -> str:
        if not self.modules[0].mrla.init_cell:
            return "no block before it starts a stage"
        return super().problem()

    def fuse(self, backend: str, config: Config) -> None:
        settings = self.settings(backend, config)
        for followers, block in enumerate(reversed(self.modules)):
            become(block, FusedBaseBlock, settings._replace(followers=followers))

    def run(self, x: Tensor) -> Tensor:
        keys = values = None
        for block in self.modules:
            x, keys, values = block(x, keys, values)
        return x


def _layers(model: nn.Module) -> Iterator[_Layer]:
    """Everything with layer attention in a model, whether it is fused or not."""
    run = None
    for name, module in model.named_modules():
        name, children = name or "(the model)", module._modules
        if isinstance(module, Stage) and not isinstance(module, Fused):
            yield _OwnStage([name], [module])
        elif {"layers", "attention", "lstm"} <= children.keys():
            yield _DlaStage([name], [module])
        elif {"mrla", "bn_mrla"} <= children.keys():
            if not hasattr(module.mrla, "init_cell"):
                yield _MrlaBlock([name], [module])
            elif run is None or module.mrla.init_cell:
                if run is not None:
                    yield run
                run = _MrlaRun([name], [module])
            else:
                run.names.append(name)
                run.modules.append(module)
    if run is not None:
        yield run


def _why_not(layer: _Layer, backend: str) -> str:
    """Why a layer cannot be fused, by its structure or because it computes something else; "" where it can."""
    if layer.fused:
        return ""
    reason = layer.problem()
    return reason or ("" if isinstance(layer, _OwnStage) else _difference(layer, backend))


def _difference(layer: _Released, backend: str) -> str:
    """How a fused layer's output differs from the eager one's, on a copy with random weights; "" where it does not."""
    copies, maps = random_copies(layer.modules)
    copied = type(layer)(layer.names, copies)
    convolution = next((m for m in copied.blocks()[0].modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is None:
        return "its first block has no convolution"
    x = maps(2, convolution.in_channels, 4, 4)
    with torch.no_grad():
        try:
            expected = copied.run(x)
        except Exception as error:
            layer.eager_fails = f"the eager layer fails on {x.device} ({_in_one_line(error)})"
            return ""
        copied.fuse(backend, RELEASED)
        try:
            got = copied.run(x)
        except Exception as error:
            return f"the fused form does not take it ({_in_one_line(error)})"
    difference = relative_difference(got, expected)
    return "" if difference <= LIMIT else f"it computes something else, the fused form differs by {difference:.0e}"


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _is_residual_block(block: nn.Module) -> bool:
    """Whether it has the structure of the authors' blocks, which :class:`FusedBlock` computes."""
    children = block._modules
    norms = ("bn1", "bn2", "bn3") if "conv3" in children else ("bn1", "bn2")
    return (
        {"conv1", "conv2", "relu"} <= children.keys()
        and type(children["relu"]) is nn.ReLU
        and hasattr(block, "downsample")
        and all(_is_batch_norm(children.get(name)) for name in norms)
    )


def _is_batch_norm(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and module.affine


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares their Parameters and buffers."""
    shared = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)
