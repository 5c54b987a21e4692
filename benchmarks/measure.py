"""How everything is measured: rivals in turn, A B A B, so that a machine that drifts does so for all of them."""

import collections
import functools
import itertools
import math
import mmap
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from torch import Tensor

Function = Callable[[], object]

#: Rounds of a row, however long one takes, and as many as fit into the budget.
MIN_ROUNDS, MAX_ROUNDS = 5, 100
#: A sample is as many calls as take this long: little in it is what the rival before left in the caches, or a moment's
#: other work on the machine.
SAMPLE_S = 4e-2
#: Rounds of a warm-up, and bytes of new memory that a settled one takes at most.
MAX_WARM_UP, NEW_MEMORY = 12, 2**20
#: The calls of an op go round sets of arguments of so many bytes together, more than caches hold, but at most so many.
BEYOND_CACHES, MAX_SETS = 2**28, 64
#: Bytes of the copies and side of the products that the limits are taken from.
LARGE = {"cpu": (2**28, 1024), "cuda": (2**30, 4096)}
#: The rival in every row that tells which machine it met: a copy beyond all caches.
MACHINE = "machine"


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
        processes: in how many processes of its own it is measured on a CPU, the results taken together; 0 in the run's.
            How fast a network is hangs on where in memory its maps come to lie, which is what all before it have left
            of a heap, and on which pages the system hands out.
    """

    question: str
    labels: dict[str, str | int]
    base: str
    prepare: Callable[[torch.device], Prepared]
    processes: int = 0

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


def interleaved(
    rivals: dict[str, Function], device: torch.device, budget_s: float, processes: int = 1
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds a call of every rival in every round, after a warm-up, and why some could not run.

    Of the rounds, those that fall to one of so many processes.
    """
    once, failed = warm_up(rivals, device)
    calls = {name: max(1, round(SAMPLE_S / seconds)) for name, seconds in once.items()}
    samples = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in itertools.count(1):
        for name, values in samples.items():
            values.append(seconds_of(rivals[name], calls[name], device))
        enough = done * processes >= MIN_ROUNDS and (time.perf_counter() - begin) * processes > budget_s
        if enough or done == MAX_ROUNDS:
            return samples, failed


def warm_up(rivals: dict[str, Function], device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of a call of each at best, in rounds that go on until two in a row took no new memory from the system.

    Memory new to the process costs several writes, and a heap that rivals share grows for some rounds before each finds
    its blocks again. The first rival must run; one of the others that fails (``torch.compile`` where there is no
    compiler) is left out, and why is the second result.
    """
    once, failed, settled = {}, {}, 0
    first, *_ = rivals
    for _ in range(MAX_WARM_UP):
        before = new_memory()
        for name, function in rivals.items():
            if name in failed:
                continue
            try:
                once[name] = min(once.get(name, math.inf), seconds_of(function, 1, device))
            except Exception as error:
                if name == first:
                    raise
                failed[name] = reason(error)
                once.pop(name, None)
        settled = settled + 1 if new_memory() - before <= NEW_MEMORY else 0
        if settled == 2:
            break
    return once, failed


def new_memory() -> int:
    """Bytes that the system has handed to this process, page by page, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize()


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    p20, p50, p80 = np.percentile(samples, (20, 50, 80))
    return {"p20": p20, "p50": p50, "p80": p80, "rounds": len(samples)}


def over_ours(samples: dict[str, list[float]]) -> dict[str, float]:
    """Each rival's time over that of the first: the median of the rounds' ratios.

    Both of a round meet the same machine, so what drifts from round to round is in neither; in the ratio of two medians
    it is.
    """
    ours, *_ = samples.values()
    return {name: float(np.median(np.divide(values, ours))) for name, values in samples.items()}


def limits(device: torch.device) -> dict[str, float]:
    """What this machine can do: bytes a second of a copy and of a sum beyond all caches, FLOPs a second of a product.

    On a CPU also the bytes a second of a copy into memory that the system hands out page by page.
    """
    large, side = LARGE[device.type]
    source = torch.ones(large // 4, device=device)
    left, right = torch.randn(2, side, side).to(device)
    rivals = {"copy": large_copy(device), "read": source.sum, "product": lambda: left @ right}
    if device.type == "cpu" and hasattr(mmap, "MAP_PRIVATE"):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        rivals["fresh copy"] = lambda: torch.frombuffer(mmap.mmap(-1, large, flags), dtype=torch.float32).copy_(source)
    times = {name: median(s) for name, s in interleaved(rivals, device, 2.0)[0].items()}
    found = {
        "copy_bytes_per_s": 2 * large / times["copy"],
        "read_bytes_per_s": large / times["read"],
        "flops_per_s": 2 * side**3 / times["product"],
    }
    return found | ({"fresh_copy_bytes_per_s": 2 * large / times["fresh copy"]} if "fresh copy" in times else {})


@functools.lru_cache(1)
def large_copy(device: torch.device) -> Function:
    source = torch.ones(LARGE[device.type][0] // 4, device=device)
    return functools.partial(torch.ones_like(source).copy_, source)


def read_and_copy(nbytes: int, device: torch.device) -> dict[str, Function]:
    """What any op on maps of this size can at best do: sum a map, and copy one, from memory and to memory."""

    def maps() -> list[Tensor]:
        return [torch.ones(max(1, nbytes // 4), device=device) for _ in range(sets_of(nbytes))]

    sources, targets = maps(), maps()
    copies = [functools.partial(target.copy_, source) for source, target in zip(sources, targets, strict=True)]
    return {"read": rotating([x.sum for x in sources]), "copy": rotating(copies)}


def sets_of(nbytes: int) -> int:
    """How many sets of arguments a call that moves so many bytes goes round, so that none is still in a cache."""
    return min(MAX_SETS, max(1, math.ceil(BEYOND_CACHES / nbytes))) if nbytes else 1


def rotating(functions: Sequence[Function]) -> Function:
    """Each of the functions in turn; what the others returned is held, so that a result goes to other memory too."""
    turn, held = itertools.cycle(functions), collections.deque(maxlen=len(functions) - 1)

    def call() -> object:
        result = next(turn)()
        held.append(result)
        return result

    return call


def at_first_call(make: Callable[[], Function]) -> Function:
    """What ``make`` gives, made when it is first called: what fails then fails as this rival's warm-up."""
    made = functools.cache(make)
    return lambda: made()()


def graphed(make: Callable[[], Function], calls: int = 1) -> Function:
    """So many calls of what ``make`` gives as one CUDA graph: without what its launches cost the host.

    It is made on the stream that is captured, as a backward runs on the stream of its forward.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function = make()
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            function()

    def replay(tensors_of=function) -> None:  # the graph reads them, but does not keep them
        graph.replay()

    return replay
