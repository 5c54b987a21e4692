"""``light_update`` with its gradient, over the fused backends."""

import torch
from torch import Tensor

from dla_kernels import double_backward
from dla_kernels.native import empty_dense_like, empty_map_like, library_ops


def fake_forward(x, q, k, value_weight, carried, carry_scale, gate, carry_weight, head_dim):
    return empty_map_like(x), q.new_empty(x.shape[:2]), q.new_empty(x.shape[:2])


def fake_backward(
    grad_o, grad_mean, grad_var, o, mean, x, q, k, value_weight, carried, carry_scale, gate, carry_weight,
    head_dim, need_x, need_carried,
):  # fmt: skip
    def like(t):
        return q.new_empty(0) if t is None else empty_dense_like(t)

    return (
        empty_map_like(o) if need_x else o.new_empty(0),
        like(q),
        like(k),
        like(value_weight),
        empty_map_like(o) if need_carried else o.new_empty(0),
        like(carry_scale),
        like(gate),
        like(carry_weight),
    )


#: {backend: (forward, backward)}
BACKENDS = {"native": library_ops("light_update", fake_forward, fake_backward)}


class LightUpdate(torch.autograd.Function):
    """Saves ``x``, ``carried``, ``o`` and vectors; the value map is never written, not even for the backward."""

    @staticmethod
    def forward(x, q, k, value_weight, carried, carry_scale, gate, carry_weight, head_dim, backend):
        return BACKENDS[backend][0](x, q, k, value_weight, carried, carry_scale, gate, carry_weight, head_dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, q, k, value_weight, carried, carry_scale, gate, carry_weight, ctx.head_dim, ctx.backend = inputs
        o, mean, _ = output
        _, need_q, need_k, need_value_weight, _, need_scale, need_gate, need_carry_weight = ctx.needs_input_grad[:8]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if need_q or need_k or need_value_weight else None,
            carried if need_scale or need_gate or need_carry_weight else None,
            o, mean, q, k, value_weight, carry_scale, gate, carry_weight,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, grad_o: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None):
        saved = ctx.saved_tensors  # once: checkpointing computes it anew at every look
        x, carried, o, mean, q, k, value_weight, carry_scale, gate, carry_weight = saved
        if grad_o is None:
            grad_o = torch.zeros_like(o)
        needs = ctx.needs_input_grad[:8]
        grads = BACKENDS[ctx.backend][1](
            grad_o, grad_mean, grad_var, o, mean,
            x, q, k, value_weight, carried, carry_scale, gate, carry_weight, ctx.head_dim, needs[0], needs[4],
        )  # fmt: skip
        grads = tuple(g if need else None for g, need in zip(grads, needs, strict=True))
        return *double_backward.once("light_update", grads, (grad_o, grad_mean, grad_var, *saved)), *(
            None,  # head_dim
            None,  # backend
        )
