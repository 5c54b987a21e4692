"""Reference of ``norm_residual`` in plain PyTorch."""

import torch
from torch import Tensor

from dla_kernels.batch_norm import BatchNorm, across
from dla_kernels.common import gap, merge_moments, moments


def norm_residual(
    x: Tensor | None,  # [B, C, H, W]
    o: Tensor,  # [B, C, H, W]
    norm: BatchNorm,
    keep: Tensor | None,  # [B]
    relu: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """``out`` and its GAP; detached, the statistics [C] that were used and this process's share in them."""
    branch = o.to(norm.weight.dtype)
    (mean, var), share = norm.constants(), None
    if norm.training and norm.group is not None:
        mean, var, share = across(norm.group, *moments(branch), branch.numel() // branch.shape[1])
    elif norm.training:
        mean, var = merge_moments(*moments(branch))
    normed = (branch - mean[:, None, None]) * (norm.weight * torch.rsqrt(var + norm.eps))[:, None, None]
    normed = normed + norm.bias[:, None, None]
    if relu == "branch":
        normed = torch.relu(normed)
    if keep is not None:
        normed = normed * keep[:, None, None, None]
    out = normed if x is None else x.to(norm.weight.dtype) + normed
    if relu == "sum":
        out = torch.relu(out)
    return out.to((o if x is None else x).dtype), gap(out), mean.detach(), var.detach(), share


@torch.no_grad()
def update_running_stats(
    running_mean: Tensor,  # [C]
    running_var: Tensor,  # [C]
    num_batches_tracked: Tensor | None,  # []
    mean: Tensor,  # [C]
    var: Tensor,  # [C] biased
    momentum: float | None,
    count: int | Tensor,
) -> None:
    """As torch's BatchNorm does it: ``var`` unbiased, momentum None for a plain average over the batches."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is None:
        momentum = num_batches_tracked.double().reciprocal()
    for running, new in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
        running.mul_(1 - momentum).add_(new * momentum)
