"""``layer_attention`` in Triton.

A kernel takes its maps as a tuple, so that the loop over layers is unrolled and all loads of a tile are under way at
once. A tuple is filled up to a power of two, so that few kernels are compiled, and holds at most :data:`LAYERS` maps;
the sums over more of them are handed from launch to launch in the state's dtype.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.common import accumulate_dtype
from dla_kernels.native import empty_map_like
from dla_kernels.ops.light_update.triton import value_map, value_map_backward
from dla_kernels.triton import tuning
from dla_kernels.triton.batch_norm import means, normalisation, relu, through_norm
from dla_kernels.triton.maps import (
    Area,
    Map,
    Tile,
    add_to_moments,
    area_of,
    as_map,
    counts,
    dense,
    everywhere,
    extent,
    in_vectors,
    inside_of,
    join_moments,
    lanes_together,
    load,
    map_beside,
    parts_like,
    place,
    store,
    sum_rows,
    tiles_of,
    walk,
    walkable,
)
from dla_kernels.triton.tuning import cdiv, power_of_2

#: The most maps that a launch reads: the loads of more, and their weights, do not fit into the registers.
LAYERS = 16

#: (elements, warps) of a forward tile, the default first, of maps that are read in vectors and of others, where every
#: element of sixteen maps has an address and a register of its own. More elements than here spill.
FORWARD_SIZES = ((1024, 4), (512, 4)), ((256, 4), (512, 8))

#: The same of a backward tile. Each leaves its products with every map, which are read again: large ones keep that to a
#: few percent of the maps' own bytes.
BACKWARD_SIZES = ((4096, 8), (2048, 4), (1024, 4)), ((1024, 8), (512, 4))


@triton.jit
def scores(q, k, b, t, T, i, C, inside, HEAD_DIM: tl.constexpr):
    """q k^T / sqrt(D) of a block of layers t and the head of the channels i."""
    product = tl.load(q + b * C + i, mask=inside, other=0.0)[None, :] * layer_rows(k, b, t, T, i, C, inside)
    score = tl.sum(product, 1)
    return score / tl.sqrt(tl.full((), HEAD_DIM, score.dtype))


@triton.jit
def layer_rows(x, b, t, T, i, C, inside):
    """[layers, channels of a head] of x [B, T, C]."""
    return tl.load(
        x + (b * T + t)[:, None] * C + i[None, :], mask=(t < T)[:, None] & inside[None, :], other=0.0
    )  # fmt: skip


@triton.jit
def softmax_scale(q, k, b, T, i, C, inside, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr):
    """The largest score over all layers, and the sum of exponentials relative to it."""
    largest = tl.full([BLOCK_T], float("-inf"), q.dtype.element_ty)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        score = scores(q, k, b, t, T, i, C, inside, HEAD_DIM)
        largest = tl.maximum(largest, tl.where(t < T, score, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    top = tl.max(largest, 0)
    total = tl.zeros([BLOCK_T], q.dtype.element_ty)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        total += tl.where(t < T, tl.exp(scores(q, k, b, t, T, i, C, inside, HEAD_DIM) - top), 0.0)
    return top, tl.sum(total, 0)


@triton.jit
def _weights(
    q, k, gates, weights, C, T, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The softmax over the layers times their gates; a program for each sample and head."""
    heads = C // HEAD_DIM
    b = (tl.program_id(0) // heads).to(tl.int64)
    j = tl.arange(0, BLOCK_D)
    i = tl.program_id(0) % heads * HEAD_DIM + j
    inside = j < HEAD_DIM
    top, total = softmax_scale(q, k, b, T, i, C, inside, HEAD_DIM, BLOCK_T)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        a = tl.exp(scores(q, k, b, t, T, i, C, inside, HEAD_DIM) - top) / total
        value = a[:, None] * layer_rows(gates, b, t, T, i, C, inside)
        tl.store(
            weights + (b * T + t)[:, None] * C + i[None, :], value, mask=(t < T)[:, None] & inside[None, :]
        )  # fmt: skip


@triton.jit
def _weights_backward(
    q, k, gates, grad_weights, grad_q, grad_k, grad_gates, C, T, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    heads = C // HEAD_DIM
    b = (tl.program_id(0) // heads).to(tl.int64)
    j = tl.arange(0, BLOCK_D)
    i = tl.program_id(0) % heads * HEAD_DIM + j
    inside = j < HEAD_DIM
    top, total = softmax_scale(q, k, b, T, i, C, inside, HEAD_DIM, BLOCK_T)
    # The softmax takes out the mean of the gradient of a, weighted by a.
    weighted = tl.zeros([BLOCK_T], q.dtype.element_ty)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        a = tl.exp(scores(q, k, b, t, T, i, C, inside, HEAD_DIM) - top) / total
        grad = layer_rows(grad_weights, b, t, T, i, C, inside)
        grad_a = tl.sum(grad * layer_rows(gates, b, t, T, i, C, inside), 1)
        weighted += tl.where(t < T, a * grad_a, 0.0)
        tl.store(
            grad_gates + (b * T + t)[:, None] * C + i[None, :], grad * a[:, None],
            mask=(t < T)[:, None] & inside[None, :],
        )  # fmt: skip
    mean = tl.sum(weighted, 0)
    of_q = tl.zeros([BLOCK_D], q.dtype.element_ty)
    query = tl.load(q + b * C + i, mask=inside, other=0.0)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        a = tl.exp(scores(q, k, b, t, T, i, C, inside, HEAD_DIM) - top) / total
        grad = layer_rows(grad_weights, b, t, T, i, C, inside)
        grad_a = tl.sum(grad * layer_rows(gates, b, t, T, i, C, inside), 1)
        grad_score = tl.where(t < T, a * (grad_a - mean), 0.0) / tl.sqrt(tl.full((), HEAD_DIM, a.dtype))
        of_q += tl.sum(grad_score[:, None] * layer_rows(k, b, t, T, i, C, inside), 0)
        tl.store(
            grad_k + (b * T + t)[:, None] * C + i[None, :], grad_score[:, None] * query[None, :],
            mask=(t < T)[:, None] & inside[None, :],
        )  # fmt: skip
    tl.store(grad_q + b * C + i, of_q, mask=inside)


@triton.jit
def layer_weight(weights, m, count, first, T, b, c, C):
    """[channels] of the weights [B, T, C] of map m of a launch, as a column; 0 where the map only fills the tuple."""
    return tl.load(weights + (b * T + first + m) * C + c, mask=c < tl.where(m < count, C, 0), other=0.0)[:, None]


@triton.jit
def weighted_sum(total, maps, weights, count, first, T, b, c, start, C, inside, A: tl.constexpr):
    """total + the first ``count`` of the maps, which are those from ``first`` on of T, times their weights."""
    for m in tl.static_range(len(maps)):
        there = inside & (everywhere(m, inside) < count)
        total += layer_weight(weights, m, count, first, T, b, c, C) * load(maps[m], b, c, start, there, A)
    return total


@triton.jit
def _forward(
    maps, weights, count, first, T, before, after, o, o_mean, o_var, x, norm_mean, norm_var, weight, bias, out, area,
    EPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """o and its moments, or ``out``; where there is an ``after``, only the sum so far."""
    b, c, top, left, at = place(area, BLOCK_C)
    C = area.channels
    _, columns = extent(area, top, left)
    A: tl.constexpr = weights.dtype.element_ty
    mean = tl.zeros([BLOCK_C, BLOCK_P], A)
    m2 = tl.zeros([BLOCK_C, BLOCK_P], A)
    if out is not None:
        center, _, scale, shift = normalisation(norm_mean, norm_var, weight, bias, c, C, EPS)
    for start in range(left, left + columns, BLOCK_P):
        inside = inside_of(area, left, c, start + tl.arange(0, BLOCK_P))
        total = tl.zeros([BLOCK_C, BLOCK_P], A)
        if before is not None:
            total = load(before, b, c, start, inside, A)
        total = weighted_sum(total, maps, weights, count, first, T, b, c, start, C, inside, A)
        if after is not None:
            store(after, b, c, start, inside, total)
        elif out is not None:
            value = load(x, b, c, start, inside, A) + relu((total - center) * scale + shift)
            store(out, b, c, start, inside, value)
        else:
            store(o, b, c, start, inside, total)
            mean, m2 = add_to_moments(mean, m2, total, inside, (start - left) // BLOCK_P + 1)
    if o_mean is not None:
        count = counts(1, columns, BLOCK_P, A)
        mean_of_o, var_of_o = lanes_together(mean, m2, count, columns, area.width)
        tl.store(o_mean + at + c, mean_of_o, mask=c < C)
        tl.store(o_var + at + c, var_of_o, mask=c < C)


@triton.jit
def _backward(
    grad_out, o, mean, var, weight, bias, sum_weight, sum_bias, keep, values_per_channel, values, weights, parts,
    value_count, later, later_weights, later_count, first, T, later_T, before, after, grad_o, grad_value, area,
    EPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One tile: D, its products with the values, and the gradient of the last value."""
    b, c, _, left, at = place(area, BLOCK_C)
    C = area.channels
    A: tl.constexpr = mean.dtype.element_ty
    inside = inside_of(area, left, c, left + tl.arange(0, BLOCK_P))
    center, inverse, scale, shift = normalisation(mean, var, weight, bias, c, C, EPS)
    back = means(sum_weight, sum_bias, values_per_channel, c, C)
    deviation = load(o, b, c, left, inside, A) - center
    grad = load(grad_out, b, c, left, inside, A)
    if keep is not None:
        grad *= tl.load(keep + b)
    grad = tl.where(deviation * scale + shift <= 0, 0.0, grad)
    d = tl.where(inside, through_norm(grad, deviation, inverse, scale, back), 0.0)
    if grad_o is not None:
        store(grad_o, b, c, left, inside, d)
    for m in tl.static_range(len(values)):
        product = tl.sum(d * load(values[m], b, c, left, inside & (everywhere(m, inside) < value_count), A), 1)
        tl.store(parts + at * T + (first + m) * C + c, product, mask=(c < C) & (everywhere(m, c) < value_count))
    if grad_value is not None:
        if before is None:
            total = tl.load(weights + (b * T + T - 1) * C + c, mask=c < C, other=0.0)[:, None] * d
        else:
            total = load(before, b, c, left, inside, A)
        total = weighted_sum(total, later, later_weights, later_count, first, later_T, b, c, left, C, inside, A)
        store(grad_value if after is None else after, b, c, left, inside, total)


def _launch_weights(kernel, q: Tensor, T: int, head_dim: int, *args, **constants) -> None:
    batch, channels = q.shape
    block = power_of_2(head_dim)
    if batch > 0:
        kernel[(batch * (channels // head_dim),)](
            *args, **constants, HEAD_DIM=head_dim, BLOCK_D=block,
            BLOCK_T=max(1, min(16, power_of_2(T), 4096 // block)), num_warps=1 if block <= 64 else 4,
        )  # fmt: skip


def attention_weights(q: Tensor, k: Tensor, gates: Tensor, head_dim: int) -> Tensor:
    """[B, T, C] the softmax over the layers times their gates."""
    T = k.shape[1]
    weights = torch.empty_like(gates)
    _launch_weights(_weights, q, T, head_dim, q, k, gates, weights, q.shape[1], T)
    return weights


def chunks(maps: Sequence[Tensor], first: Tensor) -> list[tuple[tuple[Map, ...], int]]:
    """The maps of every launch, filled up to a power of two, and how many they are."""
    described = [map_beside(m, first) for m in maps]
    pieces = [described[i : i + LAYERS] for i in range(0, len(described), LAYERS)]
    return [((*piece, *piece[:1] * (power_of_2(len(piece)) - len(piece))), len(piece)) for piece in pieces]


def _run_forward(q, k, values, gates, first, head_dim, *, o=None, moments=(None, None), x=None, norm=(None,) * 4,
                 eps=None, out=None) -> None:  # fmt: skip
    q, k, gates = dense(q), dense(k), dense(gates)
    weights = attention_weights(q, k, gates, head_dim)
    pieces = chunks(values, first)
    sums = _sums_between(first, len(pieces))
    area = area_of(first)
    moment_parts = tuple(None if m is None else parts_like(m, area) for m in moments)
    for i, (maps, count) in enumerate(pieces):
        last = i == len(pieces) - 1
        walk(
            _forward, first, area, maps, weights, count, i * LAYERS, len(values), sums[i], sums[i + 1],
            as_map(o) if last else None, *(moment_parts if last else (None, None)), as_map(x), *map(dense, norm),
            as_map(out) if last else None, sizes=FORWARD_SIZES[not in_vectors(first)],
            variant=len(maps), EPS=eps,
        )  # fmt: skip
    if o is not None:
        join_moments(*moment_parts, *moments, area)


def _sums_between(like: Tensor, launches: int) -> list[Map | None]:
    """What every launch begins with and ends with; none before the first and after the last."""
    if launches <= 1:
        return [None, None]
    between = as_map(torch.empty_like(like, dtype=accumulate_dtype(like)))
    return [None, *[between] * (launches - 1), None]


def forward(
    features: Tensor,  # [B, T, C]
    gates: Tensor,  # [B, T, C]
    query_weight: Tensor,  # [1, 1, K]
    key_weights: Tensor,  # [T or 1, 1, K]
    x: Tensor,  # [B, C, H, W]
    value_weight: Tensor,  # [C, 1, 3, 3]
    prior: Sequence[Tensor],  # T - 1 of [B, C, H, W]
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k = project(features, gates, query_weight, key_weights)
    value, pooled = value_map(x, value_weight)
    o, mean, var = empty_map_like(value), q.new_empty(q.shape), q.new_empty(q.shape)
    _run_forward(q, k, [*prior, value], gates, value, head_dim, o=o, moments=(mean, var))
    return o, mean, var, value, pooled, k[:, -1].clone(), q, k


def folded(
    features: Tensor,  # [B, T, C]
    gates: Tensor,  # [B, T, C]
    query_weight: Tensor,  # [1, 1, K]
    key_weights: Tensor,  # [T or 1, 1, K]
    x: Tensor,  # [B, C, H, W]
    value_weight: Tensor,  # [C, 1, 3, 3]
    prior: Sequence[Tensor],  # T - 1 of [B, C, H, W]
    mean: Tensor,  # [C]
    var: Tensor,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = walkable(x)
    q, k = project(features, gates, query_weight, key_weights)
    value, pooled = value_map(x, value_weight)
    out = empty_map_like(x)
    _run_forward(
        q, k, [*prior, value], gates, x, head_dim, x=x, norm=(mean, var, weight, bias), eps=eps, out=out
    )  # fmt: skip
    return out, value, pooled, k[:, -1].clone()


def backward(
    grad_out: Tensor,  # [B, C, H, W]
    grad_read: Tensor | None,  # [B, C, H, W]
    grad_pooled: Tensor | None,  # [B, C]
    grad_key: Tensor | None,  # [B, C]
    o: Tensor,  # [B, C, H, W]
    mean: Tensor,  # [C]
    var: Tensor,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    sum_weight: Tensor | None,  # [C]
    sum_bias: Tensor | None,  # [C]
    keep: Tensor | None,  # [B]
    eps: float,
    count: int,
    q: Tensor,  # [B, C]
    k: Tensor,  # [B, T, C]
    features: Tensor,  # [B, T, C]
    gates: Tensor,  # [B, T, C]
    query_weight: Tensor,  # [1, 1, K]
    key_weights: Tensor,  # [T or 1, 1, K]
    x: Tensor,  # [B, C, H, W]
    value_weight: Tensor,  # [C, 1, 3, 3]
    values: Sequence[Tensor],  # T of [B, C, H, W]
    later_grads: Sequence[Tensor],  # each [B, C, H, W]
    later_weights: Sequence[Tensor],  # each [B, its T, C]
    head_dim: int,
    need_x: bool,
    need_value: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    o, q, k, gates = walkable(o), dense(q), dense(k), dense(gates)
    batch, T, channels = k.shape
    weights = attention_weights(q, k, gates, head_dim)
    grad_o, grad_value = empty_map_like(o), empty_map_like(o) if need_value else None
    later_grads = later_grads if need_value else ()
    of_last = torch.stack([w[:, T - 1] for w in later_weights], 1) if later_grads else None
    pieces, later = chunks(values, o), chunks(later_grads, o)
    launches = max(len(pieces), len(later))
    sums = _sums_between(o, launches)
    vectors = tuple(map(dense, (mean, var, weight, bias, sum_weight, sum_bias, keep)))
    maps = map_beside(grad_out, o), as_map(o)

    def run(tile: Tile) -> Tensor:
        area = Area(channels, 1, o.shape[2] * o.shape[3], 1, tile.pixels)
        parts = q.new_empty(area.parts, batch * T * channels)
        programs = batch * cdiv(channels, tile.channels) * area.parts
        for i in range(launches):
            some, number = pieces[i] if i < len(pieces) else ((), 0)
            more, later_number = later[i] if i < len(later) else ((), 0)
            _backward[(programs,)](
                *maps, *vectors, count, some, weights, parts, number, more, of_last, later_number, i * LAYERS, T,
                len(later_grads), sums[i], sums[i + 1], None if i else as_map(grad_o), as_map(grad_value), area,
                EPS=eps, BLOCK_C=tile.channels, BLOCK_P=tile.pixels, num_warps=tile.warps,
            )  # fmt: skip
        return parts

    of_q, of_k, of_gates = torch.empty_like(q), torch.empty_like(k), torch.empty_like(gates)
    if o.numel() > 0:
        read = power_of_2(T + len(later_grads))
        parts = tuning.run(_backward, o, tiles_of(o, BACKWARD_SIZES[not in_vectors(o)]), run, read)
        grad_weights = parts[0] if parts.shape[0] == 1 else sum_rows(parts)[0]
        _launch_weights(
            _weights_backward, q, T, head_dim, q, k, gates, grad_weights, of_q, of_k, of_gates, channels, T
        )  # fmt: skip
    if grad_key is not None:
        of_k[:, -1] += grad_key
    vectors = project_backward(of_q, of_k, of_gates, features, gates, query_weight, key_weights)
    grad_x, grad_value_weight = o.new_empty(0), value_weight.new_empty(0)
    if need_value:
        grad_value = grad_value if grad_read is None else grad_value + grad_read
        grad_x, grad_value_weight = value_map_backward(grad_out, grad_value, grad_pooled, x, value_weight, need_x)
    return grad_x, *vectors, grad_value_weight, grad_o, weights


@triton.jit
def _slide(row, filter, c, C, TAPS: tl.constexpr, REVERSED: tl.constexpr):
    """The filter over a row [C] at the channels c."""
    total = tl.zeros(c.shape, row.dtype.element_ty)
    for j in tl.static_range(TAPS):
        at = c + j - TAPS // 2
        tap = tl.load(filter + (TAPS - 1 - j if REVERSED else j))
        inside = (at >= 0) & (at < C)
        total += tl.where(inside, tap * tl.load(row + at, mask=inside, other=0.0), 0.0)
    return total


@triton.jit
def _project(
    gated, features, query_weight, key_weights, q, k, C, T, filters, TAPS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """A program for every key, and for every query, which comes as one more layer."""
    b, m = (tl.program_id(0) // (T + 1)).to(tl.int64), tl.program_id(0) % (T + 1)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        if m == T:
            value = _slide(features + (b * T + T - 1) * C, query_weight, c, C, TAPS, False)
            tl.store(q + b * C + c, value, mask=c < C)
        else:
            row = (b * T + m) * C
            if m < T - filters:
                value = tl.load(features + row + c, mask=c < C)
            else:
                value = _slide(gated + row, key_weights + (m - T + filters) * TAPS, c, C, TAPS, False)
            tl.store(k + row + c, value, mask=c < C)


@triton.jit
def _project_backward(
    grad_q, grad_k, given, gated, features, gates, query_weight, key_weights, grad_features, grad_gates, parts, C, T,
    filters, TAPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program for every layer of every sample; ``parts`` [B, filters + 1, TAPS] get its part of the filters'."""
    b, m = (tl.program_id(0) // T).to(tl.int64), tl.program_id(0) % T
    row, f = (b * T + m) * C, m - T + filters
    taps = tl.arange(0, BLOCK_K)
    of_key = tl.zeros([BLOCK_K], grad_k.dtype.element_ty)
    of_query = tl.zeros([BLOCK_K], grad_k.dtype.element_ty)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = c < C
        of_k = tl.load(grad_k + row + c, mask=inside, other=0.0)
        of_features, of_gates = of_k, tl.load(given + row + c, mask=inside, other=0.0)
        if f >= 0:
            of_gated = _slide(grad_k + row, key_weights + f * TAPS, c, C, TAPS, True)
            of_features = of_gated * tl.load(gates + row + c, mask=inside, other=0.0)
            of_gates += of_gated * tl.load(features + row + c, mask=inside, other=0.0)
            of_key += _filter_gradient(of_k, gated + row, c, C, taps, TAPS)
        if m == T - 1:
            of_q = tl.load(grad_q + b * C + c, mask=inside, other=0.0)
            of_features += _slide(grad_q + b * C, query_weight, c, C, TAPS, True)
            of_query += _filter_gradient(of_q, features + row, c, C, taps, TAPS)
        tl.store(grad_features + row + c, of_features, mask=inside)
        tl.store(grad_gates + row + c, of_gates, mask=inside)
    part = parts + b * (filters + 1) * TAPS + taps
    if f >= 0:
        tl.store(part + f * TAPS, of_key, mask=taps < TAPS)
    if m == T - 1:
        tl.store(part + filters * TAPS, of_query, mask=taps < TAPS)


@triton.jit
def _filter_gradient(grad, row, c, C, taps, TAPS: tl.constexpr):
    """For every tap the sum over the channels c of grad times what the tap met of the row."""
    at = c[None, :] + taps[:, None] - TAPS // 2
    inside = (at >= 0) & (at < C) & (c < C)[None, :] & (taps < TAPS)[:, None]
    met = tl.load(row + at, mask=inside, other=0.0)
    return tl.sum(tl.where(inside, grad[None, :] * met, 0.0), 1)


def project(
    features: Tensor,  # [B, T, C]
    gates: Tensor,  # [B, T, C]
    query_weight: Tensor,  # [1, 1, K]
    key_weights: Tensor,  # [T or 1, 1, K]
) -> tuple[Tensor, Tensor]:
    batch, T, channels = features.shape
    features, gated = dense(features), features * gates
    q, k = features.new_empty(batch, channels), torch.empty_like(features)
    if batch > 0:
        _project[(batch * (T + 1),)](
            gated, features, dense(query_weight), dense(key_weights), q, k, channels, T, len(key_weights),
            TAPS=query_weight.shape[-1], BLOCK_C=_channels_at_once(channels),
        )  # fmt: skip
    return q, k


def project_backward(
    grad_q: Tensor,  # [B, C]
    grad_k: Tensor,  # [B, T, C]
    grad_gates: Tensor,  # [B, T, C]
    features: Tensor,  # [B, T, C]
    gates: Tensor,  # [B, T, C]
    query_weight: Tensor,  # [1, 1, K]
    key_weights: Tensor,  # [T or 1, 1, K]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, T, channels = features.shape
    features, gates, gated = dense(features), dense(gates), features * gates
    filters, taps = len(key_weights), query_weight.shape[-1]
    of_features, of_gates = torch.empty_like(features), torch.empty_like(gates)
    parts = features.new_empty(batch, (filters + 1) * taps)
    if batch > 0:
        _project_backward[(batch * T,)](
            dense(grad_q), dense(grad_k), dense(grad_gates), gated, features, gates, dense(query_weight),
            dense(key_weights), of_features, of_gates, parts, channels, T, filters, TAPS=taps,
            BLOCK_C=_channels_at_once(channels), BLOCK_K=power_of_2(taps),
        )  # fmt: skip
    of_keys, of_query = sum_rows(*parts.split([filters * taps, taps], dim=1))
    return of_features, of_gates, of_query.view(query_weight.shape), of_keys.view(key_weights.shape)


def _channels_at_once(channels: int) -> int:
    return min(512, power_of_2(channels))
