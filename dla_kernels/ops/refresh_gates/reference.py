"""Reference of ``refresh_gates`` in plain PyTorch, in the paper's notation."""

from collections.abc import Sequence

from torch import Tensor

from dla_kernels.dsu import DsuWeights
from dla_kernels.ops.gap_dsu.reference import dsu


def refresh_gates(
    features: Tensor,  # [B, T, C]
    gates: Tensor,  # [B, T, C]
    h: Tensor,  # [B, C]
    c: Tensor,  # [B, C]
    weights: Sequence[Tensor] | DsuWeights,
    activation: str,
    gate: str,
) -> Tensor:
    y = features * gates
    hidden, context = dsu(y, h[:, None].expand_as(y), c[:, None].expand_as(y), weights, activation)
    return gates * (context if gate == "context" else hidden)
