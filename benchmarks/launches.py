"""How many ops does a block dispatch, and what does that alone cost? A stage of four on maps of one pixel."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dla.benchmarks import blocks, networks
from dla.benchmarks.measure import Function, Prepared, Row
from dla.stage import INTERACTIONS

BATCH, CHANNELS = 2, 64


class Ops(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def dispatched(stage: nn.Module, device: torch.device | str = "cpu", size: int = 1) -> tuple[int, int]:
    """Ops of a stage, forward and backward; parameters take their gradients without an op of their own."""
    training = stage.training
    x = torch.randn(BATCH, CHANNELS, size, size, device=device, requires_grad=training)
    with torch.set_grad_enabled(training):
        with Ops() as forward:
            out = stage(x)
        with Ops() as backward:
            if training:
                torch.autograd.grad(out.sum(), [x, *stage.parameters()])
    return forward.count, backward.count


def kernels(function: Function) -> int:
    """Kernels that a call launches on a GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        function()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in trace.events())


def of_one_block(build: Callable[[int], nn.Module], count: Callable[[nn.Module], Sequence[int]]) -> list[int]:
    """What the fifth block of a stage adds to each count; ``build(blocks)`` makes a stage."""
    return [many - few for few, many in zip(count(build(4)), count(build(5)), strict=True)]


def prepare(interaction, task, device) -> Prepared:
    builders = {
        "fused": lambda n: blocks.build(CHANNELS, interaction, n),
        "plain": lambda n: blocks.build(CHANNELS, None, n),
    }
    if interaction != "lii":
        builders["literal"] = lambda n: networks.literal_form(builders["fused"](n))
    x = torch.randn(BATCH, CHANNELS, 1, 1, device=device)
    run = networks.TASKS[task]
    rivals, facts = {}, {}
    for name, builder in builders.items():
        rivals[name] = run(builder(blocks.BLOCKS).to(device), x)

        def build(n: int, builder=builder) -> nn.Module:
            return builder(n).to(device).train(task == "train step")

        ops = of_one_block(build, lambda stage: dispatched(stage, device))
        facts |= {f"ops forward, {name}": ops[0], f"ops backward, {name}": ops[1]}
        if device.type == "cuda":
            (facts[f"kernels, {name}"],) = of_one_block(build, lambda stage: [kernels(run(stage, x))])
    return Prepared(rivals, facts)


def rows(device: torch.device, full: bool = False) -> Iterator[Row]:
    for interaction in INTERACTIONS:
        for task in networks.TASKS:
            labels = {"interaction": interaction, "": task}
            yield Row("launches", labels, "plain", functools.partial(prepare, interaction, task))
