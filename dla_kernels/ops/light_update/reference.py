"""Reference of ``light_update`` in plain PyTorch, in the paper's notation."""

import torch
from torch import Tensor

from dla_kernels.common import accumulate_dtype, depthwise3x3, expand_heads, moments, without_autocast


@without_autocast
def light_update(
    x: Tensor,  # [B, C, H, W]
    q: Tensor,  # [B, C]
    k: Tensor,  # [B, C]
    value_weight: Tensor,  # [C, 1, 3, 3]
    carried: Tensor | None,  # [B, C, H, W]
    carry_scale: Tensor | None,  # [C]
    gate: Tensor | None,  # [B, C]
    carry_weight: Tensor | None,  # [C, 1, 3, 3]
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(x)
    scores = (q * k).unflatten(-1, (-1, head_dim)).sum(-1) * head_dim**-0.5
    attention = expand_heads(torch.sigmoid(scores), head_dim)
    o = attention[..., None, None] * depthwise3x3(x.to(dtype), value_weight)
    if carried is not None:
        prior = carried.to(dtype)
        refreshed = prior if gate is None else prior * gate[..., None, None]
        if carry_weight is not None:
            refreshed = refreshed + depthwise3x3(prior, carry_weight)
        o = o + carry_scale.to(dtype)[:, None, None] * refreshed
    return o.to(x.dtype), *moments(o)
