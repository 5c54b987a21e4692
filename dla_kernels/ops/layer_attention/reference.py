"""Reference of ``layer_attention`` in plain PyTorch, in the paper's notation."""

from collections.abc import Sequence

from torch import Tensor

from dla_kernels.common import accumulate_dtype, expand_heads, moments


def attention_weights(
    q: Tensor,  # [B, C]
    k: Tensor,  # [B, T, C]
    head_dim: int,
) -> Tensor:
    """softmax over the T layers of Q K^T / sqrt(D) (Eq. 2): [B, T, heads]."""
    scores = (q[:, None] * k).unflatten(-1, (-1, head_dim)).sum(-1)
    return (scores * head_dim**-0.5).softmax(dim=1)


def layer_attention(
    q: Tensor,  # [B, C]
    k: Tensor,  # [B, T, C]
    values: Sequence[Tensor],  # T of [B, C, H, W]
    gates: Tensor,  # [B, T, C]
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = expand_heads(attention_weights(q, k, head_dim), head_dim) * gates
    dtype = accumulate_dtype(values[0])
    # One product a layer, not a stack of maps: autograd then keeps each value map once, however many layers read it.
    o = sum(w[..., None, None] * v.to(dtype) for w, v in zip(weights.unbind(1), values, strict=True))
    return o.to(values[0].dtype), *moments(o)
