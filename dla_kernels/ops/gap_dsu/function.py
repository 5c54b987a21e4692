"""``gap_dsu`` with its gradient, over the fused backends."""

import torch
from torch import Tensor

from dla_kernels import double_backward
from dla_kernels.native import empty_dense_like, library_ops


def fake_forward(x, h, c, weights, activation):
    return empty_dense_like(h), empty_dense_like(h), empty_dense_like(c)


def fake_backward(grad_y, grad_h, grad_c, y, h, c, weights, activation):
    return empty_dense_like(y), empty_dense_like(h), empty_dense_like(c), [empty_dense_like(w) for w in weights]


#: {backend: (forward, backward)}
BACKENDS = {"native": library_ops("gap_dsu", fake_forward, fake_backward)}


class GapDsu(torch.autograd.Function):
    """Saves vectors and weights; the gradient of a map is one number for each channel, handed on without being
    written out."""

    @staticmethod
    def forward(x, h, c, activation, backend, *weights):
        return BACKENDS[backend][0](x, h, c, weights, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, h, c, ctx.activation, ctx.backend, *weights = inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[0], h, c, *weights)

    @staticmethod
    def backward(ctx, grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None):
        saved = ctx.saved_tensors  # once: checkpointing computes it anew at every look
        y, h, c, *weights = saved
        grad_x, *grads, grad_weights = BACKENDS[ctx.backend][1](
            grad_y, grad_h, grad_c, y, h, c, weights, ctx.activation
        )
        if len(ctx.shape) == 4:
            grad_x = grad_x.div(ctx.shape[2] * ctx.shape[3]).to(ctx.dtype)[..., None, None].expand(ctx.shape)
        needs = ctx.needs_input_grad[:3] + ctx.needs_input_grad[5:]
        grads = tuple(g if n else None for g, n in zip((grad_x, *grads, *grad_weights), needs, strict=True))
        grads = double_backward.once("gap_dsu", grads, (grad_y, grad_h, grad_c, *saved))
        return (
            *grads[:3],
            None,  # activation
            None,  # backend
            *grads[3:],
        )
