"""Does a GPU reach what it should? A row for each figure asked of an H200, in bfloat16 and channels_last.

Rows are measured in one of four units: the rate of the bytes that an op must move over that of a copy of the same map
("of copy"); the time over that of two empty launches and of its bytes at the copy's rate ("x two launches", both out of
a CUDA graph); the rival's time over ours ("x as fast"), and ours over the rival's ("x the time").
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import dla_kernels
from dla.benchmarks import launches, models, networks, ops
from dla.benchmarks.measure import Function, Prepared, Row, graphed
from dla.stage import create_stage
from dla_kernels import BatchNorm, norm_residual

#: By device: the shape of the map of the ops and of the block, the layers of layer_attention, the batch and the
#: channels of the vectors' ops, with the side of their maps; the networks' batch and image, rival, and what is asked.
SIZES = {
    "cuda": {
        "map": (256, 256, 56, 56),
        "layers": (12, 23),
        "batch": 128,
        "channels": {64: 32, 128: 16, 256: 8, 512: 28, 1024: 14, 2048: 7},
        "networks": {
            "resnet50_dla_l": (256, 224, "plain", 1.15, "x the time"),
            "resnet110_dla_b": (128, 32, "literal", 8, "x as fast"),
        },
    }
}
#: The paper's reduction for CIFAR's channels and for ImageNet's.
REDUCTION = {c: 4 if c <= 256 else 20 for c in (64, 128, 256, 512, 1024, 2048)}
#: Calls in one CUDA graph, so that what a graph costs is little beside them.
CALLS = 20


class Tail(nn.Module):
    """What a residual block is without its convolutions: the last BatchNorm, the addition, the ReLU and GAP."""

    def __init__(self, channels: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def output(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *norm_residual(x, x, BatchNorm.of(self.bn), relu="sum"), x


def block(rival: str, shape, device) -> Prepared:
    """Four DLA-L blocks without convolutions, forward and backward: all that is left is ours."""
    torch.manual_seed(0)
    stage = create_stage([Tail(shape[1]) for _ in range(4)], shape[1], "dla_l")
    networks.check(stage, torch.randn(2, shape[1], 4, 4), "train step", names=())
    stage = stage.to(device, memory_format=torch.channels_last)
    other: nn.Module = networks.On(stage, "reference")
    if rival == "compiled reference":
        torch._dynamo.reset()
        other = torch.compile(other)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    ones, inputs = torch.ones_like(x), [x.requires_grad_(), *stage.parameters()]

    def step(form: nn.Module) -> Function:
        return lambda: torch.autograd.grad(form(x), inputs, ones)

    return Prepared({"fused": step(stage), rival: step(other)})


def vectors_op(name: str, shape, direction: int, device) -> Prepared:
    """gap_dsu of a map or refresh_gates, beside an empty launch."""
    b, c = shape[:2]
    r = max(1, c // REDUCTION.get(c, 4))
    torch.manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device) * size[-1] ** -0.5

    packed = dla_kernels.pack_dsu([random(r, 2 * c), random(3 * c, r), random(3 * c)])
    weights = packed._replace(packed=packed.packed.detach().requires_grad_())
    rows = b if name == "gap_dsu" else b * ops.T
    arguments = [random(b, c).requires_grad_() for _ in range(2)]
    if name == "gap_dsu":
        x = random(*shape).to(torch.bfloat16, memory_format=torch.channels_last)
        arguments = [x.requires_grad_(), *arguments]
    else:
        arguments = [*(random(b, ops.T, c).requires_grad_() for _ in range(2)), *arguments]

    def call() -> list[Tensor]:
        outputs = getattr(dla_kernels, name)(*arguments, weights)
        return [outputs] if isinstance(outputs, Tensor) else [o for o in outputs if o is not None]

    def build() -> Function:
        if direction == 0:
            return torch.no_grad()(call)
        outputs = call()
        ones, inputs = [torch.ones_like(o) for o in outputs], [*arguments, weights.packed]
        return functools.partial(torch.autograd.grad, outputs, inputs, ones, retain_graph=True)

    # Weights, the rows' vectors and the map once forward; backward the weights' gradient and the vectors' too.
    moved = (direction + 1) * (weights.packed.nbytes + 5 * rows * c * weights.packed.itemsize)
    if name == "gap_dsu" and direction == 0:
        moved += x.nbytes
    source = torch.empty(2**28 if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device)
    facts = {"bytes": CALLS * moved, "map_bytes": source.nbytes}
    built = {"native": build, "empty": functools.partial(empty_launch, device)}
    if device.type == "cuda":
        facts["launches"] = launches.kernels(build())
        rivals = {name: graphed(of, CALLS) for name, of in built.items()}
    else:
        rivals = {name: functools.partial(repeat, of()) for name, of in built.items()}
    return Prepared(rivals | {"copy": source.clone}, facts)


def repeat(function: Function) -> None:
    for _ in range(CALLS):
        function()


def empty_launch(device: torch.device) -> Function:
    """A kernel that does nothing."""
    return functools.partial(torch.cuda._sleep, 0) if device.type == "cuda" else lambda: None


def rows(device: torch.device, full: bool = False) -> Iterator[Row]:
    """None on a device that nothing is asked of."""
    sizes = SIZES.get(device.type)
    if sizes is None:
        return

    def row(what: str, task: str, shape, asked: float, unit: str, base: str, prepare: Callable) -> Row:
        labels = {"what": what, "": task, "at": "x".join(map(str, shape))}
        facts = {"asked": asked, "unit": unit, "is_most": unit in ("x two launches", "x the time")}

        def with_facts(device: torch.device) -> Prepared:
            prepared = prepare(device)
            return Prepared(prepared.rivals, prepared.facts | facts)

        return Row("floors", labels, base, with_facts)

    tasks, shape = ("forward", "backward"), sizes["map"]
    bandwidth = {name: (ops.OPS[name], 0.9, 0.8) for name in ("light_update", "norm_residual")}
    bandwidth |= {f"layer_attention, T = {t}": (ops.of_layers(t), 0.85, 0.75) for t in sizes["layers"]}
    for what, (op, *asked) in bandwidth.items():
        for task, least in zip(tasks, asked, strict=True):
            prepare = functools.partial(
                ops.prepare, op, shape, torch.bfloat16, "channels_last", task, False, alone=True
            )
            yield row(what, task, shape, least, "of copy", "copy", prepare)
    for what in ("gap_dsu", "refresh_gates"):
        for c, side in sizes["channels"].items():
            for direction, task in enumerate(tasks):
                of = (sizes["batch"], c, side, side)
                prepare = functools.partial(vectors_op, what, of, direction)
                shown = of if what == "gap_dsu" else (sizes["batch"], ops.T, c)
                yield row(what, task, shown, 1, "x two launches", "empty", prepare)
    for rival, asked in (("reference", 4), ("compiled reference", 1.5)):
        prepare = functools.partial(block, rival, shape)
        yield row(f"DLA-L block against its {rival}", "train step", shape, asked, "x as fast", rival, prepare)
    for name, (batch, image, rival, asked, unit) in sizes["networks"].items():
        prepare = functools.partial(models.prepare, name, batch, image, "train step", rival == "literal", False)
        of = (batch, 3, image, image)
        yield row(f"{name} against the {rival} one", "train step", of, asked, unit, rival, prepare)
