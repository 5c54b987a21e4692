"""``light_update`` in Triton.

One pass over the maps forward and one backward. A program goes down the rows of a block of columns and reads every row
once, at its three columns: what a row gives to the outputs of the row above, of its own and of the row below is added
to sums that go down with it. The backward does so with D, the gradient of o, instead of the maps that were convolved:
then the gradient of a map and the nine products with its filter come from the same three values of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.native import empty_map_like
from dla_kernels.triton.batch_norm import means, normalisation, pooled_gradient, through_norm
from dla_kernels.triton.maps import (
    Tile,
    add_to_moments,
    area_of,
    as_map,
    counts,
    dense,
    everywhere,
    extent,
    inside_of,
    is_channels_last,
    join_moments,
    join_sums,
    lanes_together,
    load,
    map_beside,
    parts_like,
    place,
    store,
    sum_rows,
    tiles_of,
    vector,
    walk,
    walkable,
)
from dla_kernels.triton.tuning import power_of_2

#: (elements, warps) of a forward tile, the default first. A thread takes the taps and the sums of each of its elements
#: from row to row: more elements than here spill.
FORWARD_SIZES = ((512, 4), (1024, 8))

#: The same for a value map alone.
VALUE_SIZES = ((512, 4), (1024, 4))

#: The same of a backward tile, where these are 16 sums and values, or 28 with a filter of the carry: in channels_last
#: without and with the filter, and in NCHW, where each element has an address of its own.
BACKWARD_SIZES = ((512, 4), (256, 2)), ((256, 4), (128, 2)), ((128, 4), (64, 2))


@triton.jit
def channel_conv(y, filter, i, inside, C, TAPS: tl.constexpr):
    """The filter [TAPS] slid along the channels of y [C], at the channels i; zero-padded."""
    total = tl.zeros(i.shape, y.dtype.element_ty)
    for t in tl.static_range(TAPS):
        at = i + t - TAPS // 2
        total += tl.load(filter + t) * tl.load(y + at, mask=inside & (at >= 0) & (at < C), other=0.0)
    return total


@triton.jit
def head_attention(q, k, HEAD_DIM: tl.constexpr):
    """sigmoid(q k^T / sqrt(D)) of each row of [heads, channels of a head]."""
    score = tl.sum(q * k, 1)
    return 1 / (1 + tl.exp(-score / tl.sqrt(tl.full((), HEAD_DIM, score.dtype))))


@triton.jit
def attention(y, query_weight, key_weight, c, C, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TAPS: tl.constexpr):
    """a of the heads of the channels c, as a column."""
    j = tl.arange(0, BLOCK_D)
    i = (c // HEAD_DIM * HEAD_DIM)[:, None] + j[None, :]
    inside = (c < C)[:, None] & (j < HEAD_DIM)[None, :]
    q = channel_conv(y, query_weight, i, inside, C, TAPS)
    k = channel_conv(y, key_weight, i, inside, C, TAPS)
    return head_attention(tl.where(inside, q, 0.0), k, HEAD_DIM)[:, None]


@triton.jit
def filters(weight, factor, c, C):
    """The nine taps of the filters [C, 9] times a factor, as columns beside a tile."""
    taps = ()
    for tap in tl.static_range(9):
        taps = taps + (factor * vector(weight + tap, 9 * c, 9 * C),)
    return taps


@triton.jit
def beside(area, c, p, row, SHIFT: tl.constexpr):
    """Which pixels exist that lie SHIFT columns beside those of a tile."""
    row = everywhere(row, p)
    exists = (p + SHIFT >= 0) & (p + SHIFT < area.width) & (row >= 0) & (row < area.height)
    return (c < area.channels)[:, None] & exists[None, :]


@triton.jit
def of_part(inside, row, top, rows):
    """A mask's elements where the row is one of the program's own."""
    row = everywhere(row, inside)
    return inside & (row >= top) & (row < top + rows)


@triton.jit
def pass_on(taps, value, SHIFT: tl.constexpr, above, here, below):
    """Adds what the pixels SHIFT columns beside give to the outputs of the rows above, of their own and below."""
    above += taps[7 + SHIFT] * value
    here += taps[4 + SHIFT] * value
    below += taps[1 + SHIFT] * value
    return above, here, below


@triton.jit
def _forward(
    x, y, query_weight, key_weight, value_weight, carried, carry_scale, gate, carry_weight, o, o_mean, o_var,
    norm_mean, norm_var, weight, bias, out, out_mean, area, EPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, TAPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """o and its moments; where there is an ``out``, also x + BatchNorm(o) by constant statistics, and its mean.

    Without a y the attention is 1.
    """
    b, c, top, left, at = place(area, BLOCK_C)
    C = area.channels
    W = area.width
    rows, columns = extent(area, top, left)
    A: tl.constexpr = o_mean.dtype.element_ty
    if y is None:
        of_x = filters(value_weight, 1.0, c, C)
    else:
        a = attention(y + b * C, query_weight, key_weight, c, C, HEAD_DIM, BLOCK_D, TAPS)
        of_x = filters(value_weight, a, c, C)
    if carried is not None:
        scale = vector(carry_scale, c, C)
        factor = scale
        if gate is not None:
            factor = scale * vector(gate + b * C, c, C)
        if carry_weight is not None:
            of_carried = filters(carry_weight, scale, c, C)
    if out is not None:
        center, _, norm_scale, norm_shift = normalisation(norm_mean, norm_var, weight, bias, c, C, EPS)
    zero = tl.zeros([BLOCK_C, BLOCK_P], A)
    mean = zero
    m2 = zero
    total = zero
    for start in range(left, left + columns, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        above = zero
        here = zero
        for row in range(top - 1, top + rows + 1):
            below = zero
            for dx in tl.static_range(-1, 2):
                exists = beside(area, c, p, row, dx)
                value = load(x, b, c, row * W + start + dx, exists, A)
                above, here, below = pass_on(of_x, value, dx, above, here, below)
                if carried is not None:
                    if carry_weight is not None:
                        value = load(carried, b, c, row * W + start + dx, exists, A)
                        above, here, below = pass_on(of_carried, value, dx, above, here, below)
                        if dx == 0:
                            here += factor * value
                    elif dx == 0:
                        here += factor * load(carried, b, c, row * W + start, exists, A)
            # The row above is complete now.
            inside = inside_of(area, left, c, p) & (everywhere(row, p) > top)[None, :]
            first = (row - 1) * W + start
            if o is not None:
                store(o, b, c, first, inside, above)
            seen = (start - left) // BLOCK_P * rows + row - top
            mean, m2 = add_to_moments(mean, m2, above, inside, tl.maximum(seen, 1))
            if out is not None:
                value = load(x, b, c, first, inside, A) + ((above - center) * norm_scale + norm_shift)
                store(out, b, c, first, inside, value)
                total += tl.where(inside, value, 0.0)
            above = here
            here = below
    count = counts(rows, columns, BLOCK_P, A)
    mean_of_o, var_of_o = lanes_together(mean, m2, count, rows * columns, area.height * W)
    tl.store(o_mean + at + c, mean_of_o, mask=c < C)
    if o_var is not None:
        tl.store(o_var + at + c, var_of_o, mask=c < C)
    if out is not None:
        tl.store(out_mean + at + c, tl.sum(total, 1) / (area.height * W), mask=c < C)


@triton.jit
def products(sums, d, above, here, below):
    """The sums of the nine taps' products, given D of a row at its three columns and a map at three rows."""
    rows = (above, here, below)
    found = ()
    for tap in tl.static_range(9):
        found = found + (sums[tap] + d[2 - tap % 3] * rows[tap // 3],)
    return found


@triton.jit
def _backward(
    grad_out, grad_out_mean, grad_o, grad_o_mean, o, mean, var, weight, sum_weight, sum_bias, keep, count, x, y,
    query_weight, key_weight, value_weight, carried, carry_scale, gate, carry_weight, grad_x, grad_carried,
    attention_parts, value_parts, scale_parts, gate_parts, carry_parts, area, EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TAPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Without a y the attention is 1, and without a weight o's place is that of what flows to o."""
    b, c, top, left, at = place(area, BLOCK_C)
    C = area.channels
    W = area.width
    rows, columns = extent(area, top, left)
    A: tl.constexpr = value_weight.dtype.element_ty
    if y is not None:
        a = attention(y + b * C, query_weight, key_weight, c, C, HEAD_DIM, BLOCK_D, TAPS)
    if weight is not None:
        center, inverse, scale, _ = normalisation(mean, var, weight, weight, c, C, EPS)
    from_out = pooled_gradient(grad_out_mean, b, c, C, area.height * W, A, BLOCK_C)
    from_o = pooled_gradient(grad_o_mean, b, c, C, area.height * W, A, BLOCK_C)
    back = means(sum_weight, sum_bias, count, c, C)
    factor = tl.full((), 1, A)
    if keep is not None:
        factor = tl.load(keep + b)
    zero = tl.zeros([BLOCK_C, BLOCK_P], A)
    to_x = filters(value_weight, tl.full([BLOCK_C, 1], 1.0, A), c, C)
    # One sum for each tap in every lane; of the carry only the middle one where it has no filter.
    of_value = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    of_carry = of_value if carry_weight is not None else (zero,)
    of_attention = zero
    if carried is not None:
        lambda_ = vector(carry_scale, c, C)
        gate_value = tl.full([BLOCK_C, 1], 1.0, A)
        if gate is not None:
            gate_value = vector(gate + b * C, c, C)
        if carry_weight is not None:
            to_carried = filters(carry_weight, lambda_, c, C)
    for start in range(left, left + columns, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = inside_of(area, left, c, p)
        # Of the row above and of this one: the maps, and what flows to them so far. A map above begins as a zero of its
        # own: after a turn it is what the one here was, and what a loop leaves as it was Triton takes for constant.
        x_above = tl.zeros([BLOCK_C, BLOCK_P], A)
        x_here = zero
        above = zero
        here = zero
        residual = zero
        if carry_weight is not None:
            carried_above = tl.zeros([BLOCK_C, BLOCK_P], A)
            carried_here = zero
            carry_above = zero
            carry_here = zero
        for row in range(top - 1, top + rows + 1):
            d = ()
            for dx in tl.static_range(-1, 2):
                exists = beside(area, c, p, row, dx)
                first = row * W + start + dx
                grad = load(grad_out, b, c, first, exists, A) + from_out
                if dx == 0:
                    own = grad
                of_o = load(o, b, c, first, exists, A)
                if weight is not None:
                    of_o = through_norm(grad * factor, of_o - center, inverse, scale, back)
                if grad_o is not None:
                    of_o += load(grad_o, b, c, first, exists, A)
                d = d + (tl.where(exists, of_o + from_o, 0.0),)
            within = of_part(inside, row + 1, top, rows)
            x_below = load(x, b, c, (row + 1) * W + start, within, A)
            of_value = products(of_value, d, x_above, x_here, x_below)
            below = zero
            for dx in tl.static_range(-1, 2):
                # The input met the tap at the output on the other side.
                below, here, above = pass_on(to_x, d[1 - dx], dx, below, here, above)
            complete = inside & (everywhere(row, inside) > top)
            to_own = above
            if y is not None:
                of_attention += above * x_above  # the same sum as of D V, with less to cancel than in the taps' sums
                to_own = a * above
            if grad_x is not None:
                store(grad_x, b, c, (row - 1) * W + start, complete, residual + to_own)
            residual = own
            x_above = x_here
            x_here = x_below
            above = here
            here = below
            if carried is not None:
                if carry_weight is not None:
                    carried_below = load(carried, b, c, (row + 1) * W + start, within, A)
                    of_carry = products(of_carry, d, carried_above, carried_here, carried_below)
                    carry_below = zero
                    for dx in tl.static_range(-1, 2):
                        carry_below, carry_here, carry_above = pass_on(
                            to_carried, d[1 - dx], dx, carry_below, carry_here, carry_above
                        )
                    carry_here += lambda_ * gate_value * d[1]
                    if grad_carried is not None:
                        store(grad_carried, b, c, (row - 1) * W + start, complete, carry_above)
                    carried_above = carried_here
                    carried_here = carried_below
                    carry_above = carry_here
                    carry_here = carry_below
                else:
                    within = of_part(inside, row, top, rows)
                    of_carry = (of_carry[0] + d[1] * load(carried, b, c, row * W + start, within, A),)
                    if grad_carried is not None:
                        store(grad_carried, b, c, row * W + start, within, lambda_ * gate_value * d[1])
    for tap in tl.static_range(9):
        tap_sum = tl.sum(of_value[tap], 1)
        if y is not None:
            tap_sum = tl.sum(a, 1) * tap_sum
        tl.store(value_parts + 9 * (at + c) + tap, tap_sum, mask=c < C)
    if y is not None:
        tl.store(attention_parts + at + c, tl.sum(of_attention, 1), mask=c < C)
    if carried is not None:
        lambda_vector = tl.load(carry_scale + c, mask=c < C, other=0.0)
        middle = tl.sum(of_carry[4 if carry_weight is not None else 0], 1)
        of_scale = tl.sum(gate_value, 1) * middle
        if gate is not None:
            tl.store(gate_parts + at + c, lambda_vector * middle, mask=c < C)
        if carry_weight is not None:
            for tap in tl.static_range(9):
                tap_sum = tl.sum(of_carry[tap], 1)
                of_scale += tl.load(carry_weight + 9 * c + tap, mask=c < C, other=0.0) * tap_sum
                tl.store(carry_parts + 9 * (at + c) + tap, lambda_vector * tap_sum, mask=c < C)
        tl.store(scale_parts + at + c, of_scale, mask=c < C)


@triton.jit
def _attention_backward(
    attention_parts, y, query_weight, key_weight, grad_q, grad_k, grad_y, query_parts, key_parts, C,
    HEAD_DIM: tl.constexpr, TAPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From the gradient of a at every channel to those of y and of both filters; a program for each sample."""
    b = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_D)[None, :]
    i = tl.arange(0, BLOCK_H)[:, None] * HEAD_DIM + j
    inside = (i < C) & (j < HEAD_DIM)
    row = y + b * C
    q = tl.where(inside, channel_conv(row, query_weight, i, inside, C, TAPS), 0.0)
    k = tl.where(inside, channel_conv(row, key_weight, i, inside, C, TAPS), 0.0)
    a = head_attention(q, k, HEAD_DIM)
    grad_a = tl.sum(tl.load(attention_parts + b * C + i, mask=inside, other=0.0), 1)
    grad_score = (grad_a * a * (1 - a) / tl.sqrt(tl.full((), HEAD_DIM, a.dtype)))[:, None]
    of_q = grad_score * k
    of_k = grad_score * q
    tl.store(grad_q + b * C + i, of_q, mask=inside)
    tl.store(grad_k + b * C + i, of_k, mask=inside)
    tl.debug_barrier()  # the filters reach into neighbouring heads, which other threads have written
    of_y = tl.zeros([BLOCK_H, BLOCK_D], q.dtype)
    for t in tl.static_range(TAPS):
        source = i + t - TAPS // 2
        values = tl.load(row + source, mask=inside & (source >= 0) & (source < C), other=0.0)
        tl.store(query_parts + b * TAPS + t, tl.sum(tl.sum(of_q * values, 1), 0))
        tl.store(key_parts + b * TAPS + t, tl.sum(tl.sum(of_k * values, 1), 0))
        target = i - t + TAPS // 2
        exists = inside & (target >= 0) & (target < C)
        of_y += tl.load(query_weight + t) * tl.load(grad_q + b * C + target, mask=exists, other=0.0)
        of_y += tl.load(key_weight + t) * tl.load(grad_k + b * C + target, mask=exists, other=0.0)
    tl.store(grad_y + b * C + i, of_y, mask=inside)


def tile_of(channels: int, height: int, width: int, channels_last: bool, elements: int, warps: int) -> Tile:
    """A tile of up to ``elements`` of one row: 64 channels, or all the columns there are."""
    channels, width = power_of_2(channels), power_of_2(width)
    if channels_last:
        channels = min(channels, 64)
        return Tile(channels, min(width, max(1, elements // channels)), warps)
    width = min(width, elements)
    return Tile(min(channels, max(1, elements // width)), width, warps)


def _block(x: Tensor) -> int:
    return tiles_of(x, FORWARD_SIZES, tile_of)[0].channels


def _backward_sizes(o: Tensor, filtered: bool) -> tuple[tuple[int, int], ...]:
    return BACKWARD_SIZES[filtered if is_channels_last(o) else 2]


def _run_forward(
    x, y, query_weight, key_weight, value_weight, carried, carry_scale, gate, carry_weight, o, o_mean, o_var, norm,
    out, out_mean, eps, head_dim,
) -> None:  # fmt: skip
    area = area_of(x, _block(x))
    mean_parts, var_parts, out_parts = (None if t is None else parts_like(t, area) for t in (o_mean, o_var, out_mean))
    walk(
        _forward, x, area, as_map(x), *map(dense, (y, query_weight, key_weight, value_weight)), map_beside(carried, x),
        *map(dense, (carry_scale, gate, carry_weight)), as_map(o), mean_parts, var_parts, *map(dense, norm),
        as_map(out), out_parts, of=tile_of, sizes=VALUE_SIZES if y is None else FORWARD_SIZES, EPS=eps,
        HEAD_DIM=head_dim, BLOCK_D=power_of_2(head_dim), TAPS=1 if query_weight is None else query_weight.shape[-1],
    )  # fmt: skip
    if o_var is None:
        join_sums([mean_parts, out_parts], [o_mean, out_mean])
    else:
        join_moments(mean_parts, var_parts, o_mean, o_var, area)


def _run_backward(
    grad_out, grad_out_mean, grad_o, grad_o_mean, o, norm, eps, count, x, y, query_weight, key_weight, value_weight,
    carried, carry_scale, gate, carry_weight, head_dim, grad_x, grad_carried, area, attention_parts, value_parts,
    scale_parts, gate_parts, carry_parts,
) -> None:  # fmt: skip
    walk(
        _backward, o, area, map_beside(grad_out, o), dense(grad_out_mean), map_beside(grad_o, o), dense(grad_o_mean),
        as_map(o), *map(dense, norm), count, map_beside(x, o),
        *map(dense, (y, query_weight, key_weight, value_weight)), map_beside(carried, o),
        *map(dense, (carry_scale, gate, carry_weight)), as_map(grad_x), as_map(grad_carried), attention_parts,
        value_parts, scale_parts, gate_parts, carry_parts, of=tile_of,
        sizes=_backward_sizes(o, carry_weight is not None), variant=int(y is None), EPS=eps, HEAD_DIM=head_dim,
        BLOCK_D=power_of_2(head_dim), TAPS=1 if query_weight is None else query_weight.shape[-1],
    )  # fmt: skip


def forward(
    x: Tensor,  # [B, C, H, W]
    y: Tensor,  # [B, C]
    query_weight: Tensor,  # [1, 1, K]
    key_weight: Tensor,  # [1, 1, K]
    value_weight: Tensor,  # [C, 1, 3, 3]
    carried: Tensor | None,  # [B, C, H, W]
    carry_scale: Tensor | None,  # [C]
    gate: Tensor | None,  # [B, C]
    carry_weight: Tensor | None,  # [C, 1, 3, 3]
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    x = walkable(x)
    o, mean, var = empty_map_like(x), y.new_empty(x.shape[:2]), y.new_empty(x.shape[:2])
    _run_forward(
        x, y, query_weight, key_weight, value_weight, carried, carry_scale, gate, carry_weight, o, mean, var,
        (None,) * 4, None, None, None, head_dim,
    )  # fmt: skip
    return o, mean, var


def value_map(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """depthwise3x3(x, weight) and its GAP."""
    x = walkable(x)
    value, (mean, var) = empty_map_like(x), weight.new_empty(2, *x.shape[:2])
    _run_forward(
        x, *(None,) * 3, weight, *(None,) * 4, value, mean, var, (None,) * 4, None, None, None, x.shape[1]
    )  # fmt: skip
    return value, mean


def folded(
    x: Tensor,  # [B, C, H, W]
    y: Tensor,  # [B, C]
    query_weight: Tensor,  # [1, 1, K]
    key_weight: Tensor,  # [1, 1, K]
    value_weight: Tensor,  # [C, 1, 3, 3]
    carried: Tensor | None,  # [B, C, H, W]
    carry_scale: Tensor | None,  # [C]
    gate: Tensor | None,  # [B, C]
    carry_weight: Tensor | None,  # [C, 1, 3, 3]
    mean: Tensor,  # [C]
    var: Tensor,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
    head_dim: int,
    need_o: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = walkable(x)
    out, out_mean, o_mean = empty_map_like(x), y.new_empty(x.shape[:2]), y.new_empty(x.shape[:2])
    o = empty_map_like(x) if need_o else None
    _run_forward(
        x, y, query_weight, key_weight, value_weight, carried, carry_scale, gate, carry_weight, o, o_mean, None,
        (mean, var, weight, bias), out, out_mean, eps, head_dim,
    )  # fmt: skip
    return out, out_mean, x.new_empty(0) if o is None else o, o_mean


def backward(
    grad_out: Tensor,  # [B, C, H, W]
    grad_out_mean: Tensor | None,  # [B, C]
    grad_o: Tensor | None,  # [B, C, H, W]
    grad_o_mean: Tensor | None,  # [B, C]
    o: Tensor,  # [B, C, H, W]
    mean: Tensor | None,  # [C]
    var: Tensor | None,  # [C]
    weight: Tensor | None,  # [C]
    sum_weight: Tensor | None,  # [C]
    sum_bias: Tensor | None,  # [C]
    keep: Tensor | None,  # [B]
    eps: float,
    count: int,
    x: Tensor,  # [B, C, H, W]
    y: Tensor,  # [B, C]
    query_weight: Tensor,  # [1, 1, K]
    key_weight: Tensor,  # [1, 1, K]
    value_weight: Tensor,  # [C, 1, 3, 3]
    carried: Tensor | None,  # [B, C, H, W]
    carry_scale: Tensor | None,  # [C]
    gate: Tensor | None,  # [B, C]
    carry_weight: Tensor | None,  # [C, 1, 3, 3]
    head_dim: int,
    need_x: bool,
    need_carried: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    o, y, query_weight, key_weight = walkable(o), dense(y), dense(query_weight), dense(key_weight)
    batch, channels = o.shape[:2]
    taps = query_weight.shape[-1]
    grad_x = empty_map_like(o) if need_x else None
    grad_carried = empty_map_like(o) if need_carried else None
    area = area_of(o, _block(o))
    # Each part's share of a vector, and of a filter's taps.
    grad_y, of_attention, of_gate = y.new_empty(y.shape), y.new_empty(y.shape), y.new_empty(y.shape)
    attention_parts, gate_parts = parts_like(of_attention, area), None if gate is None else parts_like(of_gate, area)
    value_parts = y.new_empty(area.parts * batch, 9 * channels)
    scale_parts = None if carried is None else y.new_empty(area.parts * batch, channels)
    carry_parts = None if carry_weight is None else torch.empty_like(value_parts)
    _run_backward(
        grad_out, grad_out_mean, grad_o, grad_o_mean, o, (mean, var, weight, sum_weight, sum_bias, keep), eps, count,
        x, y, query_weight, key_weight, value_weight, carried, carry_scale, gate, carry_weight, head_dim, grad_x,
        grad_carried, area, attention_parts, value_parts, scale_parts, gate_parts, carry_parts,
    )  # fmt: skip
    finished = [(attention_parts, of_attention), (gate_parts, of_gate)][: 1 if gate is None else 2]
    join_sums(*zip(*finished, strict=True))
    query_parts, key_parts = y.new_empty(batch, taps), y.new_empty(batch, taps)
    if batch > 0:
        heads, width = power_of_2(channels // head_dim), power_of_2(head_dim)
        _attention_backward[(batch,)](
            of_attention, y, query_weight, key_weight, torch.empty_like(y), torch.empty_like(y), grad_y, query_parts,
            key_parts, channels, HEAD_DIM=head_dim, TAPS=taps, BLOCK_H=heads, BLOCK_D=width,
            num_warps=max(1, min(8, heads * width // 256)),
        )  # fmt: skip
    parts = [t for t in (query_parts, key_parts, value_parts, scale_parts, carry_parts) if t is not None]
    sums = iter(sum_rows(*parts))
    of_query, of_key, of_value = (next(sums).view(w.shape) for w in (query_weight, key_weight, value_weight))
    return (
        o.new_empty(0) if grad_x is None else grad_x,
        grad_y,
        of_query,
        of_key,
        of_value,
        o.new_empty(0) if grad_carried is None else grad_carried,
        y.new_empty(0) if carried is None else next(sums),
        y.new_empty(0) if gate is None else of_gate,
        y.new_empty(0) if carry_weight is None else next(sums).view(carry_weight.shape),
    )


def value_map_backward(
    grad_x: Tensor, grad: Tensor, grad_mean: Tensor | None, x: Tensor, weight: Tensor, need_x: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight, given those of :func:`value_map`'s two outputs, and of x so far."""
    grad = walkable(grad)
    area = area_of(grad, _block(grad))
    grad_x_out = empty_map_like(grad) if need_x else None
    value_parts = weight.new_empty(area.parts * grad.shape[0], weight.numel())
    _run_backward(
        grad_x, None, None, grad_mean, grad, (None,) * 6, 1.0, 1, x, *(None,) * 3, weight, *(None,) * 4, x.shape[1],
        grad_x_out, None, area, None, value_parts, *(None,) * 3,
    )  # fmt: skip
    (grad_weight,) = sum_rows(value_parts)
    return grad.new_empty(0) if grad_x_out is None else grad_x_out, grad_weight.view(weight.shape)
