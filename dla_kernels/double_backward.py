"""The fused ops have a first derivative only; whoever asks for a second one is told so."""

import torch
from torch import Tensor


class _Refuse(torch.autograd.Function):
    """Hands gradients on, and raises when they are differentiated."""

    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"{ctx.op}: a fused op has no double backward; take backend='reference' for it")


def once(op: str, grads: tuple[Tensor | None, ...], sources: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients that ``op``'s backward computed from ``sources``, guarded against being differentiated again."""
    if not torch.is_grad_enabled():  # the usual case: no graph of the backward is being built
        return grads
    given = [g for g in grads if g is not None]
    guarded = iter(_Refuse.apply(op, len(given), *given, *(s for s in sources if s is not None)))
    return tuple(None if g is None else next(guarded) for g in grads)
