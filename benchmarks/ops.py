"""What does each op cost, beside the reference, torch.compile of it, and reads and copies of the same map?

Bytes are those that an op must move: every input once in every pass that needs it, every output once. Arguments come
from memory and results go there, not from and to a cache.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import dla_kernels
from dla.benchmarks.measure import (
    Function,
    Prepared,
    Row,
    Wrong,
    at_first_call,
    graphed,
    read_and_copy,
    rotating,
    sets_of,
)
from dla_kernels import BatchNorm
from dla_kernels.backend import why_not
from dla_kernels.dsu import DsuWeights

#: Layers of the stage that stands for layer_attention and refresh_gates, and channels of a head.
T, HEAD_DIM = 4, 32
#: B, C, H, W of a map of CIFAR and of one of ImageNet that no cache holds, which a short run measures; then others of
#: CIFAR, of ImageNet, and of 512x512 images.
SHAPES = {
    "cpu": (
        [(32, 64, 32, 32), (24, 256, 56, 56)],
        [(32, 256, 8, 8), (4, 256, 56, 56), (4, 1024, 14, 14), (4, 2048, 7, 7), (1, 256, 128, 128), (8, 256, 128, 128)],
    ),
    "cuda": (
        [(128, 64, 32, 32), (256, 256, 56, 56)],
        [(64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7), (16, 256, 128, 128)],
    ),
}
#: Bytes of a map that no cache holds. On such an op has a goal.
BEYOND_CACHE = 2**26
DTYPES = {d: getattr(torch, d) for d in ("float32", "bfloat16", "float16", "float64")}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
#: Samples of a batch that are compared with the reference, which takes many times the memory in float64.
CHECKED = 16
#: How much larger than the reference's own rounding error another backend's may be, and what its sums may lose in
#: float32 and in float64: they add up to some ten thousand elements in another order.
SLACK, SUMS, SUMS_FLOAT64 = 8, 64 * torch.finfo(torch.float32).eps, 64 * torch.finfo(torch.float64).eps


class Pass(NamedTuple):
    """What a direction of an op must do.

    Attributes:
        reads, writes: maps.
        flops: floating-point operations an element of a map.
        weights: multiples of the DSU's 5 C^2 / r weights that a sample passes.
    """

    reads: int
    writes: int
    flops: int
    weights: int = 0

    def bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return (self.reads + self.writes) * torch.Size(shape).numel() * dtype.itemsize

    def operations(self, shape: Sequence[int]) -> int:
        b, c = shape[:2]
        return self.flops * torch.Size(shape).numel() + 2 * 5 * c * _reduced(c) * b * self.weights


class Op(NamedTuple):
    """What the benchmarks know of an op.

    Attributes:
        build: ``build(maps, vectors, b, c, backend, training) -> (function, arguments)``, of makers of maps and of
            vectors.
        forward, backward: in training.
        inference: without gradients, where BatchNorm has constant statistics; None for an op without a BatchNorm.
    """

    build: Callable
    forward: Pass
    backward: Pass
    inference: Pass | None = None

    @property
    def directions(self) -> list[str]:
        return [name for name in ("forward", "backward", "inference") if getattr(self, name) is not None]


def _reduced(c: int) -> int:
    return max(1, c // 4)


def _dsu(vectors, c: int) -> DsuWeights:
    """Packed, as a network packs them once for all layers of a stage."""
    dsu = dla_kernels.pack_dsu([vectors(_reduced(c), 2 * c), vectors(3 * c, _reduced(c)), vectors(3 * c)])
    return dsu._replace(packed=dsu.packed.detach().requires_grad_(dsu.packed.requires_grad))


def _norm(vectors, c: int, training: bool) -> Callable[[Tensor, Tensor], BatchNorm]:
    statistics = () if training else (vectors(c).detach(), 1 + vectors(c).detach() ** 2)
    return lambda weight, bias: BatchNorm(weight, bias, *statistics, training=training)


def gap_dsu(maps, vectors, b, c, backend, training):
    dsu = _dsu(vectors, c)

    def call(x, h, state, packed):
        return dla_kernels.gap_dsu(x, h, state, dsu._replace(packed=packed), carried=h, backend=backend)

    return call, [maps(), vectors(b, c), vectors(b, c), dsu.packed]


def refresh_gates(maps, vectors, b, c, backend, training):
    dsu = _dsu(vectors, c)

    def call(features, gates, h, state, packed):
        return (dla_kernels.refresh_gates(features, gates, h, state, dsu._replace(packed=packed), backend=backend),)

    return call, [vectors(b, T, c), vectors(b, T, c), vectors(b, c), vectors(b, c), dsu.packed]


def layer_attention(maps, vectors, b, c, backend, training, layers=T):
    batch_norm, prior = _norm(vectors, c, training), []

    def attend(x, features, gates, query_weight, key_weights, value_weight, weight, bias):
        return dla_kernels.layer_attention(
            x, features, gates, query_weight, key_weights, value_weight, prior, batch_norm(weight, bias), None,
            HEAD_DIM, backend=backend,
        )  # fmt: skip

    def call(*arguments):
        out, layer = attend(*arguments)
        return out, layer.pooled

    features, gates = vectors(b, layers, c), vectors(b, layers, c)
    query_weight, key_weights = vectors(1, 1, 5), vectors(layers, 1, 5)
    others = vectors(c, 1, 3, 3), vectors(c), vectors(c)
    with torch.no_grad():
        for t in range(1, layers):
            prior.append(attend(maps(), features[:, :t], gates[:, :t], query_weight, key_weights[:t], *others)[1])
    return call, [maps(), features, gates, query_weight, key_weights, *others]


def light_update(maps, vectors, b, c, backend, training, filtered=False):
    batch_norm = _norm(vectors, c, training)

    def call(x, y, query_weight, key_weight, value_weight, carried, carry_scale, gate, weight, bias, *carry_weight):
        return dla_kernels.light_update(
            x, y, query_weight, key_weight, value_weight, batch_norm(weight, bias), carried, carry_scale, gate,
            *carry_weight, head_dim=HEAD_DIM, backend=backend,
        )  # fmt: skip

    filters = [vectors(1, 1, 5), vectors(1, 1, 5), vectors(c, 1, 3, 3)]
    arguments = [maps(), vectors(b, c), *filters, maps(), vectors(c), vectors(b, c), vectors(c), vectors(c)]
    return call, [*arguments, vectors(c, 1, 3, 3)] if filtered else arguments


def norm_residual(maps, vectors, b, c, backend, training):
    batch_norm = _norm(vectors, c, training)

    def call(x, o, weight, bias):
        return dla_kernels.norm_residual(x, o, batch_norm(weight, bias), relu="sum", backend=backend)

    return call, [maps(), maps(), vectors(c), vectors(c)]


def of_layers(layers: int) -> Op:
    """layer_attention over so many layers: V from x, o from it and the prior V's, out from x and o; backward its sums,
    then the gradients of o and of x."""
    return Op(
        functools.partial(layer_attention, layers=layers),
        Pass(layers + 2, 3, 2 * layers + 24),
        Pass(layers + 5, 2, 4 * layers + 46),
        Pass(layers, 2, 2 * layers + 20),
    )


# A filter's tap is two FLOPs an element; a gradient of it two for the map's and two for the filter's. BatchNorm takes
# about six an element forward, with its moments, and ten backward.
OPS = {
    "gap_dsu": Op(gap_dsu, Pass(1, 0, 1, 2), Pass(0, 0, 0, 4)),
    "refresh_gates": Op(refresh_gates, Pass(0, 0, 0, T), Pass(0, 0, 0, 2 * T)),
    "layer_attention": of_layers(T),
    # o from x and what is carried, out from x and o; backward its sums, then both gradients; o is carried on.
    "light_update": Op(light_update, Pass(4, 2, 27), Pass(7, 2, 50), Pass(2, 2, 23)),
    "light_update+3x3": Op(
        functools.partial(light_update, filtered=True), Pass(4, 2, 43), Pass(7, 2, 82), Pass(2, 2, 39)
    ),
    "norm_residual": Op(norm_residual, Pass(3, 1, 8), Pass(6, 2, 12), Pass(2, 1, 3)),
}

#: What is to be reached at least of a copy's bytes a second, by device.
GOALS = {
    "cpu": {name: {"forward": 0.8, "backward": 0.8, "inference": 0.8} for name in OPS},
    "cuda": {
        "layer_attention": {"forward": 0.85, "backward": 0.75, "inference": 0.85},
        **{
            name: {"forward": 0.9, "backward": 0.8, "inference": 0.9}
            for name in ("light_update", "light_update+3x3", "norm_residual")
        },
    },
}


def build(op: Op, shape, dtype, layout, device, backend, training=True, exact=False) -> tuple[Callable, list[Tensor]]:
    """The op's function and its arguments, the same at every call; with ``exact`` held in float64."""
    b, c, h, w = shape
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def maps() -> Tensor:
        x = random(b, c, h, w).to(dtype).to(torch.float64 if exact else dtype)
        return x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_(training)

    def vectors(*size: int) -> Tensor:
        v = (random(*size) * size[-1] ** -0.5).to(torch.float64 if exact or dtype == torch.float64 else torch.float32)
        return v.requires_grad_(training)

    return op.build(maps, vectors, b, c, backend, training)


def results(function: Callable, arguments: list[Tensor], dtype: torch.dtype, training: bool) -> list[Tensor]:
    """Outputs, then in training gradients, given random ones of the outputs that ``dtype`` can hold.

    A BatchNorm lets nothing of a constant gradient through: with ones its backward would not be seen.
    """
    if not training:
        with torch.no_grad():
            return [o for o in function(*arguments) if o is not None]
    outputs, generator = _differentiable(function(*arguments)), torch.Generator().manual_seed(1)
    given = [torch.randn(o.shape, generator=generator).to(dtype).to(o) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, arguments, given)]


def _differentiable(outputs) -> list[Tensor]:
    return [o for o in outputs if o is not None and o.requires_grad]


@functools.lru_cache(1)
def wrong(op: Op, shape, dtype, layout, device, backends: Sequence[str], training: bool) -> str | None:
    """What is wrong, unless every backend is about as near to the float64 reference as the reference itself."""
    exact = results(*build(op, shape, dtype, layout, device, "reference", training, exact=True), dtype, training)

    def errors(backend: str) -> list[float]:
        got = results(*build(op, shape, dtype, layout, device, backend, training), dtype, training)
        return [((g.double() - e).norm() / e.norm().clamp_min(1e-30)).item() for g, e in zip(got, exact, strict=True)]

    own, sums = errors("reference"), SUMS if dtype != torch.float64 else SUMS_FLOAT64
    for backend in backends:
        for i, (error, allowed) in enumerate(zip(errors(backend), own, strict=True)):
            if not error <= SLACK * allowed + sums:
                return f"{backend}: result {i} is off by {error:.1e}, the reference by {allowed:.1e}"
    return None


def available(device: torch.device) -> tuple[str, ...]:
    """The fused backends of a device, best first; Triton's interpreter is no rival."""
    names = ("native", "triton") if device.type == "cuda" else ("native",)
    return tuple(b for b in names if why_not(b, device) is None)


def prepare(op, shape, dtype, layout, direction, compiled, device, goal=None, alone=False) -> Prepared:
    """A row's rivals: every fused backend and the reference, with ``alone`` the first one only; a sum and a copy."""
    fused = available(device)[: 1 if alone else None]
    sample = min(shape[0], CHECKED), *shape[1:]
    error = wrong(op, sample, dtype, layout, device, fused, direction != "inference")
    if error is not None:
        raise Wrong(error)
    what = op, shape, dtype, layout, direction, device
    rivals = {b: rotating(sets(*what, b)) for b in [*fused, *([] if alone else ["reference"])]}
    if device.type == "cuda" and not alone:
        rivals |= {
            f"{b}, CUDA graph": at_first_call(lambda b=b: rotating(sets(*what, b, through=graphed))) for b in fused
        }
    if compiled:
        torch._dynamo.reset()
        rivals["compiled"] = at_first_call(lambda: rotating(sets(*what, "reference", torch.compile)))
    needs, map_bytes = getattr(op, direction), torch.Size(shape).numel() * dtype.itemsize
    if needs.reads:
        rivals |= read_and_copy(map_bytes, device)
    facts = {
        "reads": needs.reads, "writes": needs.writes, "map_bytes": map_bytes, "flops": needs.operations(shape),
    }  # fmt: skip
    has_goal = goal is not None and needs.reads and map_bytes >= BEYOND_CACHE
    return Prepared(rivals, facts | ({"goal": goal} if has_goal else {}))


def sets(
    op, shape, dtype, layout, direction, device, backend, transform=lambda f: f, through=lambda make: make()
) -> list[Function]:
    """One direction of an op as functions of nothing, each with arguments of its own."""

    def one() -> Function:
        function, arguments = build(op, shape, dtype, layout, device, backend, direction != "inference")
        function = transform(function)
        if direction == "inference":
            return functools.partial(torch.no_grad()(function), *arguments)
        if direction == "forward":
            return functools.partial(function, *arguments)
        outputs = _differentiable(function(*arguments))
        ones = [torch.ones_like(o) for o in outputs]
        return functools.partial(torch.autograd.grad, outputs, arguments, ones, retain_graph=True)

    return [through(one) for _ in range(sets_of(op.forward.bytes(shape, dtype)))]


def rows(device: torch.device, full: bool = False, ops: Sequence[str] = ()) -> Iterator[Row]:
    """Ops by name, all of them by default.

    Raises:
        ValueError: an unknown op.
    """
    for name in ops:
        if name not in OPS:
            raise ValueError(f"`op` must be one of {', '.join(OPS)}, got {name!r}")
    short, more = SHAPES[device.type]
    shapes = short + more if full else short
    dtypes = list(DTYPES) if full else ["bfloat16" if device.type == "cuda" else "float32"]
    layouts = list(LAYOUTS) if full else ["channels_last" if device.type == "cuda" else "NCHW"]
    for shape in shapes:
        for dtype in dtypes:
            for layout in layouts:
                for name in ops or OPS:
                    for direction in OPS[name].directions:
                        labels = {
                            "op": name, "": direction, "shape": "x".join(map(str, shape)), "dtype": dtype,
                            "layout": layout,
                        }  # fmt: skip
                        # To compile takes seconds.
                        compiled = full or (shape == short[0] and direction != "inference")
                        yield Row("ops", labels, "reference", functools.partial(
                            prepare, OPS[name], shape, DTYPES[dtype], layout, direction, compiled,
                            goal=GOALS[device.type].get(name, {}).get(direction),
                        ))  # fmt: skip
