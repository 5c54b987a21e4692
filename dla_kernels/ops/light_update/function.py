"""``light_update`` with its gradient, over the fused backends."""

import torch
from torch import Tensor

from dla_kernels import double_backward, native, triton
from dla_kernels.autograd import Function
from dla_kernels.batch_norm import BatchNorm, gradient_sums
from dla_kernels.native import empty_dense_like, empty_map_like
from dla_kernels.ops.norm_residual import function as norm_residual


def fake_forward(
    x: Tensor, y: Tensor, query_weight: Tensor, key_weight: Tensor, value_weight: Tensor, carried: Tensor | None,
    carry_scale: Tensor | None, gate: Tensor | None, carry_weight: Tensor | None, head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return empty_map_like(x), y.new_empty(x.shape[:2]), y.new_empty(x.shape[:2])


def fake_folded(
    x: Tensor, y: Tensor, query_weight: Tensor, key_weight: Tensor, value_weight: Tensor, carried: Tensor | None,
    carry_scale: Tensor | None, gate: Tensor | None, carry_weight: Tensor | None, mean: Tensor, var: Tensor,
    weight: Tensor, bias: Tensor, eps: float, head_dim: int, need_o: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    o = empty_map_like(x) if need_o else x.new_empty(0)
    return empty_map_like(x), y.new_empty(x.shape[:2]), o, y.new_empty(x.shape[:2])


def fake_folded_(*args) -> tuple[Tensor, Tensor, Tensor]:
    *given, need_o, over_carried = args
    return fake_folded(*given, need_o and not over_carried)[1:]


def fake_backward(
    grad_out: Tensor, grad_out_mean: Tensor | None, grad_o: Tensor | None, grad_o_mean: Tensor | None, o: Tensor,
    mean: Tensor, var: Tensor, weight: Tensor, sum_weight: Tensor | None, sum_bias: Tensor | None,
    keep: Tensor | None, eps: float, count: int, x: Tensor, y: Tensor, query_weight: Tensor, key_weight: Tensor,
    value_weight: Tensor, carried: Tensor | None, carry_scale: Tensor | None, gate: Tensor | None,
    carry_weight: Tensor | None, head_dim: int, need_x: bool, need_carried: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def map_if(need):
        return empty_map_like(o) if need else o.new_empty(0)

    def like(t):
        return y.new_empty(0) if t is None else empty_dense_like(t)

    return (
        map_if(need_x),
        *(like(t) for t in (y, query_weight, key_weight, value_weight)),
        map_if(need_carried),
        *(like(t) for t in (carry_scale, gate, carry_weight)),
    )


_fakes = {"forward": fake_forward, "folded": fake_folded, "backward": fake_backward}
#: {backend: its ops}
BACKENDS = {
    "native": native.library_ops("light_update", **_fakes, folded_=fake_folded_),
    "triton": triton.library_ops("light_update", **_fakes),
}


def folded(
    x, y, query_weight, key_weight, value_weight, carried, carry_scale, gate, carry_weight,
    norm: BatchNorm, head_dim: int, need_o: bool, backend: str, overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """The op without gradients and with constant statistics: one pass; its output in the place of ``x`` and o in that
    of ``carried``, or both in new maps."""
    given = (
        x, y, query_weight, key_weight, value_weight, carried, carry_scale, gate, carry_weight, *norm.constants(),
        norm.weight, norm.bias, norm.eps, head_dim, need_o,
    )  # fmt: skip
    if overwrite:
        # A filter would read what is written over.
        over_carried = need_o and carried is not None and carry_weight is None
        out, (out_mean, o, o_mean) = x, BACKENDS[backend].folded_(*given, over_carried)
        norm_residual.was_overwritten(x)
        if over_carried:
            o = carried
            norm_residual.was_overwritten(carried)
    else:
        out, out_mean, o, o_mean = BACKENDS[backend].folded(*given)
    return out, out_mean, o if need_o else None, o_mean


class LightUpdate(Function):
    """Saves ``x``, ``carried``, ``o`` and vectors; the value map is never written, not even for the backward.

    One pass takes the gradients of ``out`` and of ``o`` together, through the residual, BatchNorm and the attention.
    """

    @staticmethod
    def forward(
        x, y, query_weight, key_weight, value_weight, carried, carry_scale, gate, carry_weight, weight, bias, keep,
        mean, var, eps, head_dim, group, backend,
    ):  # fmt: skip
        attention = x, y, query_weight, key_weight, value_weight, carried, carry_scale, gate, carry_weight
        o, o_mean, o_var = BACKENDS[backend].forward(*attention, head_dim)
        ops, share = norm_residual.BACKENDS[backend], None
        if mean is None:
            mean, var, share = norm_residual.batch_statistics(o_mean, o_var, group, norm_residual.count_of(x))
        out, out_mean, mean, var = ops.forward(x, o, mean, var, weight, bias, keep, eps, 0)
        return out, out_mean, o, o_mean, mean, var, share

    @staticmethod
    def setup_context(ctx, inputs, output):
        *attention, weight, bias, keep, constant, _, ctx.eps, ctx.head_dim, ctx.group, ctx.backend = inputs
        _, _, o, _, mean, var, share = output
        ctx.mark_non_differentiable(*(t for t in (mean, var, share) if t is not None))
        ctx.set_materialize_grads(False)
        ctx.own_statistics = constant is None
        ctx.save_for_backward(o, mean, var, share, weight, bias, keep, *attention)

    @staticmethod
    def backward(ctx, grad_out, grad_out_mean, grad_o, grad_o_mean, *_):
        saved = ctx.saved_tensors  # once: checkpointing computes it anew at every look
        o, mean, var, share, weight, bias, keep, *attention = saved
        if grad_out is None:
            grad_out = torch.zeros_like(o)
        *needs, need_weight, need_bias, need_keep = ctx.needs_input_grad[:12]
        grad_weight, grad_bias, grad_keep = norm_residual.BACKENDS[ctx.backend].sums(
            grad_out, grad_out_mean, o, None, mean, var, weight, bias, keep, ctx.eps, 0, need_keep
        )
        sums = gradient_sums(ctx.group, share, grad_weight, grad_bias) if ctx.own_statistics else (None, None)
        grads = BACKENDS[ctx.backend].backward(
            grad_out, grad_out_mean, grad_o, grad_o_mean, o, mean, var, weight, *sums, keep, ctx.eps,
            norm_residual.count_of(o), *attention, ctx.head_dim, needs[0], needs[5],
        )  # fmt: skip
        grads = (
            *(g if need else None for g, need in zip(grads, needs, strict=True)),
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            grad_keep if need_keep else None,
        )
        incoming = grad_out, grad_out_mean, grad_o, grad_o_mean
        return *double_backward.once("light_update", grads, (*incoming, *saved)), *(
            None,  # mean
            None,  # var
            None,  # eps
            None,  # head_dim
            None,  # group
            None,  # backend
        )
