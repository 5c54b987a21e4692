"""What more than one op needs: precision rules, global average pooling, the filter along channels."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: The choices for sigma, the function from the context c to the hidden state h (the paper's Table 5).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.clone,  # a tensor of its own: compilers do not take one for two arguments
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over ``x`` and of recurrent state beside it: float64 for float64 maps, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def in_dtype(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``t.to(dtype)``, which takes its time even where there is nothing to do."""
    return t if t is None or t.dtype == dtype else t.to(dtype)


def constant_to_a_compiler(function: Callable) -> Callable:
    """What ``torch.compiler.assume_constant_result`` does, without loading the compiler for it."""
    function._dynamo_marked_constant = True
    return function


@constant_to_a_compiler  # that of torch 2.11 does not see into it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def without_autocast(function: Callable) -> Callable:
    """Runs ``function``, whose first argument is a tensor, with autocast off.

    Autocast would run the state's small matrix products in bfloat16; the ops choose their own precision.
    """

    @functools.wraps(function)
    def run(x: Tensor, *args, **kwargs):
        if not _has_autocast(x.device.type):  # the meta device
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return run


def gap(x: Tensor) -> Tensor:
    """Global average pooling, Eq. 4: (B, C, H, W) -> (B, C), accumulated and returned in the state's dtype."""
    return x.mean((2, 3), dtype=accumulate_dtype(x))


@without_autocast
def channel_conv(y: Tensor, weight: Tensor) -> Tensor:
    """Slides one filter for each layer along the channels: queries and keys of layer attention.

    Args:
        y: [B, T, C] pooled features of T layers.
        weight: [T, 1, k] the layers' filters, k odd.

    Returns:
        [B, T, C], zero-padded at both ends.
    """
    return F.conv1d(y, weight.to(y.dtype), padding=weight.shape[-1] // 2, groups=weight.shape[0])


def depthwise3x3(x: Tensor, weight: Tensor) -> Tensor:
    """[B, C, H, W] convolved channel by channel with [C, 1, 3, 3], zero-padded by one."""
    return F.conv2d(x, weight.to(x.dtype), padding=1, groups=x.shape[1])


def moments(o: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each sample's channels: (B, C, H, W) -> two of (B, C).

    The first is GAP(o), which the next block's gate reads; both together give BatchNorm its batch statistics, see
    :func:`merge_moments`.
    """
    var, mean = torch.var_mean(o, (2, 3), correction=0)
    return mean, var


def as_stored(o: Tensor, dtype: torch.dtype) -> Tensor:
    """``o`` with the values that a map of ``dtype`` keeps of it, in its own precision; its gradient is not rounded."""
    return o if o.dtype == dtype else o + (o.to(dtype).to(o.dtype) - o).detach()


def merge_moments(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Batch statistics from each sample's: [B, C] twice -> [C] twice.

    By the law of total variance, which loses no digits as a sum of squares would.
    """
    return mean.mean(0), var.mean(0) + mean.var(0, correction=0)


def expand_heads(per_head: Tensor, head_dim: int) -> Tensor:
    """[..., heads] -> [..., C]: each head's value for all of its channels."""
    return per_head.repeat_interleave(head_dim, dim=-1)
