"""Reference of ``gap_dsu`` in plain PyTorch, in the paper's notation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dla_kernels.common import ACTIVATIONS, gap, without_autocast
from dla_kernels.dsu import DsuWeights


@without_autocast
def dsu(
    y: Tensor,  # [..., C]
    h: Tensor,  # [..., C]
    c: Tensor,  # [..., C]
    weights: Sequence[Tensor] | DsuWeights,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """One step of the Dynamic Sharing Unit (Eq. 7, 8, 9): the new hidden state and context, both [..., C]."""
    weights = [w.to(y.dtype) for w in (weights.unpack() if isinstance(weights, DsuWeights) else weights)]
    if len(weights) == 3:
        w1, w2, b2 = weights
        s = torch.relu(F.linear(torch.cat([h, y], dim=-1), w1))
        candidate, i, f = F.linear(s, w2, b2).chunk(3, dim=-1)
    else:
        from_y, from_h = (
            F.linear(torch.relu(F.linear(v, w1, b1)), w2, b2)
            for v, (w1, b1, w2, b2) in ((y, weights[:4]), (h, weights[4:]))
        )
        i, f, candidate = (from_y + from_h).chunk(3, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(candidate)
    return ACTIVATIONS[activation](c), c


def gap_dsu(
    x: Tensor,  # [B, C, H, W] or [B, C]
    h: Tensor,  # [B, C]
    c: Tensor,  # [B, C]
    weights: Sequence[Tensor] | DsuWeights,
    activation: str,
    carried: Tensor | None,  # [B, C]
    gate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    y = gap(x) if x.dim() == 4 else x
    h, c = dsu(y, h, c, weights, activation)
    if carried is None:
        return y, h, c, None
    hidden, context = dsu(carried, h, c, weights, activation)
    return y, h, c, context if gate == "context" else hidden
