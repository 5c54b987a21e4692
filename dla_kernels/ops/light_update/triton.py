"""``light_update`` in Triton.

One pass over the maps forward and one backward. A program reads the nine neighbours of a tile by nine loads, of which
the cache serves eight. The backward reads D, the gradient of o, at the neighbours instead of the maps that were
convolved: then the gradient of a map and the nine products with its filter come from the same nine values.
"""

import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.native import empty_map_like
from dla_kernels.triton.batch_norm import means, normalisation, pooled_gradient, through_norm
from dla_kernels.triton.maps import (
    add_to_moments,
    as_map,
    dense,
    lanes_together,
    load,
    map_beside,
    place,
    store,
    sum_rows,
    vector,
    walk,
    walkable,
)

#: (elements, warps) of a tile, the default first. The backward keeps up to 18 sums in each lane: one element a thread
#: leaves the registers for them.
FORWARD_SIZES = ((512, 4), (256, 4), (1024, 8))
BACKWARD_SIZES = ((256, 8), (128, 4), (512, 8))


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
def neighbours(c, p, TAP: tl.constexpr, C, H, W):
    """The pixels that lie under a tap of the filter around those of a tile, and which of them exist."""
    dy: tl.constexpr = TAP // 3 - 1
    dx: tl.constexpr = TAP % 3 - 1
    row = p + dy * W
    inside = (row >= 0) & (row < H * W)
    if dx < 0:
        inside &= p % W > 0
    if dx > 0:
        inside &= p % W < W - 1
    return row + dx, (c < C)[:, None] & inside[None, :]


@triton.jit
def depthwise3x3(x, weight, b, c, p, C, H, W, A: tl.constexpr):
    """A tile of the map convolved channel by channel with the filters [C, 9], zero-padded by one."""
    total = tl.zeros([c.shape[0], p.shape[0]], A)
    for tap in tl.static_range(9):
        there, exists = neighbours(c, p, tap, C, H, W)
        total += vector(weight + tap, 9 * c, 9 * C) * load(x, b, c, there, exists, A)
    return total


@triton.jit
def _forward(
    x, y, query_weight, key_weight, value_weight, carried, carry_scale, gate, carry_weight, o, o_mean, o_var,
    norm_mean, norm_var, weight, bias, out, out_mean, C, H, W, EPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, TAPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """o and its moments; where there is an ``out``, also x + BatchNorm(o) by constant statistics, and its mean."""
    b, c = place(tl.program_id(0), C, BLOCK_C)
    A: tl.constexpr = o_mean.dtype.element_ty
    a = attention(y + b * C, query_weight, key_weight, c, C, HEAD_DIM, BLOCK_D, TAPS)
    if carried is not None:
        scale = vector(carry_scale, c, C)
        factor = tl.full([BLOCK_C, 1], 1.0, A)
        if gate is not None:
            factor = vector(gate + b * C, c, C)
    if out is not None:
        center, _, norm_scale, norm_shift = normalisation(norm_mean, norm_var, weight, bias, c, C, EPS)
    mean = tl.zeros([BLOCK_C, BLOCK_P], A)
    m2 = tl.zeros([BLOCK_C, BLOCK_P], A)
    total = tl.zeros([BLOCK_C, BLOCK_P], A)
    for start in range(0, H * W, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (p < H * W)[None, :]
        value = a * depthwise3x3(x, value_weight, b, c, p, C, H, W, A)
        if carried is not None:
            prior = factor * load(carried, b, c, p, inside, A)
            if carry_weight is not None:
                prior += depthwise3x3(carried, carry_weight, b, c, p, C, H, W, A)
            value += scale * prior
        if o is not None:
            store(o, b, c, p, inside, value)
        mean, m2 = add_to_moments(mean, m2, value, inside, start // BLOCK_P + 1)
        if out is not None:
            value = load(x, b, c, p, inside, A) + ((value - center) * norm_scale + norm_shift)
            store(out, b, c, p, inside, value)
            total += tl.where(inside, value, 0.0)
    mean_of_o, var_of_o = lanes_together(mean, m2, H * W, BLOCK_P)
    tl.store(o_mean + b * C + c, mean_of_o, mask=c < C)
    if o_var is not None:
        tl.store(o_var + b * C + c, var_of_o, mask=c < C)
    if out is not None:
        tl.store(out_mean + b * C + c, tl.sum(total, 1) / (H * W), mask=c < C)


@triton.jit
def _backward(
    grad_out, grad_out_mean, grad_o, grad_o_mean, o, mean, var, weight, sum_weight, sum_bias, keep, count, x, y,
    query_weight, key_weight, value_weight, carried, carry_scale, gate, carry_weight, grad_x, grad_carried,
    attention_parts, value_parts, scale_parts, grad_gate, carry_parts, C, H, W, EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TAPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    b, c = place(tl.program_id(0), C, BLOCK_C)
    A: tl.constexpr = mean.dtype.element_ty
    HW = H * W
    a = attention(y + b * C, query_weight, key_weight, c, C, HEAD_DIM, BLOCK_D, TAPS)
    center, inverse, scale, _ = normalisation(mean, var, weight, weight, c, C, EPS)
    from_out = pooled_gradient(grad_out_mean, b, c, C, HW, A, BLOCK_C)
    from_o = pooled_gradient(grad_o_mean, b, c, C, HW, A, BLOCK_C)
    mean_weight, mean_bias = means(sum_weight, sum_bias, count, c, C)
    factor = tl.full((), 1, A)
    if keep is not None:
        factor = tl.load(keep + b)
    # One sum for each tap in every lane; of the carry only the middle one where it has no filter.
    zero = tl.zeros([BLOCK_C, BLOCK_P], A)
    of_value = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    of_carry = of_value if carry_weight is not None else (zero,)
    of_attention = zero
    if carried is not None:
        lambda_ = vector(carry_scale, c, C)
        gate_value = tl.full([BLOCK_C, 1], 1.0, A)
        if gate is not None:
            gate_value = vector(gate + b * C, c, C)
    for start in range(0, HW, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (p < HW)[None, :]
        x_here = load(x, b, c, p, inside, A)
        to_x = zero
        if carried is not None:
            carried_here = load(carried, b, c, p, inside, A)
            to_carried = zero
        products = ()
        carry_products = ()
        for tap in tl.static_range(9):
            # The input at p met this tap at the output on the other side.
            there, exists = neighbours(c, p, 8 - tap, C, H, W)
            grad = load(grad_out, b, c, there, exists, A) + from_out
            d = through_norm(
                grad * factor, load(o, b, c, there, exists, A) - center, inverse, scale, mean_bias, mean_weight
            )  # fmt: skip
            if grad_o is not None:
                d += load(grad_o, b, c, there, exists, A)
            d = tl.where(exists, d + from_o, 0.0)
            products = products + (of_value[tap] + d * x_here,)
            to_x += vector(value_weight + tap, 9 * c, 9 * C) * d
            if tap == 4 and grad_x is not None:
                residual = grad
            if carried is not None:
                if tap == 4:
                    to_carried += gate_value * d
                if carry_weight is not None:
                    to_carried += vector(carry_weight + tap, 9 * c, 9 * C) * d
                    carry_products = carry_products + (of_carry[tap] + d * carried_here,)
                elif tap == 4:
                    carry_products = carry_products + (of_carry[0] + d * carried_here,)
        of_value = products
        of_attention += to_x * x_here  # the same sum as of D V, with less to cancel than in the taps' sums
        if carried is not None:
            of_carry = carry_products
        if grad_x is not None:
            store(grad_x, b, c, p, inside, residual + a * to_x)
        if grad_carried is not None:
            store(grad_carried, b, c, p, inside, lambda_ * to_carried)
    at = b * C + c
    for tap in tl.static_range(9):
        tap_sum = tl.sum(of_value[tap], 1)
        tl.store(value_parts + 9 * at + tap, tl.sum(a, 1) * tap_sum, mask=c < C)
    tl.store(attention_parts + at, tl.sum(of_attention, 1), mask=c < C)
    if carried is not None:
        lambda_vector = tl.load(carry_scale + c, mask=c < C, other=0.0)
        here = tl.sum(of_carry[4 if carry_weight is not None else 0], 1)
        of_scale = tl.sum(gate_value, 1) * here
        if gate is not None:
            tl.store(grad_gate + at, lambda_vector * here, mask=c < C)
        if carry_weight is not None:
            for tap in tl.static_range(9):
                tap_sum = tl.sum(of_carry[tap], 1)
                of_scale += tl.load(carry_weight + 9 * c + tap, mask=c < C, other=0.0) * tap_sum
                tl.store(carry_parts + 9 * at + tap, lambda_vector * tap_sum, mask=c < C)
        tl.store(scale_parts + at, of_scale, mask=c < C)


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


def _run_forward(
    x, y, query_weight, key_weight, value_weight, carried, carry_scale, gate, carry_weight, o, o_mean, o_var, norm,
    out, out_mean, eps, head_dim,
) -> None:  # fmt: skip
    _, channels, height, width = x.shape
    walk(
        _forward, x, as_map(x), *map(dense, (y, query_weight, key_weight, value_weight)), map_beside(carried, x),
        *map(dense, (carry_scale, gate, carry_weight)), as_map(o), o_mean, o_var, *map(dense, norm), as_map(out),
        out_mean, channels, height, width, sizes=FORWARD_SIZES, EPS=eps, HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim), TAPS=query_weight.shape[-1],
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
    mean: Tensor,  # [C]
    var: Tensor,  # [C]
    weight: Tensor,  # [C]
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
    batch, channels, height, width = o.shape
    taps = query_weight.shape[-1]
    grad_x = empty_map_like(o) if need_x else None
    grad_carried = empty_map_like(o) if need_carried else None
    # Each sample's part of a vector, and of a filter's taps.
    vector_like, taps_like = (lambda: y.new_empty(batch, channels)), (lambda: y.new_empty(batch, 9 * channels))
    attention_parts, value_parts, grad_y = vector_like(), taps_like(), vector_like()
    scale_parts = None if carried is None else vector_like()
    grad_gate = None if gate is None else vector_like()
    carry_parts = None if carry_weight is None else taps_like()
    constants = {"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "TAPS": taps}
    walk(
        _backward, o, map_beside(grad_out, o), dense(grad_out_mean), map_beside(grad_o, o), dense(grad_o_mean),
        as_map(o), *map(dense, (mean, var, weight, sum_weight, sum_bias, keep)), count, map_beside(x, o), y,
        query_weight, key_weight, dense(value_weight), map_beside(carried, o),
        *map(dense, (carry_scale, gate, carry_weight)), as_map(grad_x), as_map(grad_carried), attention_parts,
        value_parts, scale_parts, grad_gate, carry_parts, channels, height, width, sizes=BACKWARD_SIZES, EPS=eps,
        **constants,
    )  # fmt: skip
    query_parts, key_parts = y.new_empty(batch, taps), y.new_empty(batch, taps)
    if batch > 0:
        heads = triton.next_power_of_2(channels // head_dim)
        _attention_backward[(batch,)](
            attention_parts, y, query_weight, key_weight, vector_like(), vector_like(), grad_y, query_parts, key_parts,
            channels, **constants, BLOCK_H=heads, num_warps=max(1, min(8, heads * constants["BLOCK_D"] // 256)),
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
        y.new_empty(0) if grad_gate is None else grad_gate,
        y.new_empty(0) if carry_weight is None else next(sums).view(carry_weight.shape),
    )
