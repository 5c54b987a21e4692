"""``norm_residual`` with its gradient, over the fused backends."""

import torch
from torch import Tensor

from dla_kernels import double_backward
from dla_kernels.native import empty_dense_like, empty_map_like, library_ops

#: Where a ReLU may stand, as the library ops count the places.
RELU = {None: 0, "branch": 1, "sum": 2}


def fake_forward(x, o, mean, var, weight, bias, keep, eps, relu):
    channels = x.shape[1]
    vectors = weight.new_empty(x.shape[:2]), weight.new_empty(channels), weight.new_empty(channels)
    return empty_map_like(x), *vectors


def fake_backward(
    grad_out, grad_y, o, out, mean, var, own_statistics, weight, bias, keep, eps, relu, need_x, need_o, need_keep
):
    return (
        empty_map_like(o) if need_x else o.new_empty(0),
        empty_map_like(o) if need_o else o.new_empty(0),
        *(empty_dense_like(t) for t in (mean, var, weight, bias)),
        mean.new_empty(o.shape[0] if need_keep else 0),
    )


#: {backend: (forward, backward)}
BACKENDS = {"native": library_ops("norm_residual", fake_forward, fake_backward)}


class NormResidual(torch.autograd.Function):
    """Saves ``o`` and vectors, and ``out`` where the ReLU follows the addition; the statistics it returns are detached.

    The gradient of ``x`` is that of ``out`` itself where neither y's nor a ReLU's is between them.
    """

    @staticmethod
    def forward(x, o, mean, var, weight, bias, keep, eps, relu, backend):
        return BACKENDS[backend][0](x, o, mean, var, weight, bias, keep, eps, RELU[relu])

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, o, mean, var, weight, bias, keep, ctx.eps, ctx.relu, ctx.backend = inputs
        out, _, used_mean, used_var = output
        ctx.mark_non_differentiable(used_mean, used_var)
        ctx.set_materialize_grads(False)
        ctx.own_statistics = mean is None
        mean, var = (used_mean, used_var) if mean is None else (mean, var)
        ctx.save_for_backward(o, out if ctx.relu == "sum" else None, mean, var, weight, bias, keep)

    @staticmethod
    def backward(ctx, grad_out: Tensor | None, grad_y: Tensor | None, *_):
        saved = ctx.saved_tensors  # once: checkpointing computes it anew at every look
        o, out, mean, var, weight, bias, keep = saved
        if grad_out is None:
            grad_out = torch.zeros_like(o)
        need_x, need_o, need_mean, need_var, need_weight, need_bias, need_keep = ctx.needs_input_grad[:7]
        passes_on = grad_y is None and ctx.relu != "sum"
        grads = BACKENDS[ctx.backend][1](
            grad_out, grad_y, o, out, mean, var, ctx.own_statistics, weight, bias, keep, ctx.eps, RELU[ctx.relu],
            need_x and not passes_on, need_o, need_keep,
        )  # fmt: skip
        grad_x, grad_o, grad_mean, grad_var, grad_weight, grad_bias, grad_keep = grads
        grads = (
            (grad_out if passes_on else grad_x) if need_x else None,
            grad_o if need_o else None,
            grad_mean if need_mean else None,
            grad_var if need_var else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            grad_keep if need_keep else None,
        )
        return *double_backward.once("norm_residual", grads, (grad_out, grad_y, *saved)), *(
            None,  # eps
            None,  # relu
            None,  # backend
        )
