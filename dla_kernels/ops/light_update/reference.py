"""Reference of ``light_update`` in plain PyTorch, in the paper's notation."""

import torch
from torch import Tensor

from dla_kernels.batch_norm import BatchNorm
from dla_kernels.common import (
    accumulate_dtype,
    as_stored,
    channel_conv,
    depthwise3x3,
    expand_heads,
    gap,
    without_autocast,
)
from dla_kernels.ops.norm_residual.reference import norm_residual


def attention(
    y: Tensor,  # [B, C]
    query_weight: Tensor,  # [1, 1, K]
    key_weight: Tensor,  # [1, 1, K]
    head_dim: int,
) -> Tensor:
    """sigmoid(Q K^T / sqrt(D)) of each head, for all of its channels: [B, C]."""
    q, k = (channel_conv(y[:, None], weight)[:, 0] for weight in (query_weight, key_weight))
    scores = (q * k).unflatten(-1, (-1, head_dim)).sum(-1) * head_dim**-0.5
    return expand_heads(torch.sigmoid(scores), head_dim)


@without_autocast
def light_update(
    x: Tensor,  # [B, C, H, W]
    y: Tensor,  # [B, C]
    query_weight: Tensor,  # [1, 1, K]
    key_weight: Tensor,  # [1, 1, K]
    value_weight: Tensor,  # [C, 1, 3, 3]
    carried: Tensor | None,  # [B, C, H, W]
    carry_scale: Tensor | None,  # [C]
    gate: Tensor | None,  # [B, C]
    carry_weight: Tensor | None,  # [C, 1, 3, 3]
    norm: BatchNorm,
    keep: Tensor | None,  # [B]
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The block's output and o, each with its GAP; then what :func:`norm_residual` says of the statistics."""
    dtype = accumulate_dtype(x)
    o = attention(y, query_weight, key_weight, head_dim)[..., None, None] * depthwise3x3(x.to(dtype), value_weight)
    if carried is not None:
        prior = carried.to(dtype)
        refreshed = prior if gate is None else prior * gate[..., None, None]
        if carry_weight is not None:
            refreshed = refreshed + depthwise3x3(prior, carry_weight)
        o = o + carry_scale[:, None, None] * refreshed
    # The sum's BatchNorm sees o as a map keeps it.
    out, out_mean, *statistics = norm_residual(x, as_stored(o, x.dtype), norm, keep, relu=None)
    return out, out_mean, o.to(x.dtype), gap(o), *statistics
