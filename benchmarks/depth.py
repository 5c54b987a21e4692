"""How do time and memory grow with the blocks of a stage? DLA-B and DLA-L, beside their literal forms."""

import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dla.benchmarks import blocks, networks
from dla.benchmarks.measure import Prepared, Row

#: B, channels and image of the stage, by device.
SHAPES = {"cpu": (8, 64, 16), "cuda": (64, 256, 28)}
DEPTHS, FULL_DEPTHS = (2, 6, 12, 24, 36), (2, 4, 8, 12, 16, 24, 36)


def saved_bytes(network: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward, each storage once."""
    saved = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage()  # the storage too, or its address is used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = network(x)
    assert output.requires_grad
    return sum(s.nbytes() for s in saved.values())


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what the profiler's C++ writes past Python to the standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_bytes(function, device: torch.device) -> int:
    """The most that a call has allocated at once."""
    function()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    sizes = (e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(sizes, initial=0))


def prepare(depth, interaction, device) -> Prepared:
    torch.manual_seed(0)
    batch, channels, size = SHAPES[device.type]
    stage = blocks.build(channels, interaction, depth).to(device)
    x = torch.randn(batch, channels, size, size, device=device)
    networks.check(stage, x[:2], "train step")
    forms = {
        "fused": stage,
        "literal": networks.literal_form(stage),
        "plain": blocks.build(channels, None, depth).to(device),
    }
    steps = {name: networks.train_step(form, x) for name, form in forms.items()}
    facts = {f"saved, {name}": saved_bytes(form, x) for name, form in forms.items()}
    facts |= {f"peak, {name}": peak_bytes(step, device) for name, step in steps.items()}
    return Prepared(steps, facts)


def rows(device: torch.device, full: bool = False) -> Iterator[Row]:
    for interaction in ("dla_b", "dla_l"):
        for depth in FULL_DEPTHS if full else DEPTHS:
            labels = {"interaction": interaction, "blocks": depth}
            yield Row("depth", labels, "literal", functools.partial(prepare, depth, interaction))
