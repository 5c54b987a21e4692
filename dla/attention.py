"""Layer attention of one block: its parameters, and the step from the block's map to its output."""

from math import log2

import torch
from torch import Tensor, nn

from dla_kernels import BatchNorm, layer_attention, light_update
from dla_kernels.common import accumulate_dtype
from dla_kernels.ops.layer_attention import Layer
from dla_kernels.ops.layer_attention.reference import attention_weights, queries_and_keys


def kernel_size(channels: int) -> int:
    """Length of the query and key filters along the channels: t made odd, t = int(|(log2 C + 1) / 2|)."""
    t = int(abs((log2(channels) + 1) / 2))
    return t if t % 2 else t + 1


def drop_path_factor(x: Tensor, rate: float) -> Tensor | None:
    """Drop path's random factor of each sample of x, [B]: 0, or 1 / (1 - rate); None for a rate of 0."""
    if not rate:
        return None
    p = 1 - rate
    return torch.full((x.shape[0],), p, dtype=accumulate_dtype(x), device=x.device).bernoulli().div(p)


class DropPath(nn.Module):
    """Drops a sample's residual branch in training with probability ``drop_prob``."""

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        keep = drop_path_factor(x, self.drop_prob) if self.training else None
        return x if keep is None else x * keep.to(x.dtype)[:, None, None, None]

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


class _LayerAttention(nn.Module):
    """What both forms share: filters of query, key and value, BatchNorm, drop path and the residual.

    Args:
        channels: C.
        head_dim: channels of a head; divides C.
        drop_path: probability of dropping a sample's attention output in training.
    """

    def __init__(self, channels: int, head_dim: int, drop_path: float):
        super().__init__()
        if head_dim < 1 or channels % head_dim:
            raise ValueError(f"`head_dim` must divide the {channels} channels, got {head_dim}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"`drop_path` must be in [0, 1), got {drop_path}")
        k = kernel_size(channels)
        self.query = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)
        self.key = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)
        self.value = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.head_dim = head_dim
        self.drop_path = drop_path

    def keep(self, x: Tensor) -> Tensor | None:
        """Drop path's factor of each sample, [B]; None where none is dropped."""
        return drop_path_factor(x, self.drop_path) if self.training else None

    def batch_norm(self) -> BatchNorm:
        """The BatchNorm as the ops take it."""
        return BatchNorm.of(self.bn)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, drop_path={self.drop_path}"


class BaseLayerAttention(_LayerAttention):
    """A block's layer attention with a softmax over its stage's layers (MRLA-B, DLA-B; Eq. 2)."""

    def __init__(self, channels: int, head_dim: int = 32, drop_path: float = 0.0):
        super().__init__(channels, head_dim, drop_path)

    def forward(
        self,
        x: Tensor,
        features: Tensor,
        gates: Tensor,
        key_weights: Tensor,
        prior: list[Layer],
        followers: int = 0,
        inplace: bool = False,
    ) -> tuple[Tensor, Layer]:
        """Attends from the block's map over the T layers so far, and adds the result.

        Args:
            x: [B, C, H, W] the block's map.
            features, gates, key_weights, prior, followers, inplace: see :func:`dla_kernels.layer_attention`.

        Returns:
            [B, C, H, W] the block's output, and its layer.
        """
        return layer_attention(
            x, features, gates, self.query.weight, key_weights, self.value.weight, prior, self.batch_norm(),
            self.keep(x), self.head_dim, followers, inplace=inplace,
        )  # fmt: skip

    def weights(self, features: Tensor, gates: Tensor, key_weights: Tensor) -> Tensor:
        """The attention over the T layers, [B, T, heads], of the same arguments."""
        return attention_weights(
            *queries_and_keys(features, gates, self.query.weight, key_weights), self.head_dim
        )  # fmt: skip


class LightLayerAttention(_LayerAttention):
    """A block's layer attention in its recurrent form (MRLA-L, DLA-L; Eq. 3).

    Args:
        channels, head_dim, drop_path: as above.
        carry: whether something is carried into this block, which then has a lambda, drawn from N(0, 1). A first
            block without carry has none: a parameter that never gets a gradient stops distributed training.
    """

    def __init__(self, channels: int, head_dim: int = 32, drop_path: float = 0.0, carry: bool = True):
        super().__init__(channels, head_dim, drop_path)
        self.register_parameter("lambda_", nn.Parameter(torch.randn(channels)) if carry else None)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        carried: Tensor | None,
        gate: Tensor | None,
        carry_weight: Tensor | None,
        need_o: bool = True,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Updates the attention and adds it to the block's map.

        Args:
            x: [B, C, H, W] the block's map.
            y: [B, C] its GAP.
            carried, gate, carry_weight, need_o, inplace: see :func:`dla_kernels.light_update`.

        Returns:
            The block's output [B, C, H, W] and its GAP [B, C], the attention output o [B, C, H, W] and its GAP.
        """
        return light_update(
            x, y, self.query.weight, self.key.weight, self.value.weight, self.batch_norm(),
            carried, self.lambda_, gate, carry_weight, self.keep(x), self.head_dim, need_o, inplace=inplace,
        )  # fmt: skip
