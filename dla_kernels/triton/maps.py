"""What the Triton kernels share about maps: how they lie in memory, tiles of them, their moments, sums over a batch.

A program takes one sample, a block of channels and a part of the pixels, and walks over them. Where the samples alone
fill a GPU the part is the whole map, so that what is summed over H and W is finished where it was begun; else one more
launch joins the parts. Nothing is added atomically, and the order of every sum follows from the shape alone.
The tile is [channels, pixels] in either layout. One of its strides is 1, which Triton compiles in as a constant:
the same source then reads 16 bytes a thread along the pixels of NCHW and along the channels of channels_last.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.native import is_walkable
from dla_kernels.triton import interpreting, tuning
from dla_kernels.triton.tuning import cdiv, power_of_2

#: (elements of 16 bits, warps) of a tile, the default first, of maps that are read in vectors and of others. Eight
#: elements a thread hide the memory's latency; large maps may gain by more, small ones by more programs. Where every
#: element has an address of its own, more than eight spill.
SIZES = ((1024, 4), (2048, 4), (4096, 8), (512, 4)), ((1024, 4), (512, 4))

#: The one of float64: four elements a thread, with one or two the compiler puts a register on the stack.
FLOAT64 = ((2048, 4),)

#: Programs that fill a large GPU: eight of four warps on each of some 130 multiprocessors. With fewer samples and
#: channels the pixels are parted, but not into less than :data:`PART` elements, which take as long as another launch.
FILL, PART = 1024, 8192


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


def in_vectors(x: Tensor) -> bool:
    """Whether a walkable map is read in vectors: Triton has to know that what is adjacent begins at multiples of 16."""
    return all(stride % 16 == 0 for stride in as_map(x)[1:] if stride != 1)


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


def tile_of(channels: int, height: int, width: int, channels_last: bool, elements: int, warps: int) -> Tile:
    """A tile of up to ``elements``: long along what is adjacent in memory, 64 channels or all the pixels there are."""
    channels, pixels = power_of_2(channels), power_of_2(height * width)
    if channels_last:
        channels = min(channels, 64)
        return Tile(channels, min(pixels, max(1, elements // channels)), warps)
    pixels = min(pixels, elements)
    return Tile(min(channels, max(1, elements // pixels)), pixels, warps)


def tiles_of(
    x: Tensor, sizes: tuple[tuple[int, int], ...] | None = None, of: Callable[..., Tile] = tile_of
) -> list[Tile]:
    """The tiles of a map for which sizes there are, :data:`SIZES` where none are given, the default first."""
    itemsize = x.dtype.itemsize
    sizes = sizes or (FLOAT64 if itemsize == 8 else SIZES[not in_vectors(x)])
    if interpreting() or (of is not tile_of and itemsize < 8):  # one that goes down rows keeps sums, not what it reads
        itemsize = 2
    return _tiles(of, x.shape[1:], is_channels_last(x), itemsize, sizes)


@functools.lru_cache(1024)  # at every launch
def _tiles(of, shape: torch.Size, channels_last: bool, itemsize: int, sizes) -> list[Tile]:
    # Sizes are those of 16 bits. A thread has as many bytes of other maps, as it keeps its registers, or one element.
    if itemsize == 8:
        sizes = sizes[:1]  # float64 is there to compare with: not tuned
    sizes = [(max(2 * elements // itemsize, 32 * warps), warps) for elements, warps in sizes]
    tiles = [of(*shape, channels_last, *size) for size in sizes]
    return list(dict.fromkeys(tiles))  # on small maps several are the same


class Area(NamedTuple):
    """What a kernel walks over: channels, the pixels of a sample as rows, and what a program takes of them.

    A kernel that looks at no neighbours has all the pixels in one row.
    """

    channels: int
    height: int
    width: int
    rows: int
    columns: int

    @property
    def parts(self) -> int:
        return cdiv(self.height, self.rows) * cdiv(self.width, self.columns)


def area_of(x: Tensor, block: int | None = None) -> Area:
    """What programs take of a map; ``block`` is how many channels they have if they go down its rows."""
    batch, channels, height, width = x.shape
    pixels, in_rows = height * width, block is not None
    block = min(channels, block or tiles_of(x)[0].channels)
    programs = batch * cdiv(channels, max(1, block))
    parts = max(1, min(FILL // max(1, programs), pixels * block // PART))
    if not in_rows:
        return Area(channels, 1, pixels, 1, _evenly(pixels, parts))
    # A part reads the rows beside it too.
    row_parts = max(1, min(parts, height // 8))
    return Area(channels, height, width, cdiv(height, row_parts), _evenly(width, parts // row_parts))


def _evenly(pixels: int, parts: int) -> int:
    """How many pixels a part has: whole vectors, whatever the layout."""
    return 16 * cdiv(pixels, 16 * parts)


def walk(
    kernel: Callable,
    x: Tensor,
    area: Area,
    *args,
    sizes: tuple[tuple[int, int], ...] | None = None,
    of: Callable[..., Tile] = tile_of,
    variant: int = 0,
    **constants,
) -> None:
    """Runs ``kernel`` over every sample, block of channels and part of ``x``; ``variant`` as in :mod:`.tuning`."""

    def run(tile: Tile) -> None:
        programs = x.shape[0] * cdiv(x.shape[1], tile.channels) * area.parts
        kernel[(programs,)](*args, area, **constants, BLOCK_C=tile.channels, BLOCK_P=tile.pixels, num_warps=tile.warps)

    if x.numel() > 0:
        tuning.run(kernel, x, tiles_of(x, sizes, of), run, variant)


@triton.jit
def place(area, BLOCK_C: tl.constexpr):
    """What a program does: its sample, channels [BLOCK_C], the first row and column, and where it leaves sums [C]."""
    blocks = tl.cdiv(area.channels, BLOCK_C)
    across = tl.cdiv(area.width, area.columns)
    parts = tl.cdiv(area.height, area.rows) * across
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(0) // blocks % parts
    b = tl.program_id(0) // blocks // parts
    batch = tl.num_programs(0) // blocks // parts
    at = (part * batch + b).to(tl.int64) * area.channels
    return b.to(tl.int64), c, part // across * area.rows, part % across * area.columns, at


@triton.jit
def inside_of(area, left, c, p):
    """Which channels and columns of a tile belong to the program. Both limits are known multiples of 16, their least
    would not be."""
    return (c < area.channels)[:, None] & ((p < area.width) & (p < left + area.columns))[None, :]


@triton.jit
def everywhere(i, like):
    """A scalar in every element of a mask like this one, to be compared there: a comparison of scalars makes no mask in
    Triton 3.9's interpreter."""
    return tl.full(like.shape, i, tl.int32)


@triton.jit
def load(x, b, c, first, inside, dtype: tl.constexpr):
    """A tile [channels, pixels] of a map, from the pixel ``first`` on, 0 where it is not ``inside``."""
    return tl.load(address(x, b, c, first, inside.shape[1]), mask=inside, other=0.0).to(dtype)


@triton.jit
def store(x, b, c, first, inside, values):
    tl.store(address(x, b, c, first, inside.shape[1]), values.to(x.data.dtype.element_ty), mask=inside)


@triton.jit
def address(x, b, c, first, BLOCK_P: tl.constexpr):
    """The strides may reach beyond 32 bits. First comes what the tile has in common; the rest is the same in a loop."""
    origin = x.data + (b * x.batch + tl.cast(first, tl.int64) * x.pixel)
    return origin + (c.to(tl.int64)[:, None] * x.channel + tl.arange(0, BLOCK_P).to(tl.int64)[None, :] * x.pixel)


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
def lanes_together(mean, m2, count, n, total):
    """The lanes' moments [channels, pixels], of ``count`` values each, as a part's share of the channels' moments.

    The part has n of ``total`` values. Shares of the mean add up to it; see :func:`_join_moments` for the variance.
    """
    whole = tl.sum(mean * count, 1)
    deviation = mean - (whole / n)[:, None]
    return whole / total, tl.sum(m2 + count * deviation * deviation, 1) / total


@triton.jit
def counts(rows, columns, BLOCK_P: tl.constexpr, dtype: tl.constexpr):
    """How many values each lane has seen, as a row beside a tile: the last tile of a row may not reach it."""
    return (rows * tl.cdiv(columns - tl.arange(0, BLOCK_P), BLOCK_P))[None, :].to(dtype)


@triton.jit
def extent(area, top, left):
    """Rows and columns of a program's part."""
    return tl.minimum(area.rows, area.height - top), tl.minimum(area.columns, area.width - left)


@triton.jit
def _moments(o, mean, var, area, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    b, c, top, left, at = place(area, BLOCK_C)
    A: tl.constexpr = mean.dtype.element_ty
    lane_mean = tl.zeros([BLOCK_C, BLOCK_P], A)
    lane_m2 = tl.zeros([BLOCK_C, BLOCK_P], A)
    _, columns = extent(area, top, left)
    for start in range(left, left + columns, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = inside_of(area, left, c, p)
        lane_mean, lane_m2 = add_to_moments(
            lane_mean, lane_m2, load(o, b, c, start, inside, A), inside, (start - left) // BLOCK_P + 1
        )
    count = counts(1, columns, BLOCK_P, A)
    share, variance = lanes_together(lane_mean, lane_m2, count, columns, area.width)
    tl.store(mean + at + c, share, mask=c < area.channels)
    if var is not None:
        tl.store(var + at + c, variance, mask=c < area.channels)


@triton.jit
def _join_moments(mean_parts, var_parts, mean, var, area, N, BLOCK: tl.constexpr):
    """Chan's formula over the parts, [parts, N] -> [N]."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    across = tl.cdiv(area.width, area.columns)
    parts = tl.cdiv(area.height, area.rows) * across
    total = tl.zeros([BLOCK], mean.dtype.element_ty)
    for part in range(parts):
        total += tl.load(mean_parts + tl.cast(part, tl.int64) * N + n, mask=n < N, other=0.0)
    variance = tl.zeros([BLOCK], mean.dtype.element_ty)
    for part in range(parts):
        at = tl.cast(part, tl.int64) * N + n
        rows, columns = extent(area, part // across * area.rows, part % across * area.columns)
        share = (rows * columns).to(total.dtype) / (area.height * area.width)
        deviation = tl.load(mean_parts + at, mask=n < N, other=0.0) / share - total
        variance += tl.load(var_parts + at, mask=n < N, other=0.0) + share * deviation * deviation
    tl.store(mean + n, total, mask=n < N)
    tl.store(var + n, variance, mask=n < N)


def parts_like(vector: Tensor, area: Area) -> Tensor:
    """[parts, B, C] for what is summed over the pixels into ``vector`` [B, C]; itself where there is one part."""
    return vector[None] if area.parts == 1 else vector.new_empty(area.parts, *vector.shape)


def join_moments(mean_parts: Tensor, var_parts: Tensor, mean: Tensor, var: Tensor, area: Area) -> None:
    """The channels' mean and biased variance [B, C] from those of the parts."""
    if area.parts > 1 and mean.numel() > 0:
        BLOCK = 128
        _join_moments[(cdiv(mean.numel(), BLOCK),)](
            mean_parts, var_parts, mean, var, area, mean.numel(), BLOCK=BLOCK
        )  # fmt: skip


def join_sums(parts: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
    """The sums [B, C] from those of the parts, all in one launch."""
    pairs = [(p.flatten(1), s.view(-1)) for p, s in zip(parts, sums, strict=True) if p.shape[0] > 1 and s.numel() > 0]
    if pairs:
        write_row_sums(*zip(*pairs, strict=True))


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
    area = area_of(o)
    mean_parts, var_parts = parts_like(mean, area), None if var is None else parts_like(var, area)
    walk(_moments, o, area, as_map(o), mean_parts, var_parts)
    if var is None:
        join_sums([mean_parts], [mean])
    else:
        join_moments(mean_parts, var_parts, mean, var, area)


def sum_rows(*tables: Tensor) -> list[Tensor]:
    """The sum of each matrix over its rows, all in one launch."""
    sums = [t.new_empty(t.shape[1]) for t in tables]
    write_row_sums(tables, sums)
    return sums


def write_row_sums(tables: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
    """As :func:`sum_rows`, into dense vectors."""
    BLOCK_R, BLOCK_N = 64, 16
    grid = cdiv(max(t.shape[1] for t in tables), BLOCK_N), len(tables)
    described = tuple(Table(t, *t.shape, *t.stride()) for t in tables)
    _sum_rows[grid](described, tuple(sums), BLOCK_R=BLOCK_R, BLOCK_N=BLOCK_N)
