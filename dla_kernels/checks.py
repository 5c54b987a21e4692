"""Argument checks of the public ops: one sentence that names the argument, what was given and what is allowed."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dla_kernels.batch_norm import BatchNorm
from dla_kernels.common import ACTIVATIONS, accumulate_dtype
from dla_kernels.dsu import DsuWeights

#: What may gate a prior layer: the context of its step, or the hidden state.
GATES = ("context", "hidden")
#: What a tensor's sizes must be: a number stands for itself, a known name for the size that it was bound to, a new name
#: for whatever comes.
Layout = tuple[str | int, ...]
MAP: Layout = ("B", "C", "H", "W")
MAP_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: Calls that a check remembers.
REMEMBERED = 4096


def remembered(check: Callable[..., None]) -> Callable[..., None]:
    """A check that lets a call pass at once that is like one before: on small maps it takes as long as the op.

    It may take notice of no more than the shapes, dtypes and devices of tensors, and of values that can be compared.
    """
    passed: set[tuple] = set()

    @functools.wraps(check)
    def run(*arguments) -> None:
        if torch.compiler.is_compiling():  # a compiler looks once, and would keep watch over what is remembered
            return check(*arguments)
        call = _likeness(arguments)
        try:
            if call in passed:
                return None
        except TypeError:  # a size may be a symbol
            return check(*arguments)
        check(*arguments)
        if len(passed) >= REMEMBERED:
            passed.clear()
        passed.add(call)

    return run


def _likeness(arguments: Sequence) -> tuple:
    return tuple(
        [
            (a.shape, a.dtype, a.device)
            if isinstance(a, Tensor)
            else (a.__class__, *_likeness(a))
            if isinstance(a, (tuple, list))
            else a
            for a in arguments
        ]
    )


class Checker:
    """Checks the arguments of one call of an op.

    Dimension names such as ``B`` or ``C`` are bound by the first tensor that uses them; every later tensor must
    agree. The first tensor also sets the device, and as it is an activation, the precision of the recurrent state.

    Args:
        op: the op's name, which starts every message.
    """

    def __init__(self, op: str):
        self.op = op
        self.dims: dict[str, int] = {}
        self.first: tuple[str, Tensor] | None = None

    def fail(self, message: str) -> None:
        raise ValueError(f"{self.op}: {message}")

    def map(self, name: str, x: Tensor, layout: Layout = MAP) -> None:
        """An activation map; all maps of a call share one dtype."""
        self._shape(name, x, layout)
        if x.dtype not in MAP_DTYPES:
            self.fail(f"`{name}` must be one of {', '.join(map(str, MAP_DTYPES))}, got {x.dtype}")
        first_name, first = self.first
        if x.dtype != first.dtype:
            self.fail(f"`{name}` must have the dtype of `{first_name}`, {first.dtype}, got {x.dtype}")

    def state(self, name: str, x: Tensor, layout: Layout) -> None:
        """Recurrent state: float32, or float64 beside float64 maps."""
        self._shape(name, x, layout)
        expected = accumulate_dtype(self.first[1])
        if x.dtype != expected:
            self.fail(f"`{name}` must be {expected} (recurrent state is never of low precision), got {x.dtype}")

    def weight(self, name: str, x: Tensor, layout: Layout) -> None:
        """A parameter, of any floating-point dtype: autocast keeps float32 weights beside bfloat16 maps."""
        self._shape(name, x, layout)
        if not x.is_floating_point():
            self.fail(f"`{name}` must be floating point, got {x.dtype}")

    def dsu_weights(self, weights: Sequence[Tensor] | DsuWeights) -> None:
        """The joint form's three tensors or the split form's eight, or all of them packed."""
        if isinstance(weights, DsuWeights):
            channels = self.dims["C"]
            if weights.channels != channels:
                self.fail(f"`weights` must be for {channels} channels, got those for {weights.channels}")
            self.weight("weights.packed", weights.packed, (sum(torch.Size(s).numel() for s in weights.shapes()),))
            return
        if len(weights) not in (3, 8):
            self.fail(f"`weights` must hold 3 tensors (joint form) or 8 (split form), got {len(weights)}")
        joint = len(weights) == 3
        if "C" not in self.dims:  # no activation beside them: the last bias tells
            self.dims["C"] = weights[-1].numel() // 3
        names = ("w1", "w2", "b2") if joint else [f"{n}_{branch}" for branch in "yh" for n in ("w1", "b1", "w2", "b2")]
        c = self.dims["C"]
        layouts = (("R", 2 * c), (3 * c, "R"), (3 * c,)) if joint else (("R", c), ("R",), (3 * c, "R"), (3 * c,)) * 2
        for name, layout, tensor in zip(names, layouts, weights, strict=True):
            self.weight(f"weights.{name}", tensor, layout)

    def batch_norm(self, norm: BatchNorm, values: int) -> None:
        """A BatchNorm over C channels; ``values`` is what a channel has of the map it normalises."""
        if not isinstance(norm, BatchNorm):
            self.fail(f"`norm` must be a dla_kernels.BatchNorm, got {type(norm).__name__}")
        if not norm.training and (norm.running_mean is None or norm.running_var is None):
            self.fail("`norm` must have running statistics where it is not training")
        if norm.training and values == 1:
            self.fail("BatchNorm in training needs more than one value per channel, got a batch of one pixel")
        self.weight("norm.weight", norm.weight, ("C",))
        self.weight("norm.bias", norm.bias, ("C",))
        if norm.running_mean is not None:
            self.weight("norm.running_mean", norm.running_mean, ("C",))
        if norm.running_var is not None:
            self.weight("norm.running_var", norm.running_var, ("C",))
        if norm.training and norm.num_batches_tracked is not None:
            self._shape("norm.num_batches_tracked", norm.num_batches_tracked, ())
            if norm.num_batches_tracked.dtype != torch.int64:
                self.fail(f"`norm.num_batches_tracked` must be torch.int64, got {norm.num_batches_tracked.dtype}")

    def odd(self, name: str, dim: str) -> None:
        if self.dims[dim] % 2 == 0:
            self.fail(f"`{name}` must have an odd length, got {self.dims[dim]}")

    def heads(self, head_dim: int) -> None:
        channels = self.dims["C"]
        if head_dim < 1 or channels % head_dim:
            self.fail(f"`head_dim` must divide the {channels} channels, got {head_dim}")

    def one_of(self, name: str, value: str, allowed: Sequence[str]) -> None:
        if value not in allowed:
            self.fail(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}")

    def activation(self, value: str) -> None:
        self.one_of("activation", value, tuple(ACTIVATIONS))

    def _shape(self, name: str, x: Tensor, layout: Layout) -> None:
        if not isinstance(x, Tensor):
            self.fail(f"`{name}` must be a tensor, got {type(x).__name__}")
        shape, new = x.shape, {}
        if len(shape) != len(layout):
            self._fail_shape(name, layout, shape)
        for n, size in zip(layout, shape, strict=True):
            wanted = self.dims.get(n) if isinstance(n, str) else n
            if wanted is None:
                new[n] = size
            elif size != wanted:
                self._fail_shape(name, layout, shape)
        self.dims.update(new)
        if self.first is None:
            self.first = (name, x)
        first_name, first = self.first
        if x.device != first.device:
            self.fail(f"`{name}` must be on the device of `{first_name}`, {first.device}, got {x.device}")

    def _fail_shape(self, name: str, layout: Layout, shape: torch.Size) -> None:
        wanted = ", ".join(f"{n}={self.dims[n]}" if n in self.dims else str(n) for n in layout)
        self.fail(f"`{name}` must have shape ({wanted}), got {tuple(shape)}")
