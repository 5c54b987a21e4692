"""Which tile a kernel takes.

Without a GPU, or with ``DLA_KERNELS_AUTOTUNE=0``, it is the first of its candidates. Otherwise the candidates are timed
once for each kernel, device, dtype, layout and size class of the map, whatever the batch, and the fastest is kept in
``dla_kernels/triton-tiles.json`` of the user's cache directory. Tiles order their sums differently, so two machines
agree to the bit only without tuning.
"""

import contextlib
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
from torch import Tensor

ENVIRONMENT = "DLA_KERNELS_AUTOTUNE"

Tile = TypeVar("Tile")
Result = TypeVar("Result")


def cdiv(a: int, b: int) -> int:
    """``triton.cdiv``, which takes ten microseconds: more than many a kernel."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least that is no less than n; ``triton.next_power_of_2`` takes as long."""
    return 1 << max(0, n - 1).bit_length()


def run(
    kernel: Callable, x: Tensor, tiles: Sequence[Tile], launch: Callable[[Tile], Result], variant: int = 0
) -> Result:
    """``launch(tile)`` with one of the tiles, which differ, for the map ``x``. It may be launched more than once.

    ``variant`` tells apart what makes another tile the best one, such as how many maps the kernel reads.
    """
    if len(tiles) == 1 or not x.is_cuda or os.environ.get(ENVIRONMENT) == "0":
        return launch(tiles[0])
    key = key_of(kernel, x, tiles, variant)
    fastest = _fastest().get(key)
    if fastest not in range(len(tiles)):  # not timed yet, or the file holds anything else
        if torch.cuda.is_current_stream_capturing():  # timing synchronises
            return launch(tiles[0])
        times = [_time(functools.partial(launch, tile)) for tile in tiles]
        fastest = times.index(min(times))
        _keep(key, fastest)
    return launch(tiles[fastest])


def key_of(kernel: Callable, x: Tensor, tiles: Sequence[Tile], variant: int = 0) -> str:
    """What a choice holds for; with the candidates, as another version may have others."""
    _, channels, height, width = x.shape
    layout = "rows" if x.stride(1) == 1 and channels > 1 else "planes"
    return _key(
        kernel.fn, x.device, x.dtype, layout, power_of_2(channels), power_of_2(height * width),
        variant, tuple(map(tuple, tiles)),
    )  # fmt: skip


@functools.cache  # at every launch
def _key(function: Callable, device: torch.device, dtype: torch.dtype, *rest) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return " ".join(map(str, (function.__module__, function.__name__, name, dtype, *rest)))


def _time(function: Callable[[], object]) -> float:
    """Milliseconds, the median of a few runs after the first, which compiles."""
    function()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
    for mark in marks:
        mark.record()
        function()
    marks[-1].synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def _file() -> Path | None:
    """Where choices are kept; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dla_kernels" / "triton-tiles.json"
    except RuntimeError:
        return None


@functools.cache
def _fastest() -> dict[str, int]:
    """The index of the fastest candidate by key."""
    return _read()


def _read() -> dict[str, int]:
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError, AttributeError):  # none yet, no file at all, or one that was damaged
        return {}
    return found if isinstance(found, dict) else {}


def _keep(key: str, fastest: int) -> None:
    """Here, and with what other processes have kept meanwhile in the file, in one step: they may read it at any time.

    A file that cannot be written is no error.
    """
    _fastest()[key] = fastest
    file = _file()
    if file is None:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as whole:
            json.dump(_read() | _fastest(), whole, indent=1)
        try:
            os.replace(whole.name, file)
        except OSError:
            os.unlink(whole.name)
