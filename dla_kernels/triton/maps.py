"""What the Triton kernels share about maps: how they lie in memory, tiles of them, their moments, sums over a batch.

A program takes one sample and a block of channels and walks over its pixels, so that what is summed over H and W is
finished where it was begun: nothing is added atomically, and the order of every sum follows from the shape alone.
The tile is [channels, pixels] in either layout. One of its strides is 1, which Triton compiles in as a constant:
the same source then reads 16 bytes a thread along the pixels of NCHW and along the channels of channels_last.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.native import is_walkable
from dla_kernels.triton import tuning

#: (elements, warps) of a tile, the default first. Eight elements a thread hide the memory's latency; large maps may
#: gain by more, small ones by more programs.
SIZES = ((1024, 4), (2048, 4), (4096, 8), (512, 4))


class Map(NamedTuple):
    """A map [B, C, H, W] as the kernels take it: its first element and the strides of a sample, channel and pixel."""

    data: Tensor
    batch: int
    channel: int
    pixel: int


class Tile(NamedTuple):
    """How much of a map a program handles at a time, and with how many threads."""

    channels: int
    pixels: int
    warps: int


def is_channels_last(x: Tensor) -> bool:
    """Whether a walkable map has its channels side by side. A lone pixel has, whatever its strides say."""
    return x.shape[1] > 1 and x.stride(1) == 1 and (x.shape[2] * x.shape[3] == 1 or pixel_stride(x) > 1)


def pixel_stride(x: Tensor) -> int:
    return x.stride(3) if x.shape[3] > 1 else x.stride(2)


def walkable(x: Tensor) -> Tensor:
    """``x`` where the kernels can walk it, else a copy."""
    return x if x.numel() == 0 or is_walkable(x) else x.contiguous()


def beside(x: Tensor, first: Tensor) -> Tensor:
    """``x`` in the layout of the walkable map ``first``; a copy only where it has another one."""
    if x.numel() == 0:
        return x
    if is_channels_last(first):
        if is_walkable(x) and is_channels_last(x):
            return x
        return x.contiguous(memory_format=torch.channels_last)
    return x if is_walkable(x) and not is_channels_last(x) else x.contiguous()


def as_map(x: Tensor | None) -> Map | None:
    """A walkable map. None stays None: an argument that is not there."""
    return None if x is None else Map(x, x.stride(0), x.stride(1), pixel_stride(x))


def map_beside(x: Tensor | None, first: Tensor) -> Map | None:
    """Any map, in the layout of the walkable map ``first``."""
    return None if x is None else as_map(beside(x, first))


def dense(t: Tensor | None) -> Tensor | None:
    """Vectors and weights: small, and contiguous inside the kernels."""
    return None if t is None else t.contiguous()


def tile_of(x: Tensor, elements: int, warps: int) -> Tile:
    """A tile of up to ``elements``: long along what is adjacent in memory, 64 channels or all the pixels there are."""
    channels, pixels = triton.next_power_of_2(x.shape[1]), triton.next_power_of_2(x.shape[2] * x.shape[3])
    if is_channels_last(x):
        channels = min(channels, 64)
        return Tile(channels, min(pixels, max(1, elements // channels)), warps)
    pixels = min(pixels, elements)
    return Tile(min(channels, max(1, elements // pixels)), pixels, warps)


def walk(kernel: Callable, x: Tensor, *args, sizes: Sequence[tuple[int, int]] = SIZES, **constants) -> None:
    """Runs ``kernel`` over every sample and block of channels of ``x``."""

    def run(tile: Tile) -> None:
        programs = x.shape[0] * triton.cdiv(x.shape[1], tile.channels)
        kernel[(programs,)](*args, **constants, BLOCK_C=tile.channels, BLOCK_P=tile.pixels, num_warps=tile.warps)

    if x.numel() > 0:
        tuning.run(kernel, x, [tile_of(x, *size) for size in sizes], run)


@triton.jit
def place(program, C, BLOCK_C: tl.constexpr):
    """The sample of a program and its channels [BLOCK_C]."""
    blocks = tl.cdiv(C, BLOCK_C)
    b = program // blocks
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return b.to(tl.int64), c


@triton.jit
def load(x, b, c, p, inside, dtype: tl.constexpr):
    """A tile [channels, pixels] of a map, 0 where it is not ``inside``. The strides may reach beyond 32 bits."""
    address = x.data + b * x.batch + c.to(tl.int64)[:, None] * x.channel + p.to(tl.int64)[None, :] * x.pixel
    return tl.load(address, mask=inside, other=0.0).to(dtype)


@triton.jit
def store(x, b, c, p, inside, values):
    address = x.data + b * x.batch + c.to(tl.int64)[:, None] * x.channel + p.to(tl.int64)[None, :] * x.pixel
    tl.store(address, values.to(x.data.dtype.element_ty), mask=inside)


@triton.jit
def vector(x, c, C):
    """[channels] of a dense vector or matrix row, as a column beside a tile."""
    return tl.load(x + c, mask=c < C, other=0.0)[:, None]


@triton.jit
def add_to_moments(mean, m2, values, inside, count):
    """Takes one more value into every lane's mean and sum of squared deviations (Welford); ``count`` includes it."""
    delta = tl.where(inside, values - mean, 0.0)
    mean += delta / count
    return mean, m2 + delta * (values - mean)


@triton.jit
def lanes_together(mean, m2, HW, BLOCK_P: tl.constexpr):
    """The channels' mean and biased variance from those of the lanes [channels, pixels]."""
    # A lane was inside in every tile but perhaps the last; lanes beyond a small map never.
    count = tl.cdiv(HW - tl.arange(0, BLOCK_P), BLOCK_P)[None, :].to(mean.dtype)
    total = tl.sum(mean * count, 1) / HW
    deviation = mean - total[:, None]
    return total, tl.sum(m2 + count * deviation * deviation, 1) / HW


@triton.jit
def _moments(o, mean, var, C, HW, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    b, c = place(tl.program_id(0), C, BLOCK_C)
    A: tl.constexpr = mean.dtype.element_ty
    lane_mean = tl.zeros([BLOCK_C, BLOCK_P], A)
    lane_m2 = tl.zeros([BLOCK_C, BLOCK_P], A)
    for start in range(0, HW, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (p < HW)[None, :]
        lane_mean, lane_m2 = add_to_moments(
            lane_mean, lane_m2, load(o, b, c, p, inside, A), inside, start // BLOCK_P + 1
        )
    total, variance = lanes_together(lane_mean, lane_m2, HW, BLOCK_P)
    tl.store(mean + b * C + c, total, mask=c < C)
    if var is not None:
        tl.store(var + b * C + c, variance, mask=c < C)


class Table(NamedTuple):
    """A matrix whose rows are to be added up."""

    data: Tensor
    rows: int
    columns: int
    row: int
    column: int


@triton.jit
def _sum_rows(tables, sums, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    for i in tl.static_range(len(tables)):
        if tl.program_id(1) == i:
            t = tables[i]
            total = tl.zeros([BLOCK_R, BLOCK_N], t.data.dtype.element_ty)
            for start in range(0, t.rows, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                address = t.data + r.to(tl.int64)[:, None] * t.row + n.to(tl.int64)[None, :] * t.column
                total += tl.load(address, mask=(r < t.rows)[:, None] & (n < t.columns)[None, :], other=0.0)
            tl.store(sums[i] + n, tl.sum(total, 0), mask=n < t.columns)


def moments(o: Tensor, mean: Tensor, var: Tensor | None) -> None:
    """Each sample's and channel's mean, and its biased variance where there is a ``var``, of a walkable map."""
    walk(_moments, o, as_map(o), mean, var, o.shape[1], o.shape[2] * o.shape[3])


def sum_rows(*tables: Tensor) -> list[Tensor]:
    """The sum of each matrix over its rows, all in one launch."""
    sums = [t.new_empty(t.shape[1]) for t in tables]
    write_row_sums(tables, sums)
    return sums


def write_row_sums(tables: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
    """As :func:`sum_rows`, into dense vectors."""
    BLOCK_R, BLOCK_N = 64, 16
    grid = triton.cdiv(max(t.shape[1] for t in tables), BLOCK_N), len(tables)
    described = tuple(Table(t, *t.shape, *t.stride()) for t in tables)
    _sum_rows[grid](described, tuple(sums), BLOCK_R=BLOCK_R, BLOCK_N=BLOCK_N)
