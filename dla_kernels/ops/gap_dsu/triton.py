"""``gap_dsu`` in Triton."""

import torch
from torch import Tensor

from dla_kernels.triton.dsu import Step
from dla_kernels.triton.maps import dense, moments, walkable


def forward(
    x: Tensor,  # [B, C, H, W] or [B, C]
    h: Tensor,  # [B, C]
    c: Tensor,  # [B, C]
    carried: Tensor | None,  # [B, C]
    weights: Tensor,  # [n]
    joint: bool,
    activation: int,
    of_context: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, c, weights = dense(h), dense(c), dense(weights)
    if x.dim() == 4:
        y = pooled = torch.empty_like(h)
        moments(walkable(x), y, None)
    else:
        y, pooled = dense(x), h.new_empty(0)
    h, c = Step(y, h, c, weights, joint, activation).state()
    if carried is None:
        return pooled, h, c, h.new_empty(0)
    return pooled, h, c, Step(dense(carried), h, c, weights, joint, activation).gate(of_context)


def backward(
    grad_y: Tensor | None,  # [B, C]
    grad_h: Tensor | None,  # [B, C]
    grad_c: Tensor | None,  # [B, C]
    grad_gate: Tensor | None,  # [B, C]
    y: Tensor,  # [B, C]
    h: Tensor,  # [B, C]
    c: Tensor,  # [B, C]
    carried: Tensor | None,  # [B, C]
    weights: Tensor,  # [n]
    joint: bool,
    activation: int,
    of_context: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, h, c, weights = dense(y), dense(h), dense(c), dense(weights)
    grad_h, grad_c = dense(grad_h), dense(grad_c)
    grad_carried, grad_weights = h.new_empty(0), torch.empty_like(weights)
    first, later = Step(y, h, c, weights, joint, activation), None
    if carried is not None and grad_gate is None:
        grad_carried = torch.zeros_like(carried, memory_format=torch.contiguous_format)
    elif carried is not None:
        later = torch.empty_like(weights)
        grad_carried, *grads, _ = Step(dense(carried), *first.state(), weights, joint, activation).backward(
            later, grad_gate=dense(grad_gate), of_context=of_context
        )
        grad_h, grad_c = (g if given is None else given + g for given, g in zip((grad_h, grad_c), grads, strict=True))
    of_y, grad_h, grad_c, _ = first.backward(grad_weights, grad_h, grad_c)
    return (
        of_y if grad_y is None else of_y + grad_y,
        grad_h,
        grad_c,
        grad_carried,
        grad_weights if later is None else grad_weights + later,
    )
