"""BatchNorm as the ops take it: what ``torch.nn.functional.batch_norm`` takes, in one tuple."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class BatchNorm(NamedTuple):
    """The parameters, statistics and mode of a BatchNorm over the C channels of a map.

    Attributes:
        weight, bias: [C] scale and shift, of any floating-point dtype.
        running_mean, running_var: [C] the running statistics; none where none are kept. In training an op writes to
            them, as ``torch.nn.BatchNorm2d`` does.
        num_batches_tracked: [] an integer that training counts up, or none.
        training: whether the batch's own statistics normalise it, else the running ones.
        momentum: of the running averages; None for a plain average over all batches.
        eps: added to the variance.
        group: processes over whose batches together the statistics are taken (SyncBatchNorm); None for this one's.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, module: nn.BatchNorm2d | nn.SyncBatchNorm) -> "BatchNorm":
        """The arguments that stand for an affine module in its present mode."""
        group = None
        if isinstance(module, nn.SyncBatchNorm) and module.training and dist.is_initialized():
            group = module.process_group or dist.group.WORLD
            group = group if dist.get_world_size(group) > 1 else None
        # An attribute of a module is found after three searches, which for all five takes as long as an op's checks.
        held = {**module._parameters, **module._buffers}
        tensors = [held[name] if name in held else getattr(module, name) for name in cls._fields[:5]]
        training = module.training or tensors[2] is None
        return cls(*tensors, training, module.momentum, module.eps, group)

    def to(self, dtype: torch.dtype) -> "BatchNorm":
        """With weight, bias and constant statistics in ``dtype``; running ones that training writes keep their own."""
        if self.weight.dtype == self.bias.dtype == dtype and (
            self.training or self.running_mean.dtype == self.running_var.dtype == dtype
        ):
            return self
        running = self.running_mean, self.running_var
        if not self.training:
            running = (t.to(dtype) for t in running)
        return BatchNorm(self.weight.to(dtype), self.bias.to(dtype), *running, *self[4:])

    # No property: torch.compile of torch 2.10 sees none of a named tuple.
    def constants(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The statistics [C] that the op takes as constants; none in training."""
        return (None, None) if self.training else (self.running_mean, self.running_var)


def across(group: dist.ProcessGroup, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merges the statistics of all processes of ``group`` by the law of total variance.

    Args:
        mean, var: [B, C] this process's.
        count: values per channel behind them.

    Returns:
        The merged mean and variance [C], and this process's share of all values, [].
    """
    own = torch.stack([mean.mean(0), var.mean(0) + mean.var(0, correction=0), mean.new_full(mean.shape[1:], count)])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    means, variances, counts = torch.stack(gathered, dim=1)
    parts = counts / counts.sum(0)
    merged = (parts * means).sum(0)
    return merged, (parts * (variances + (means - merged).square())).sum(0), count / counts[:, 0].sum()


def gradient_sums(
    group: dist.ProcessGroup | None, share: Tensor | None, grad_weight: Tensor, grad_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """What flows back through the statistics, [C] twice: the sums of all processes, as this one's part of the count.

    A sum over all processes divided by all values is ``share`` of it divided by this process's own.
    """
    if group is None:
        return grad_weight, grad_bias
    sums = torch.stack([grad_weight, grad_bias])
    dist.all_reduce(sums, group=group)
    return tuple(sums * share)
