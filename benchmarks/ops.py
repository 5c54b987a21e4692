"""What does each op cost, beside the reference, torch.compile of it, and a copy of the same map?

Bytes are those that an op must move in training: every input once in every pass that needs it, every output once.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import dla_kernels
from dla.benchmarks.measure import Function, Prepared, Row, Wrong, copy_of, graphed, rotating
from dla_kernels import BatchNorm
from dla_kernels.backend import why_not

#: Layers of the stage that stands for layer_attention and refresh_gates, and channels of a head.
T, HEAD_DIM = 4, 32
#: B, C, H, W of a map of CIFAR, of ImageNet, and of 512x512 images: those of a short run, then the others.
SHAPES = {
    "cpu": (
        [(32, 64, 32, 32), (4, 256, 56, 56)],
        [(32, 256, 8, 8), (4, 1024, 14, 14), (4, 2048, 7, 7), (1, 256, 128, 128)],
    ),
    "cuda": (
        [(128, 64, 32, 32), (256, 256, 56, 56)],
        [(64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7), (16, 256, 128, 128)],
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
#: On a GPU the calls go round sets of arguments, of this many bytes together: more than its caches hold.
BEYOND_CACHES = 2**28
#: Samples of a batch that are compared with the reference, which takes many times the memory in float64.
CHECKED = 16
#: How much larger than the reference's own rounding error another backend's may be, and what its sums may lose in
#: float32: they add up to some ten thousand elements in another order.
SLACK, SUMS = 8, 64 * torch.finfo(torch.float32).eps


class Op(NamedTuple):
    """What the benchmarks know of an op; each number is (forward, backward).

    Attributes:
        build: ``build(maps, vectors, b, c, backend) -> (function, arguments)``, of makers of maps and of vectors.
        maps: how many maps it must move in training.
        flops: floating-point operations an element of a map.
        weights: multiples of the DSU's 5 C^2 / r weights that a sample passes.
    """

    build: Callable
    maps: tuple[int, int]
    flops: tuple[int, int]
    weights: tuple[int, int] = (0, 0)

    def bytes(self, shape: Sequence[int], dtype: torch.dtype, direction: int) -> int:
        return self.maps[direction] * torch.Size(shape).numel() * dtype.itemsize

    def operations(self, shape: Sequence[int], direction: int) -> int:
        b, c = shape[:2]
        products = 2 * 5 * c * _reduced(c) * b * self.weights[direction]
        return self.flops[direction] * torch.Size(shape).numel() + products


def _reduced(c: int) -> int:
    return max(1, c // 4)


def _dsu(vectors, c: int) -> list[Tensor]:
    return [vectors(_reduced(c), 2 * c), vectors(3 * c, _reduced(c)), vectors(3 * c)]


def gap_dsu(maps, vectors, b, c, backend):
    def call(x, h, state, *weights):
        return dla_kernels.gap_dsu(x, h, state, weights, carried=h, backend=backend)

    return call, [maps(), vectors(b, c), vectors(b, c), *_dsu(vectors, c)]


def refresh_gates(maps, vectors, b, c, backend):
    def call(features, gates, h, state, *weights):
        return (dla_kernels.refresh_gates(features, gates, h, state, weights, backend=backend),)

    return call, [vectors(b, T, c), vectors(b, T, c), vectors(b, c), vectors(b, c), *_dsu(vectors, c)]


def layer_attention(maps, vectors, b, c, backend, layers=T):
    def attend(x, features, gates, query_weight, value_weight, weight, bias, *key_weights):
        return dla_kernels.layer_attention(
            x, features, gates, query_weight, key_weights, value_weight, prior, BatchNorm(weight, bias), None,
            HEAD_DIM, backend=backend,
        )  # fmt: skip

    def call(*arguments):
        out, layer = attend(*arguments)
        return out, layer.pooled

    prior, features, gates = [], vectors(b, layers, c), vectors(b, layers, c)
    filters = vectors(1, 1, 5), vectors(c, 1, 3, 3), vectors(c), vectors(c)
    key_weights = [vectors(1, 1, 5) for _ in range(layers)]
    with torch.no_grad():
        for t in range(1, layers):
            prior.append(attend(maps(), features[:, :t], gates[:, :t], *filters, *key_weights[:t])[1])
    return call, [maps(), features, gates, *filters, *key_weights]


def light_update(maps, vectors, b, c, backend, filtered=False):
    def call(x, y, query_weight, key_weight, value_weight, carried, carry_scale, gate, weight, bias, *carry_weight):
        return dla_kernels.light_update(
            x, y, query_weight, key_weight, value_weight, BatchNorm(weight, bias), carried, carry_scale, gate,
            *carry_weight, head_dim=HEAD_DIM, backend=backend,
        )  # fmt: skip

    filters = [vectors(1, 1, 5), vectors(1, 1, 5), vectors(c, 1, 3, 3)]
    arguments = [maps(), vectors(b, c), *filters, maps(), vectors(c), vectors(b, c), vectors(c), vectors(c)]
    return call, [*arguments, vectors(c, 1, 3, 3)] if filtered else arguments


def norm_residual(maps, vectors, b, c, backend):
    def call(x, o, weight, bias):
        return dla_kernels.norm_residual(x, o, BatchNorm(weight, bias), relu="sum", backend=backend)

    return call, [maps(), maps(), vectors(c), vectors(c)]


def of_layers(layers: int) -> Op:
    """layer_attention over so many layers: V from x, o from the V's, out from both; backward its sums, then the
    gradients of o, of V and of x."""
    maps, flops = (layers + 6, layers + 11), (2 * layers + 24, 4 * layers + 46)
    return Op(functools.partial(layer_attention, layers=layers), maps, flops)


# A filter's tap is two FLOPs an element; a gradient of it two for the map's and two for the filter's. BatchNorm takes
# about six an element forward, with its moments, and ten backward.
OPS = {
    "gap_dsu": Op(gap_dsu, (1, 0), (1, 0), (2, 4)),
    "refresh_gates": Op(refresh_gates, (0, 0), (0, 0), (T, 2 * T)),
    "layer_attention": of_layers(T),
    "light_update": Op(light_update, (6, 9), (27, 50)),
    "light_update, filtered carry": Op(functools.partial(light_update, filtered=True), (6, 9), (43, 82)),
    "norm_residual": Op(norm_residual, (4, 8), (8, 12)),
}


def build(op: Op, shape, dtype, layout, device, backend, exact=False) -> tuple[Callable, list[Tensor]]:
    """The op's function and its arguments, the same at every call; with ``exact`` held in float64."""
    b, c, h, w = shape
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def maps() -> Tensor:
        x = random(b, c, h, w).to(dtype).to(torch.float64 if exact else dtype)
        return x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()

    def vectors(*size: int) -> Tensor:
        v = (random(*size) * size[-1] ** -0.5).to(torch.float64 if exact else torch.float32)
        return v.requires_grad_()

    return op.build(maps, vectors, b, c, backend)


def results(function: Callable, arguments: list[Tensor]) -> list[Tensor]:
    """Outputs, then gradients in a random direction: of a constant one BatchNorm leaves but rounding."""
    outputs = _differentiable(function(*arguments))
    device = outputs[0].device
    generator = torch.Generator(device).manual_seed(1)
    directions = [torch.randn(o.shape, generator=generator, device=device).to(o) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, arguments, directions)]


def _differentiable(outputs) -> list[Tensor]:
    return [o for o in outputs if o is not None and o.requires_grad]


def check(op: Op, shape, dtype, layout, device, backends: Sequence[str]) -> None:
    """Every backend is about as near to the float64 reference as the reference itself.

    Raises:
        Wrong: one is not.
    """
    exact = results(*build(op, shape, dtype, layout, device, "reference", exact=True))

    def errors(backend: str) -> list[float]:
        got = results(*build(op, shape, dtype, layout, device, backend))
        return [((g.double() - e).norm() / e.norm().clamp_min(1e-30)).item() for g, e in zip(got, exact, strict=True)]

    own = errors("reference")
    for backend in backends:
        for i, (error, allowed) in enumerate(zip(errors(backend), own, strict=True)):
            if not error <= SLACK * allowed + SUMS:
                raise Wrong(f"{backend}: result {i} is off by {error:.1e}, the reference by {allowed:.1e}")


def available(device: torch.device) -> list[str]:
    """The fused backends of a device, best first; Triton's interpreter is no rival."""
    names = ("native", "triton") if device.type == "cuda" else ("native",)
    return [b for b in names if why_not(b, device) is None]


def prepare(op, shape, dtype, layout, direction, compiled, device, alone=False) -> Prepared:
    """A row's rivals: every fused backend and the reference, with ``alone`` the first one only; and a copy."""
    fused = available(device)[: 1 if alone else None]
    check(op, (min(shape[0], CHECKED), *shape[1:]), dtype, layout, device, fused)
    eager = [*fused, *([] if alone else ["reference"])]
    built = {b: functools.partial(run, op, shape, dtype, layout, direction, device, b) for b in eager}
    rivals = {b: build() for b, build in built.items()}
    if device.type == "cuda" and not alone:
        rivals |= {f"{b}, CUDA graph": graphed(built[b]) for b in fused}
    if compiled:
        torch._dynamo.reset()
        rivals["compiled"] = run(op, shape, dtype, layout, direction, device, "reference", torch.compile)
    source = torch.empty(shape, dtype=dtype, device=device)
    rivals["copy"] = copy_of(source)
    return Prepared(
        rivals,
        {
            "bytes": op.bytes(shape, dtype, direction),
            "flops": op.operations(shape, direction),
            "map_bytes": source.nbytes,
        },
    )


def run(op, shape, dtype, layout, direction, device, backend, transform=lambda f: f) -> Function:
    """One direction of an op as a function of nothing."""
    sets = max(1, BEYOND_CACHES // max(1, op.bytes(shape, dtype, 0))) if device.type == "cuda" else 1
    functions = []
    for _ in range(min(sets, 16)):
        function, arguments = build(op, shape, dtype, layout, device, backend)
        function = transform(function)
        if direction == 0:
            functions.append(functools.partial(function, *arguments))
            continue
        outputs = _differentiable(function(*arguments))
        ones = [torch.ones_like(o) for o in outputs]
        functions.append(functools.partial(torch.autograd.grad, outputs, arguments, ones, retain_graph=True))
    return rotating(functions) if len(functions) > 1 else functions[0]


def rows(device: torch.device, full: bool = False, ops: Sequence[str] = ()) -> Iterator[Row]:
    """Ops by name, all of them by default.

    Raises:
        ValueError: an unknown op.
    """
    for name in ops:
        if name not in OPS:
            raise ValueError(f"`op` must be one of {'; '.join(OPS)}, got {name!r}")
    short, more = SHAPES[device.type]
    shapes = short + more if full else short
    dtypes = ["float32", "bfloat16"] if full else ["bfloat16" if device.type == "cuda" else "float32"]
    layouts = list(LAYOUTS) if full else ["channels_last" if device.type == "cuda" else "NCHW"]
    for shape in shapes:
        for dtype in dtypes:
            for layout in layouts:
                for name in ops or OPS:
                    for direction, what in enumerate(("forward", "backward")):
                        labels = {
                            "op": name, "": what, "shape": "x".join(map(str, shape)), "dtype": dtype, "layout": layout,
                        }  # fmt: skip
                        compiled = full or shape == short[0]
                        yield Row("ops", labels, "reference", functools.partial(
                            prepare, OPS[name], shape, DTYPES[dtype], layout, direction, compiled
                        ))  # fmt: skip
