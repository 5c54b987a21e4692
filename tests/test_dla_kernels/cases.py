"""Random calls of the ops, for the tests of the fused backends: what to call, and with which arguments."""

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from helpers import directions_of, dsu_weights
from torch import Tensor

import dla_kernels
from dla_kernels import BatchNorm
from dla_kernels.common import accumulate_dtype

BACKENDS = [name for name, runs in dla_kernels.backends().items() if runs is True]
#: The same where a test calls an op often or on many maps, which takes Triton's interpreter minutes.
MANY_CALLS = [pytest.param(name, marks=pytest.mark.slow if name == "triton" else ()) for name in BACKENDS]
#: How a map lies in memory. The first two are walked as they are, like their slices; the rest goes through a copy.
LAYOUTS = ("planes", "rows", "planes sliced", "rows sliced", "transposed", "every second column", "expanded")


def in_layout(x: Tensor, layout: str) -> Tensor:
    """``x`` [B, C, H, W] with the same values, elsewhere in memory."""
    b, c, h, w = x.shape
    match layout:
        case "planes":
            return x.contiguous()
        case "rows":
            return x.contiguous(memory_format=torch.channels_last)
        case "planes sliced":
            return x.new_full((b + 1, c + 3, h, w), torch.nan)[1:, 2:-1].copy_(x)
        case "rows sliced":
            base = x.new_full((b + 1, c + 3, h, w), torch.nan).contiguous(memory_format=torch.channels_last)
            return base[1:, 2:-1].copy_(x)
        case "transposed":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        case "every second column":
            return x.new_full((b, c, h, 2 * w), torch.nan)[..., ::2].copy_(x)
        case "expanded":
            return x[:, :, :1, :1].expand(b, c, h, w)
    raise ValueError(layout)


@dataclass
class Call:
    """A call of an op: ``function(*tensors, backend=...)`` -> a tuple of tensors.

    Tensors named ``weights.0``, ``norm.weight`` and the like are given to the op as one sequence or BatchNorm. A call
    of ``layer_attention`` is a stage of T layers, each attending to those before it.
    """

    op: str
    tensors: dict[str, Tensor]
    options: dict = field(default_factory=dict)
    training: bool = True

    def __call__(self, backend: str | None = None) -> tuple[Tensor, ...]:
        return self.function(*self.tensors.values(), backend=backend)

    def function(self, *tensors: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
        named = dict(zip(self.tensors, tensors, strict=True))
        for group in ("weights", "maps", "query_weights", "key_weights", "value_weights", "norm"):
            members = {n.removeprefix(f"{group}."): named.pop(n) for n in list(named) if n.startswith(f"{group}.")}
            if members:
                named[group] = BatchNorm(**members, training=self.training) if group == "norm" else [*members.values()]
        if self.op == "layer_attention":
            return stage(**named, **self.options, backend=backend)
        outputs = getattr(dla_kernels, self.op)(**named, **self.options, backend=backend)
        return tuple(o for o in outputs if o is not None) if isinstance(outputs, tuple) else (outputs,)

    def to_double(self) -> "Call":
        """The same call in float64, for the expected result."""
        doubled = {name: t.detach().double() for name, t in self.tensors.items()}
        return Call(self.op, doubled, self.options, self.training).require_grad()

    def require_grad(self) -> "Call":
        for name, tensor in self.tensors.items():
            tensor.requires_grad_(not name.startswith("norm.running"))
        return self

    @property
    def differentiable(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.tensors.items() if t.requires_grad}

    def directions(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        return directions_of(outputs)

    def run(self, backend: str, directions: list[Tensor] | None = None) -> dict[str, Tensor]:
        """All outputs and all gradients by name."""
        outputs = self(backend)
        directions = self.directions(outputs) if directions is None else directions
        grads = torch.autograd.grad(outputs, list(self.differentiable.values()), directions)
        named = {f"output {i}": o for i, o in enumerate(outputs)}
        return named | {f"gradient of {name}": g for name, g in zip(self.differentiable, grads, strict=True)}


def stage(
    maps, features, gates, query_weights, key_weights, value_weights, norm, head_dim, backend, keep=None, keys=False,
    inplace=False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The outputs of a stage's T layers, given a map, its filters, and a row of features and gates [B, T, C] for each;
    and what the first one shows of itself, the value map, its mean and the key.

    With ``keys`` a later layer is given the keys that those before returned, times their gates.
    """
    layers, outputs = [], []
    for t, (x, query_weight, value_weight) in enumerate(zip(maps, query_weights, value_weights, strict=True)):
        now, followers = slice(0, t + 1), len(maps) - t - 1
        rows, filters = features[:, now], torch.cat(key_weights[now])
        if keys:
            refreshed = [layer.key * gates[:, m] for m, layer in enumerate(layers)]
            rows, filters = torch.stack([*refreshed, features[:, t]], dim=1), key_weights[t]
        out, layer = dla_kernels.layer_attention(
            x, rows, gates[:, now], query_weight, filters, value_weight, layers, norm, keep, head_dim, followers,
            backend, inplace,
        )  # fmt: skip
        layers.append(layer)
        outputs.append(out)
    return *outputs, *layers[0][:3]


def _maps(shape, dtype, layout):
    return lambda: in_layout(torch.randn(shape, dtype=torch.float64).to(dtype), layout)


def _vectors(dtype):
    state = accumulate_dtype(torch.empty(0, dtype=dtype))
    return state, lambda *shape: torch.randn(shape, dtype=torch.float64).to(state)


def _norm(vector, C, statistics):
    tensors = {"norm.weight": vector(C), "norm.bias": vector(C)}
    if statistics == "running":
        tensors |= {"norm.running_mean": vector(C), "norm.running_var": vector(C).square() + 0.1}
    return tensors


def _keep(B, state, keep):
    return {"keep": torch.bernoulli(torch.full((B,), 0.5)).to(state) / 0.5} if keep else {}


def norm_residual(
    B, C, H, W, dtype, layout="planes", other=None, statistics="own", keep=False, relu=None, shortcut=True
) -> Call:
    state, vector = _vectors(dtype)
    tensors = {"x": _maps((B, C, H, W), dtype, layout)()} if shortcut else {}
    tensors["o"] = _maps((B, C, H, W), dtype, other or layout)()
    tensors |= _norm(vector, C, statistics) | _keep(B, state, keep)
    options = {"relu": relu} | ({} if shortcut else {"x": None})
    return Call("norm_residual", tensors, options, statistics == "own").require_grad()


def light_update(
    B, C, H, W, dtype, layout="planes", other=None, carry="gate", head_dim=None, statistics="own", keep=False, K=3
) -> Call:
    state, vector = _vectors(dtype)
    tensors = {"x": _maps((B, C, H, W), dtype, layout)(), "y": vector(B, C)}
    tensors |= {"query_weight": vector(1, 1, K), "key_weight": vector(1, 1, K), "value_weight": vector(C, 1, 3, 3)}
    tensors |= _norm(vector, C, statistics) | _keep(B, state, keep)
    if carry != "none":
        tensors |= {"carried": _maps((B, C, H, W), dtype, other or layout)(), "carry_scale": vector(C)}
    if "gate" in carry:
        tensors["gate"] = vector(B, C)
    if "filter" in carry:
        tensors["carry_weight"] = vector(C, 1, 3, 3)
    return Call("light_update", tensors, {"head_dim": head_dim or C}, statistics == "own").require_grad()


def layer_attention(
    B, C, H, W, dtype, layout="planes", other=None, T=3, head_dim=None, statistics="own", keep=False, K=3, keys=False
) -> Call:
    state, vector = _vectors(dtype)
    first, rest = _maps((B, C, H, W), dtype, layout), _maps((B, C, H, W), dtype, other or layout)
    tensors = {"features": vector(B, T, C), "gates": vector(B, T, C)}
    tensors |= {f"{name}_weights.{m}": vector(1, 1, K) for name in ("query", "key") for m in range(T)}
    tensors |= {f"maps.{m}": rest() if m else first() for m in range(T)}
    tensors |= {f"value_weights.{m}": vector(C, 1, 3, 3) for m in range(T)}
    tensors |= _norm(vector, C, statistics) | _keep(B, state, keep)
    if dtype.itemsize < 4:
        # Far from the ReLU's kink: near it, what two right results round to may lie on either side.
        tensors["norm.weight"] *= 0.1
        tensors["norm.bias"] = tensors["norm.bias"].sign()
    options = {"head_dim": head_dim or C, "keys": keys}
    return Call("layer_attention", tensors, options, statistics == "own").require_grad()


def _weights(form, C, dtype):
    weights = dsu_weights(form, C, max(1, C // 4), accumulate_dtype(torch.empty(0, dtype=dtype)))
    return {f"weights.{i}": w for i, w in enumerate(weights)}


def gap_dsu(
    B, C, H, W, dtype, layout="planes", other=None, form="joint", activation="sigmoid", pooled=False, carried=False,
    gate="context",
) -> Call:  # fmt: skip
    _, vector = _vectors(dtype)
    tensors = {"x": vector(B, C) if pooled else _maps((B, C, H, W), dtype, layout)()}
    tensors |= {"h": vector(B, C), "c": vector(B, C)} | _weights(form, C, dtype)
    if carried:
        tensors["carried"] = vector(B, C)
    return Call("gap_dsu", tensors, {"activation": activation, "gate": gate}).require_grad()


def refresh_gates(
    B, C, H, W, dtype, layout="planes", other=None, T=3, form="joint", activation="sigmoid", gate="context"
) -> Call:
    _, vector = _vectors(dtype)
    tensors = {"features": vector(B, T, C), "gates": vector(B, T, C), "h": vector(B, C), "c": vector(B, C)}
    return Call(
        "refresh_gates", tensors | _weights(form, C, dtype), {"activation": activation, "gate": gate}
    ).require_grad()


MAKE = {f.__name__: f for f in (gap_dsu, layer_attention, light_update, norm_residual, refresh_gates)}


def _rows(op: str, *rows: tuple) -> list:
    import pytest

    return [pytest.param(partial(MAKE[op], *shape, **options), id=f"{op}-{name}") for name, shape, options in rows]


ROWS = [
    *_rows(
        "norm_residual",
        ("eval statistics", (2, 16, 8, 8), {"statistics": "running"}),
        ("relu", (2, 16, 8, 8), {"relu": "branch"}),  # DLA-B
        ("training", (3, 16, 8, 8), {}),
        ("residual block", (3, 16, 8, 8), {"relu": "sum"}),
        ("residual block in eval", (3, 16, 8, 8), {"relu": "sum", "statistics": "running"}),
        ("residual block, primes", (3, 13, 7, 11), {"relu": "sum", "keep": True}),
        ("residual block in rows", (3, 13, 7, 11), {"layout": "rows", "relu": "sum"}),
        ("residual block, runs of rows", (2, 48, 40, 40), {"layout": "rows", "relu": "sum"}),
        ("no shortcut", (3, 16, 8, 8), {"shortcut": False, "relu": "branch"}),  # inside a residual block
        ("no shortcut in eval", (3, 16, 8, 8), {"shortcut": False, "relu": "branch", "statistics": "running"}),
        ("no shortcut, primes in rows", (3, 13, 7, 11), {"shortcut": False, "layout": "rows", "relu": "sum"}),
        ("no shortcut, every second pixel", (3, 5, 1, 1), {"shortcut": False, "layout": "every second column"}),
        ("no shortcut, sliced", (3, 13, 7, 11), {"shortcut": False, "layout": "planes sliced", "keep": True}),
        ("drop path", (5, 16, 8, 8), {"keep": True}),
        ("all of it", (5, 16, 8, 8), {"keep": True, "relu": "branch"}),
        ("primes", (3, 13, 7, 11), {"relu": "branch", "keep": True}),  # no size is a multiple of a vector
        ("primes in rows", (3, 13, 7, 11), {"layout": "rows", "relu": "branch", "keep": True}),
        ("several runs of rows", (2, 48, 40, 40), {"layout": "rows"}),  # sums over runs are added
        ("large planes", (1, 2, 200, 192), {"relu": "sum", "keep": True}),  # each for several of a GPU's blocks
        ("one pixel", (4, 17, 1, 1), {}),
        ("one channel", (3, 1, 9, 9), {"relu": "branch"}),  # whose sums do not all but cancel
        ("no sample", (0, 8, 4, 4), {"keep": True, "statistics": "running"}),  # it has no statistics of its own
        ("no sample of one pixel", (0, 8, 1, 1), {"statistics": "running"}),
        ("planes sliced", (2, 16, 6, 6), {"layout": "planes sliced"}),
        ("rows sliced", (2, 16, 6, 6), {"layout": "rows sliced"}),
        ("mixed layouts", (2, 16, 6, 6), {"other": "rows"}),
        ("transposed", (2, 16, 6, 5), {"layout": "transposed"}),
        ("expanded", (2, 16, 6, 5), {"other": "expanded"}),
    ),
    *_rows(
        "light_update",
        ("first layer", (2, 16, 8, 8), {"carry": "none"}),
        ("no gate", (2, 16, 8, 8), {"carry": "plain"}),  # MRLA-L
        ("gate", (2, 16, 8, 8), {"carry": "gate"}),  # DLA-L
        ("gate and filter", (2, 16, 8, 8), {"carry": "gate filter"}),  # DLA-L as released
        ("heads", (2, 48, 8, 8), {"head_dim": 16}),
        ("drop path", (5, 16, 8, 8), {"keep": True}),
        ("eval statistics", (2, 16, 8, 8), {"statistics": "running", "carry": "gate filter"}),
        ("filters of five", (2, 16, 3, 3), {"K": 5, "head_dim": 4}),  # which reach beyond a head
        ("filters longer than the channels", (2, 2, 3, 3), {"K": 5, "head_dim": 1}),
        ("wide rows", (2, 4, 5, 33), {"carry": "gate filter"}),  # a vector and one pixel over
        ("wider rows", (1, 3, 4, 83), {"carry": "gate filter"}),  # more vectors than go side by side
        ("wider rows, no gate", (1, 3, 4, 83), {"carry": "plain"}),
        ("primes", (3, 13, 7, 11), {"carry": "gate filter"}),
        ("primes in rows", (3, 13, 7, 11), {"layout": "rows", "carry": "gate filter"}),
        ("several runs of rows", (2, 48, 40, 40), {"layout": "rows"}),  # the window crosses a run's edge
        ("one pixel", (4, 17, 1, 1), {"carry": "gate filter"}),
        ("one row", (2, 8, 1, 9), {"carry": "gate filter"}),
        ("one column", (2, 8, 9, 1), {"layout": "rows", "carry": "gate filter"}),
        ("no sample", (0, 8, 4, 4), {"statistics": "running"}),
        ("no sample of one pixel", (0, 8, 1, 1), {"statistics": "running"}),
        ("planes sliced", (2, 16, 6, 6), {"layout": "planes sliced"}),
        ("rows sliced", (2, 16, 6, 6), {"layout": "rows sliced", "carry": "gate filter"}),
        ("mixed layouts", (2, 16, 6, 6), {"layout": "rows", "other": "planes"}),
        ("every second column", (2, 16, 6, 5), {"layout": "every second column"}),
    ),
    *_rows(
        "layer_attention",
        ("one layer", (2, 16, 8, 8), {"T": 1}),  # the softmax is 1, and its gradient 0
        ("heads", (2, 48, 8, 8), {"head_dim": 16}),
        ("drop path", (5, 16, 8, 8), {"keep": True}),
        ("eval statistics", (2, 16, 8, 8), {"statistics": "running"}),
        ("deep stage", (2, 8, 4, 4), {"T": 36}),  # the third stage of ResNet-152
        ("wider rows", (1, 2, 4, 83), {}),
        ("primes", (3, 13, 7, 11), {}),
        ("primes in rows", (3, 13, 7, 11), {"layout": "rows"}),
        ("several runs of rows", (2, 48, 40, 40), {"layout": "rows"}),
        ("one pixel", (4, 17, 1, 1), {}),
        ("one channel", (3, 1, 9, 9), {}),
        ("no sample", (0, 8, 4, 4), {"statistics": "running"}),
        ("no sample of one pixel", (0, 8, 1, 1), {"statistics": "running"}),
        ("planes sliced", (2, 16, 6, 6), {"layout": "planes sliced"}),
        ("rows sliced", (2, 16, 6, 6), {"layout": "rows sliced"}),
        ("mixed layouts", (2, 16, 6, 6), {"other": "rows"}),
        ("transposed", (2, 16, 6, 5), {"layout": "transposed"}),
        ("expanded", (2, 16, 6, 5), {"other": "expanded"}),
    ),
    *_rows(
        "gap_dsu",
        ("joint", (3, 16, 8, 8), {}),
        ("split", (3, 16, 8, 8), {"form": "split"}),
        ("identity", (3, 16, 8, 8), {"activation": "identity"}),
        ("tanh", (3, 16, 8, 8), {"activation": "tanh"}),
        ("relu", (3, 16, 8, 8), {"activation": "relu"}),
        ("GAP given", (3, 16, 8, 8), {"pooled": True}),
        ("gate of the carry", (3, 16, 8, 8), {"carried": True}),
        ("hidden gate, split", (3, 16, 8, 8), {"carried": True, "gate": "hidden", "form": "split", "pooled": True}),
        ("hidden relu gate", (3, 16, 8, 8), {"carried": True, "gate": "hidden", "activation": "relu"}),
        ("primes", (7, 37, 5, 3), {"form": "split"}),
        ("primes in rows", (7, 37, 5, 3), {"layout": "rows"}),
        ("several runs of rows", (2, 48, 40, 40), {"layout": "rows"}),
        ("wide", (5, 132, 3, 3), {}),
        ("many weights", (5, 256, 1, 1), {"carried": True}),  # which several blocks of a GPU share
        ("many weights, many rows", (26, 200, 1, 1), {"form": "split", "pooled": True}),
        ("many weights, in tiles", (67, 235, 1, 1), {"carried": True, "gate": "hidden"}),
        ("many weights, split, in tiles", (70, 202, 2, 3), {"form": "split", "layout": "rows"}),
        ("large map", (3, 24, 20, 20), {"layout": "rows"}),  # of which GAP is a launch of its own
        ("large planes", (1, 2, 200, 192), {}),
        ("many weights, split", (2, 200, 1, 1), {"form": "split"}),
        ("one pixel", (4, 17, 1, 1), {}),
        ("two channels", (3, 2, 9, 9), {"form": "split"}),
        ("no sample", (0, 8, 4, 4), {"carried": True}),
        ("rows sliced", (2, 16, 6, 6), {"layout": "rows sliced"}),
        ("expanded", (2, 16, 6, 5), {"layout": "expanded"}),
    ),
    *_rows(
        "refresh_gates",
        ("joint", (3, 16, 1, 1), {}),
        ("split", (3, 16, 1, 1), {"form": "split"}),
        ("hidden gates", (3, 16, 1, 1), {"gate": "hidden"}),
        ("hidden tanh", (3, 16, 1, 1), {"gate": "hidden", "activation": "tanh", "form": "split"}),
        ("hidden relu", (3, 16, 1, 1), {"gate": "hidden", "activation": "relu"}),
        ("hidden identity", (3, 16, 1, 1), {"gate": "hidden", "activation": "identity"}),
        ("one layer", (3, 16, 1, 1), {"T": 1}),
        ("deep stage", (2, 8, 1, 1), {"T": 36, "form": "split"}),
        ("primes", (7, 37, 1, 1), {"T": 5}),
        ("many rows", (23, 33, 1, 1), {"T": 9, "form": "split"}),
        ("wide", (2, 132, 1, 1), {"T": 5}),
        ("many weights", (2, 256, 1, 1), {"T": 3, "gate": "hidden"}),
        ("many weights, split", (2, 200, 1, 1), {"form": "split"}),
        ("many weights, in tiles", (23, 235, 1, 1), {"gate": "hidden"}),
        ("many weights, split, in tiles", (14, 202, 1, 1), {"T": 5, "form": "split"}),
        ("two channels", (3, 2, 1, 1), {}),
        ("no sample", (0, 8, 1, 1), {"form": "split"}),
    ),
]  # fmt: skip

#: One plain call of every op.
TYPICAL = {
    "gap_dsu": partial(gap_dsu, 4, 16, 8, 8, carried=True),
    "layer_attention": partial(layer_attention, 4, 16, 8, 8, head_dim=8),
    "light_update": partial(light_update, 4, 16, 8, 8, carry="gate filter", head_dim=8),
    "norm_residual": partial(norm_residual, 4, 16, 8, 8, keep=True, relu="branch"),
    "refresh_gates": partial(refresh_gates, 4, 16, 8, 8),
}
