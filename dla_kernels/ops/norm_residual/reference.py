"""Reference of ``norm_residual`` in plain PyTorch."""

import torch
from torch import Tensor

from dla_kernels.common import accumulate_dtype, gap


def merge_moments(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Batch statistics from each sample's: [B, C] twice -> [C] twice, by the law of total variance."""
    return mean.mean(0), var.mean(0) + mean.var(0, correction=0)


def norm_residual(
    x: Tensor,  # [B, C, H, W]
    o: Tensor,  # [B, C, H, W]
    mean: Tensor,  # [B, C] or [C]
    var: Tensor,  # [B, C] or [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    keep: Tensor | None,  # [B]
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(x)
    mean, var = merge_moments(mean, var) if mean.dim() == 2 else (mean.to(dtype), var.to(dtype))
    scale = weight.to(dtype) * torch.rsqrt(var + eps)
    normed = (o.to(dtype) - mean[:, None, None]) * scale[:, None, None] + bias.to(dtype)[:, None, None]
    if relu:
        normed = torch.relu(normed)
    if keep is not None:
        normed = normed * keep[:, None, None, None]
    out = x.to(dtype) + normed
    return out.to(x.dtype), gap(out)
