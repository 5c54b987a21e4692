"""``refresh_gates`` in Triton."""

import torch
from torch import Tensor

from dla_kernels.triton.dsu import Step
from dla_kernels.triton.maps import dense


def forward(
    features: Tensor,  # [B, T, C]
    gates: Tensor,  # [B, T, C]
    h: Tensor,  # [B, C]
    c: Tensor,  # [B, C]
    weights: Tensor,  # [n]
    joint: bool,
    activation: int,
    of_context: bool,
) -> Tensor:
    rows = dense(gates).flatten(0, 1)
    step = Step(dense(features).flatten(0, 1) * rows, dense(h), dense(c), dense(weights), joint, activation)
    return step.gate(of_context, rows).view(gates.shape)


def backward(
    grad: Tensor,  # [B, T, C]
    features: Tensor,  # [B, T, C]
    gates: Tensor,  # [B, T, C]
    h: Tensor,  # [B, C]
    c: Tensor,  # [B, C]
    weights: Tensor,  # [n]
    joint: bool,
    activation: int,
    of_context: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad, features, rows = (dense(t).flatten(0, 1) for t in (grad, features, gates))
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    step = Step(features * rows, dense(h), dense(c), dense(weights), joint, activation)
    grad_y, grad_h, grad_c, grad_rows = step.backward(
        grad_weights, grad_gate=grad, of_context=of_context, factor=rows
    )  # fmt: skip
    grad_features = grad_y * rows
    grad_rows.addcmul_(grad_y, features)
    return grad_features.view(gates.shape), grad_rows.view(gates.shape), grad_h, grad_c, grad_weights
