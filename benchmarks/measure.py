"""How everything is measured: rivals in turn, A B A B, so that a machine that drifts does so for all of them."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from torch import Tensor

Function = Callable[[], object]

#: Rounds of a row, however long one takes, and as many as fit into the budget.
MIN_ROUNDS, MAX_ROUNDS = 5, 50
#: A sample is as many calls as take this long, so that the clock's own grain does not count.
SAMPLE_S = 1e-3


class Wrong(Exception):
    """A rival's result is not that of the reference: it gets no number."""


@dataclass
class Prepared:
    """What a row measures: rivals by name, ours first, and what is known of them without a clock."""

    rivals: dict[str, Function]
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of a question's table.

    Attributes:
        question: the file that asks it.
        labels: what sets the row apart from the question's others, by column.
        base: the rival that the others are compared with.
        prepare: builds the rivals on a device; raises :class:`Wrong`.
    """

    question: str
    labels: dict[str, str | int]
    base: str
    prepare: Callable[[torch.device], Prepared]

    @property
    def name(self) -> str:
        return " ".join(map(str, (self.question, *self.labels.values())))


def seconds_of(function: Function, calls: int, device: torch.device) -> float:
    """Seconds of one call, the mean of ``calls``; on a GPU between two events of its stream."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def interleaved(rivals: dict[str, Function], device: torch.device, budget_s: float) -> dict[str, list[float]]:
    """Seconds a call of every rival in every round, after a warm-up of each."""
    calls = {}
    for name, function in rivals.items():
        function()
        once = min(seconds_of(function, 1, device) for _ in range(2))
        calls[name] = max(1, round(SAMPLE_S / once))
    samples = {name: [] for name in rivals}
    begin = time.perf_counter()
    for done in itertools.count(1):
        for name, function in rivals.items():
            samples[name].append(seconds_of(function, calls[name], device))
        if done == MAX_ROUNDS or (done >= MIN_ROUNDS and time.perf_counter() - begin > budget_s):
            return samples


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    p20, p50, p80 = np.percentile(samples, (20, 50, 80))
    return {"p20": p20, "p50": p50, "p80": p80, "rounds": len(samples)}


def limits(device: torch.device) -> dict[str, float]:
    """What this machine can do: bytes a second of a copy beyond all caches, and FLOPs a second of a product."""
    copy = copy_of(torch.empty(2**28 if device.type == "cuda" else 2**26, device=device))
    left, right = torch.randn(2, 4096 if device.type == "cuda" else 1024, 4096 if device.type == "cuda" else 1024)
    left, right = left.to(device), right.to(device)
    flops = 2 * left.shape[0] ** 3
    times = interleaved({"copy": copy, "product": lambda: left @ right}, device, 2.0)
    return {
        "copy_bytes_per_s": 2 * 4 * (2**28 if device.type == "cuda" else 2**26) / median(times["copy"]),
        "flops_per_s": flops / median(times["product"]),
    }


def copy_of(x: Tensor) -> Function:
    target = torch.empty_like(x)
    return lambda: target.copy_(x)


def rotating(functions: Iterable[Function]) -> Function:
    """Each of the functions in turn, so that on a GPU no call finds its arguments in a cache."""
    turn = itertools.cycle(functions)
    return lambda: next(turn)()


def graphed(build: Callable[[], Function], calls: int = 1) -> Function:
    """So many calls of what ``build`` returns as one CUDA graph: without what its launches cost the host.

    It is built on the stream that is captured, as a backward pass runs where its forward has run.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function = build()
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            function()
    return graph.replay
