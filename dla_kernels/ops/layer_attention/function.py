"""``layer_attention`` with its gradient, over the fused backends."""

import torch
from torch import Tensor

from dla_kernels import double_backward
from dla_kernels.native import empty_dense_like, empty_map_like, library_ops


def fake_forward(q, k, values, gates, head_dim):
    return empty_map_like(values[0]), torch.empty_like(q), torch.empty_like(q)


def fake_backward(grad_o, grad_mean, grad_var, o, mean, q, k, values, gates, head_dim, need_values):
    return (
        *(empty_dense_like(t) for t in (q, k, gates)),
        [empty_map_like(o) for _ in values if need_values],
    )


#: {backend: (forward, backward)}
BACKENDS = {"native": library_ops("layer_attention", fake_forward, fake_backward)}


class LayerAttention(torch.autograd.Function):
    """Saves the value maps, which a stage shares, ``o`` and vectors. The value maps get their gradients all or none."""

    @staticmethod
    def forward(q, k, gates, head_dim, backend, *values):
        return BACKENDS[backend][0](q, k, values, gates, head_dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, gates, ctx.head_dim, ctx.backend, *values = inputs
        o, mean, _ = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(o, mean, q, k, gates, *values)

    @staticmethod
    def backward(ctx, grad_o: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None):
        saved = ctx.saved_tensors  # once: checkpointing computes it anew at every look
        o, mean, q, k, gates, *values = saved
        if grad_o is None:
            grad_o = torch.zeros_like(o)
        needs = ctx.needs_input_grad[:3] + ctx.needs_input_grad[5:]
        *grads, grad_values = BACKENDS[ctx.backend][1](
            grad_o, grad_mean, grad_var, o, mean,
            q, k, values, gates, ctx.head_dim, any(needs[3:]),
        )  # fmt: skip
        grads += grad_values or [None] * len(values)
        grads = tuple(g if need else None for g, need in zip(grads, needs, strict=True))
        grads = double_backward.once("layer_attention", grads, (grad_o, grad_mean, grad_var, *saved))
        return (
            *grads[:3],
            None,  # head_dim
            None,  # backend
            *grads[3:],
        )
