"""``refresh_gates`` with its gradient, over the fused backends."""

import torch
from torch import Tensor

from dla_kernels import double_backward
from dla_kernels.native import empty_dense_like, library_ops


def fake_forward(features, gates, h, c, weights, activation, of_context):
    return empty_dense_like(gates)


def fake_backward(grad, features, gates, h, c, weights, activation, of_context):
    return *(empty_dense_like(t) for t in (features, gates, h, c)), [empty_dense_like(w) for w in weights]


#: {backend: (forward, backward)}
BACKENDS = {"native": library_ops("refresh_gates", fake_forward, fake_backward)}


class RefreshGates(torch.autograd.Function):
    """Saves its arguments: what a step computes on its way is computed again."""

    @staticmethod
    def forward(features, gates, h, c, activation, of_context, backend, *weights):
        return BACKENDS[backend][0](features, gates, h, c, weights, activation, of_context)

    @staticmethod
    def setup_context(ctx, inputs, output):
        features, gates, h, c, ctx.activation, ctx.of_context, ctx.backend, *weights = inputs
        ctx.save_for_backward(features, gates, h, c, *weights)

    @staticmethod
    def backward(ctx, grad: Tensor):
        saved = ctx.saved_tensors  # once: checkpointing computes it anew at every look
        features, gates, h, c, *weights = saved
        *grads, grad_weights = BACKENDS[ctx.backend][1](
            grad, features, gates, h, c, weights, ctx.activation, ctx.of_context
        )
        needs = ctx.needs_input_grad[:4] + ctx.needs_input_grad[7:]
        grads = tuple(g if n else None for g, n in zip((*grads, *grad_weights), needs, strict=True))
        grads = double_backward.once("refresh_gates", grads, (grad, *saved))
        return (
            *grads[:4],
            None,  # activation
            None,  # of_context
            None,  # backend
            *grads[4:],
        )
