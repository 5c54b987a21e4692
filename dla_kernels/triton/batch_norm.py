"""BatchNorm and the residual inside Triton kernels: what norm_residual and both forms of layer attention share."""

import triton
import triton.language as tl

from dla_kernels.triton.maps import load, vector


@triton.jit
def normalisation(mean, var, weight, bias, c, C, EPS: tl.constexpr):
    """A channel's mean, 1 / sqrt(var + eps), scale and shift, as columns beside a tile."""
    variance = vector(var, c, C)
    inverse = tl.rsqrt(variance + tl.full((), EPS, variance.dtype))
    return vector(mean, c, C), inverse, inverse * vector(weight, c, C), vector(bias, c, C)


@triton.jit
def relu(x):
    """Zero where x is negative; NaN stays."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def incoming(grad_out, pooled, out, b, c, first, inside, A: tl.constexpr, RELU: tl.constexpr):
    """The gradient of x + keep * normed: of out and its GAP, before a ReLU after the addition."""
    grad = load(grad_out, b, c, first, inside, A) + pooled
    if RELU == 2:
        grad = tl.where(load(out, b, c, first, inside, A) <= 0, 0.0, grad)
    return grad


@triton.jit
def pooled_gradient(grad_y, b, c, C, HW, A: tl.constexpr, BLOCK_C: tl.constexpr):
    """What the gradient of a GAP adds to that of each pixel."""
    if grad_y is None:
        return tl.zeros([BLOCK_C, 1], A)
    else:
        return vector(grad_y + b * C, c, C) / HW


@triton.jit
def means(sum_weight, sum_bias, count, c, C):
    """What flows back through the batch statistics, for each value: a pair, or () where they are constants.

    Triton 3.6 returns no None inside of a tuple.
    """
    if sum_weight is None:
        return ()
    else:
        return vector(sum_weight, c, C) / count, vector(sum_bias, c, C) / count


@triton.jit
def through_norm(grad, deviation, inverse, scale, back):
    """The gradient of o from that of normed and what :func:`means` returns."""
    if len(back) == 0:
        return scale * grad
    else:
        return scale * (grad - back[1] - deviation * inverse * back[0])
