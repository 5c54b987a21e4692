"""Which tile a kernel takes.

Without a GPU, or with ``DLA_KERNELS_AUTOTUNE=0``, it is the first of its candidates. Otherwise the candidates are timed
once for each kernel, device, dtype, layout and size class of the map, whatever the batch, and the fastest is kept in
``dla_kernels/triton-tiles.json`` of the user's cache directory. Tiles order their sums differently, so two machines
agree to the bit only without tuning.
"""

import functools
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import triton
from torch import Tensor

ENVIRONMENT = "DLA_KERNELS_AUTOTUNE"

Tile = TypeVar("Tile")
Result = TypeVar("Result")


def run(kernel: Callable, x: Tensor, candidates: Sequence[Tile], launch: Callable[[Tile], Result]) -> Result:
    """``launch(tile)`` with one of the candidates for the map ``x``. It may be launched more than once."""
    tiles = list(dict.fromkeys(candidates))  # on small maps several are the same
    if len(tiles) == 1 or not x.is_cuda or os.environ.get(ENVIRONMENT) == "0":
        return launch(tiles[0])
    key = key_of(kernel, x, tiles)
    if key not in _fastest():
        if torch.cuda.is_current_stream_capturing():  # timing synchronises
            return launch(tiles[0])
        times = [_time(functools.partial(launch, tile)) for tile in tiles]
        _fastest()[key] = times.index(min(times))
        _write()
    return launch(tiles[_fastest()[key]])


def key_of(kernel: Callable, x: Tensor, tiles: Sequence[Tile]) -> str:
    """What a choice holds for; with the candidates, as another version may have others."""
    _, channels, height, width = x.shape
    classes = triton.next_power_of_2(channels), triton.next_power_of_2(height * width)
    layout = "planes" if x.stride(3) == 1 else "rows"
    parts = (
        kernel.fn.__module__, kernel.fn.__name__, torch.cuda.get_device_name(x.device) if x.is_cuda else "cpu",
        x.dtype, layout, *classes, *map(tuple, tiles),
    )  # fmt: skip
    return " ".join(map(str, parts))


def _time(function: Callable[[], object]) -> float:
    """Milliseconds, the median of a few runs after the first, which compiles."""
    function()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
    for mark in marks:
        mark.record()
        function()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dla_kernels" / "triton-tiles.json"


@functools.cache
def _fastest() -> dict[str, int]:
    """The index of the fastest candidate by key."""
    try:
        return json.loads(_file().read_text())
    except (OSError, ValueError):  # none yet, or written by half
        return {}


def _write() -> None:
    """All choices, in one step: other processes may read or write them. A cache that cannot be written stays here."""
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=_file().parent, delete=False) as file:
            json.dump(_fastest(), file, indent=1)
        os.replace(file.name, _file())
    except OSError:
        pass
