"""``norm_residual`` in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.common import accumulate_dtype
from dla_kernels.native import empty_map_like
from dla_kernels.ops.norm_residual import reference
from dla_kernels.triton import maps
from dla_kernels.triton.batch_norm import incoming, means, normalisation, pooled_gradient, relu, through_norm
from dla_kernels.triton.maps import (
    area_of,
    as_map,
    dense,
    extent,
    inside_of,
    join_sums,
    load,
    map_beside,
    parts_like,
    place,
    store,
    sum_rows,
    walk,
    walkable,
)
from dla_kernels.triton.tuning import cdiv


@triton.jit
def _merge(mean, var, used_mean, used_var, B, C, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    A: tl.constexpr = mean.dtype.element_ty
    total = tl.zeros([BLOCK_B, BLOCK_C], A)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        inside = (b < B)[:, None] & (c < C)[None, :]
        total += tl.load(mean + b.to(tl.int64)[:, None] * C + c[None, :], mask=inside, other=0.0)
    merged = tl.sum(total, 0) / B
    total = tl.zeros([BLOCK_B, BLOCK_C], A)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        inside = (b < B)[:, None] & (c < C)[None, :]
        offset = b.to(tl.int64)[:, None] * C + c[None, :]
        deviation = tl.load(mean + offset, mask=inside, other=0.0) - merged[None, :]
        total += tl.where(inside, tl.load(var + offset, mask=inside, other=0.0) + deviation * deviation, 0.0)
    tl.store(used_mean + c, merged, mask=c < C)
    tl.store(used_var + c, tl.sum(total, 0) / B, mask=c < C)


@triton.jit
def _forward(
    x, o, mean, var, weight, bias, keep, out, y, area,
    EPS: tl.constexpr, RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    b, c, top, left, at = place(area, BLOCK_C)
    C = area.channels
    HW = area.width
    _, columns = extent(area, top, left)
    A: tl.constexpr = mean.dtype.element_ty
    center, _, scale, shift = normalisation(mean, var, weight, bias, c, C, EPS)
    total = tl.zeros([BLOCK_C, BLOCK_P], A)
    for start in range(left, left + columns, BLOCK_P):
        inside = inside_of(area, left, c, start + tl.arange(0, BLOCK_P))
        value = (load(o, b, c, start, inside, A) - center) * scale + shift
        if RELU == 1:
            value = relu(value)
        if keep is not None:
            value *= tl.load(keep + b)
        if x is not None:
            value += load(x, b, c, start, inside, A)
        if RELU == 2:
            value = relu(value)
        store(out, b, c, start, inside, value)
        total += tl.where(inside, value, 0.0)
    tl.store(y + at + c, tl.sum(total, 1) / HW, mask=c < C)


@triton.jit
def _sums(
    grad_out, grad_y, o, out, mean, var, weight, bias, keep, weight_parts, bias_parts, keep_parts, area,
    EPS: tl.constexpr, RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    b, c, top, left, at = place(area, BLOCK_C)
    C = area.channels
    HW = area.width
    _, columns = extent(area, top, left)
    A: tl.constexpr = mean.dtype.element_ty
    center, inverse, scale, shift = normalisation(mean, var, weight, bias, c, C, EPS)
    pooled = pooled_gradient(grad_y, b, c, C, HW, A, BLOCK_C)
    of_weight = tl.zeros([BLOCK_C, BLOCK_P], A)
    of_bias = tl.zeros([BLOCK_C, BLOCK_P], A)
    of_keep = tl.zeros([BLOCK_C, BLOCK_P], A)
    for start in range(left, left + columns, BLOCK_P):
        inside = inside_of(area, left, c, start + tl.arange(0, BLOCK_P))
        grad = tl.where(inside, incoming(grad_out, pooled, out, b, c, start, inside, A, RELU), 0.0)
        deviation = load(o, b, c, start, inside, A) - center
        if keep_parts is not None or RELU == 1:
            normed = deviation * scale + shift
        if RELU == 1:
            grad_normed = tl.where(normed <= 0, 0.0, grad)
            normed = relu(normed)
        else:
            grad_normed = grad
        of_weight += grad_normed * deviation
        of_bias += grad_normed
        if keep_parts is not None:
            of_keep += grad * normed
    factor = tl.full((), 1, A)
    if keep is not None:
        factor = tl.load(keep + b)
    tl.store(weight_parts + at + c, tl.sum(of_weight * inverse, 1) * factor, mask=c < C)
    tl.store(bias_parts + at + c, tl.sum(of_bias, 1) * factor, mask=c < C)
    if keep_parts is not None:
        tl.store(keep_parts + at + c, tl.sum(of_keep, 1), mask=c < C)


@triton.jit
def _backward(
    grad_out, grad_y, o, out, mean, var, weight, bias, sum_weight, sum_bias, keep, count, grad_x, grad_o, area,
    EPS: tl.constexpr, RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    b, c, top, left, _ = place(area, BLOCK_C)
    C = area.channels
    HW = area.width
    _, columns = extent(area, top, left)
    A: tl.constexpr = mean.dtype.element_ty
    center, inverse, scale, shift = normalisation(mean, var, weight, bias, c, C, EPS)
    pooled = pooled_gradient(grad_y, b, c, C, HW, A, BLOCK_C)
    back = means(sum_weight, sum_bias, count, c, C)
    for start in range(left, left + columns, BLOCK_P):
        inside = inside_of(area, left, c, start + tl.arange(0, BLOCK_P))
        grad = incoming(grad_out, pooled, out, b, c, start, inside, A, RELU)
        if grad_x is not None:
            store(grad_x, b, c, start, inside, grad)
        deviation = load(o, b, c, start, inside, A) - center
        if keep is not None:
            grad *= tl.load(keep + b)
        if RELU == 1:
            grad = tl.where(deviation * scale + shift <= 0, 0.0, grad)
        store(grad_o, b, c, start, inside, through_norm(grad, deviation, inverse, scale, back))


def moments(o: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = (o.new_empty(o.shape[:2], dtype=accumulate_dtype(o)) for _ in range(2))
    maps.moments(walkable(o), mean, var)
    return mean, var


def forward(
    x: Tensor | None,  # [B, C, H, W]
    o: Tensor,  # [B, C, H, W]
    mean: Tensor,  # [B, C] or [C]
    var: Tensor,  # [B, C] or [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    keep: Tensor | None,  # [B]
    eps: float,
    relu: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = walkable(o if x is None else x)
    out, channels = empty_map_like(first), o.shape[1]
    y, used_mean, used_var = weight.new_empty(o.shape[:2]), weight.new_empty(channels), weight.new_empty(channels)
    if mean.dim() == 2:
        BLOCK = 32
        _merge[(cdiv(channels, BLOCK),)](
            dense(mean), dense(var), used_mean, used_var, o.shape[0], channels, BLOCK_B=BLOCK, BLOCK_C=BLOCK
        )  # fmt: skip
    else:
        used_mean.copy_(mean)
        used_var.copy_(var)
    area = area_of(first)
    y_parts = parts_like(y, area)
    walk(
        _forward, first, area, map_beside(x, first), map_beside(o, first), used_mean, used_var,
        *map(dense, (weight, bias, keep)), as_map(out), y_parts, EPS=eps, RELU=relu,
    )  # fmt: skip
    join_sums([y_parts], [y])
    return out, y, used_mean, used_var


def sums(
    grad_out: Tensor,  # [B, C, H, W]
    grad_y: Tensor | None,  # [B, C]
    o: Tensor,  # [B, C, H, W]
    out: Tensor | None,  # [B, C, H, W]
    mean: Tensor,  # [C]
    var: Tensor,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    keep: Tensor | None,  # [B]
    eps: float,
    relu: int,
    need_keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    o = walkable(o)
    area = area_of(o)
    parts = [weight.new_empty(area.parts, *o.shape[:2]) for _ in range(3 if need_keep else 2)]
    walk(
        _sums, o, area, map_beside(grad_out, o), dense(grad_y), as_map(o), map_beside(out, o),
        *map(dense, (mean, var, weight, bias, keep)), *parts, *([] if need_keep else [None]), EPS=eps, RELU=relu,
    )  # fmt: skip
    rows = [p.flatten(0, 1) for p in parts[:2]]
    if not need_keep:
        return *sum_rows(*rows), weight.new_empty(0)
    return tuple(sum_rows(*rows, parts[2].transpose(0, 1).flatten(1).t()))


def backward(
    grad_out: Tensor,  # [B, C, H, W]
    grad_y: Tensor | None,  # [B, C]
    o: Tensor,  # [B, C, H, W]
    out: Tensor | None,  # [B, C, H, W]
    mean: Tensor,  # [C]
    var: Tensor,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    sum_weight: Tensor | None,  # [C]
    sum_bias: Tensor | None,  # [C]
    keep: Tensor | None,  # [B]
    eps: float,
    relu: int,
    count: int,
    need_x: bool,
) -> tuple[Tensor, Tensor]:
    o = walkable(o)
    grad_o = empty_map_like(o)
    grad_x = empty_map_like(o) if need_x else None
    walk(
        _backward, o, area_of(o), map_beside(grad_out, o), dense(grad_y), as_map(o), map_beside(out, o),
        *map(dense, (mean, var, weight, bias, sum_weight, sum_bias, keep)), count, as_map(grad_x), as_map(grad_o),
        EPS=eps, RELU=relu,
    )  # fmt: skip
    return o.new_empty(0) if grad_x is None else grad_x, grad_o


update_running_stats = reference.update_running_stats
