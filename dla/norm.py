"""A residual addition with its BatchNorm, on the parameters and running statistics of an ``nn.BatchNorm2d``."""

import torch
from torch import Tensor, nn

from dla_kernels import norm_residual
from dla_kernels.common import gap


def add_norm(
    bn: nn.BatchNorm2d | nn.SyncBatchNorm,
    x: Tensor,
    o: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    keep: Tensor | None = None,
    relu: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x + keep * act(bn(o)) or act(x + keep * bn(o)), and its GAP; in training ``bn`` keeps its books.

    Args:
        bn: whose weights, statistics and mode count.
        x, o, keep, relu: see :func:`dla_kernels.norm_residual`.
        mean, var: [B, C] each sample's mean and biased variance of ``o``, where its producer has computed them.

    Returns:
        [B, C, H, W] and [B, C].

    Raises:
        ValueError: one value per channel in training.
    """
    if isinstance(bn, nn.SyncBatchNorm):
        # Its statistics span processes: torch's own module gathers them.
        branch = bn(o).relu() if relu == "branch" else bn(o)
        out = x + (branch if keep is None else branch * keep.to(x.dtype)[:, None, None, None])
        out = out.relu() if relu == "sum" else out
        return out, gap(out)
    n = o.numel() // o.shape[1]
    if bn.training and n == 1:
        raise ValueError(f"BatchNorm needs more than one value per channel in training, got a map of {tuple(o.shape)}")
    if not bn.training and bn.running_mean is not None:
        mean, var = bn.running_mean, bn.running_var
    out, y, used_mean, used_var = norm_residual(x, o, bn.weight, bn.bias, mean, var, keep, bn.eps, relu)
    if bn.training and bn.running_mean is not None:
        _update_running_stats(bn, used_mean, used_var * (n / (n - 1)))
    return out, y


@torch.no_grad()
def _update_running_stats(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> None:
    """As torch does it: ``var`` unbiased, momentum None for a plain average."""
    bn.num_batches_tracked.add_(1)
    momentum = bn.num_batches_tracked.double().reciprocal() if bn.momentum is None else bn.momentum
    for running, new in ((bn.running_mean, mean), (bn.running_var, var)):
        running.mul_(1 - momentum).add_(new * momentum)
