"""Reference of ``norm_residual`` in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dla_kernels.common import gap


def merge_moments(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Batch statistics from each sample's: [B, C] twice -> [C] twice, by the law of total variance."""
    return mean.mean(0), var.mean(0) + mean.var(0, correction=0)


def norm_residual(
    x: Tensor,  # [B, C, H, W]
    o: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    mean: Tensor | None,  # [B, C] or [C]
    var: Tensor | None,  # [B, C] or [C]
    keep: Tensor | None,  # [B]
    eps: float,
    relu: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    branch = o.to(weight.dtype)
    if mean is None:
        normed = F.batch_norm(branch, None, None, weight, bias, training=True, eps=eps)
        var, mean = torch.var_mean(branch.detach(), (0, 2, 3), correction=0)
    else:
        if mean.dim() == 2:
            mean, var = merge_moments(mean, var)
        scale = weight * torch.rsqrt(var + eps)
        normed = (branch - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]
    if relu == "branch":
        normed = torch.relu(normed)
    if keep is not None:
        normed = normed * keep[:, None, None, None]
    out = x.to(weight.dtype) + normed
    if relu == "sum":
        out = torch.relu(out)
    return out.to(x.dtype), gap(out), mean.detach(), var.detach()
