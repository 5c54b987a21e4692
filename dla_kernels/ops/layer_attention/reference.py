"""Reference of ``layer_attention`` in plain PyTorch, in the paper's notation."""

from collections.abc import Sequence

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


def queries_and_keys(
    features: Tensor,  # [B, T, C]
    gates: Tensor,  # [B, T, C]
    query_weight: Tensor,  # [1, 1, K]
    key_weights: Tensor,  # [T, 1, K] or [1, 1, K]
) -> tuple[Tensor, Tensor]:
    """Q of the last layer [B, C] and the K of all [B, T, C]; with one key filter those before are K already."""
    given = features.shape[1] - len(key_weights)
    keys = channel_conv(features[:, given:] * gates[:, given:], key_weights)
    return channel_conv(features[:, -1:], query_weight)[:, 0], torch.cat([features[:, :given], keys], dim=1)


def attention_weights(
    q: Tensor,  # [B, C]
    k: Tensor,  # [B, T, C]
    head_dim: int,
) -> Tensor:
    """softmax over the T layers of Q K^T / sqrt(D) (Eq. 2): [B, T, heads]."""
    scores = (q[:, None] * k).unflatten(-1, (-1, head_dim)).sum(-1)
    return (scores * head_dim**-0.5).softmax(dim=1)


@without_autocast
def layer_attention(
    x: Tensor,  # [B, C, H, W]
    features: Tensor,  # [B, T, C]
    gates: Tensor,  # [B, T, C]
    query_weight: Tensor,  # [1, 1, K]
    key_weights: Tensor,  # [T, 1, K] or [1, 1, K]
    value_weight: Tensor,  # [C, 1, 3, 3]
    prior: Sequence[Tensor],  # T - 1 of [B, C, H, W]
    norm: BatchNorm,
    keep: Tensor | None,  # [B]
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The block's output, its value map, that one's GAP and its key; then what :func:`norm_residual` says."""
    q, k = queries_and_keys(features, gates, query_weight, key_weights)
    weights = expand_heads(attention_weights(q, k, head_dim), head_dim) * gates
    dtype = accumulate_dtype(x)
    value = depthwise3x3(x.to(dtype), value_weight)
    values = [*prior, value.to(x.dtype)]
    # One product a layer, not a stack of maps: autograd then keeps each value map once, however many layers read it.
    o = sum(w[..., None, None] * v.to(dtype) for w, v in zip(weights.unbind(1), values, strict=True))
    out, _, *statistics = norm_residual(x, as_stored(o, x.dtype), norm, keep, relu="branch")
    return out, values[-1], gap(value), k[:, -1], *statistics
