"""``layer_attention`` with its gradient, over the fused backends."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dla_kernels import double_backward, native, triton
from dla_kernels.autograd import Function
from dla_kernels.batch_norm import BatchNorm, gradient_sums
from dla_kernels.native import empty_dense_like, empty_map_like
from dla_kernels.ops.light_update import function as light_update
from dla_kernels.ops.norm_residual import function as norm_residual


class Handle(NamedTuple):
    """The edge of the graph by which a later layer hands an earlier one its part of the value map's gradient.

    That gradient is an outer product, weights [B, C] times a map, and it travels in its two factors: no map is written
    for it. Both tensors only stand for the factors' shapes and take no memory.
    """

    grad: Tensor  # [B, C, H, W]
    weights: Tensor  # [B, T, C], T layers up to the later one


class Layer(NamedTuple):
    """A layer of a stage, as later layers attend to it.

    Attributes:
        value: [B, C, H, W] its value map.
        pooled: [B, C] the value map's GAP.
        handles: one for each later layer, in order; none where no gradients are taken.
    """

    value: Tensor
    pooled: Tensor
    handles: tuple[Handle, ...] = ()


def fake_forward(
    q: Tensor, k: Tensor, values: Sequence[Tensor], gates: Tensor, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_map_like(values[0]), torch.empty_like(q), torch.empty_like(q)


def fake_folded(
    q: Tensor, k: Tensor, values: Sequence[Tensor], gates: Tensor, x: Tensor, mean: Tensor, var: Tensor,
    weight: Tensor, bias: Tensor, eps: float, head_dim: int,
) -> Tensor:  # fmt: skip
    return empty_map_like(x)


def fake_backward(
    grad_out: Tensor, o: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, sum_weight: Tensor | None,
    sum_bias: Tensor | None, keep: Tensor | None, eps: float, count: int, q: Tensor, k: Tensor,
    values: Sequence[Tensor], gates: Tensor, later_grads: Sequence[Tensor], later_weights: Sequence[Tensor],
    head_dim: int, need_value: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        *(empty_dense_like(t) for t in (q, k, gates)),
        empty_map_like(o),
        empty_dense_like(gates),
        empty_map_like(o) if need_value else o.new_empty(0),
    )


#: Where the ReLU stands, as norm_residual's library ops count the places.
RELU = norm_residual.RELU["branch"]

#: {backend: its ops}
BACKENDS = {
    name: module.library_ops("layer_attention", forward=fake_forward, folded=fake_folded, backward=fake_backward)
    for name, module in (("native", native), ("triton", triton))
}


def folded(
    x: Tensor, q: Tensor, k: Tensor, gates: Tensor, value_weight: Tensor, prior: Sequence[Layer], norm: BatchNorm,
    head_dim: int, backend: str,
) -> tuple[Tensor, Layer]:  # fmt: skip
    """The op without gradients and with constant statistics: one pass after that for the value map."""
    value, pooled = light_update.value_map(backend, x, value_weight)
    values = [*(layer.value for layer in prior), value]
    out = BACKENDS[backend].folded(
        q, k, values, gates, x, *norm.constants, norm.weight, norm.bias, norm.eps, head_dim
    )  # fmt: skip
    return out, Layer(value, pooled)


def attend(
    x: Tensor, q: Tensor, k: Tensor, gates: Tensor, value_weight: Tensor, prior: Sequence[Layer], norm: BatchNorm,
    keep: Tensor | None, head_dim: int, followers: int, backend: str,
) -> tuple[Tensor, Layer, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The op under autograd: its output, its layer, and what is said of the statistics."""
    handles = [layer.handles[len(prior) - m - 1] for m, layer in enumerate(prior) if layer.handles]  # else no gradient
    out, value, pooled, *edges, _, mean, var, share = LayerAttention.call(
        x, q, k, gates, value_weight, norm.weight, norm.bias, keep, *norm.constants, norm.eps, head_dim, norm.group,
        followers, backend, len(prior), *(layer.value for layer in prior), *(t for handle in handles for t in handle),
    )  # fmt: skip
    made = tuple(Handle(*edges[i : i + 2]) for i in range(0, len(edges), 2))
    return out, Layer(value, pooled, made), mean, var, share


class LayerAttention(Function):
    """Saves ``x``, the value maps, which a stage shares, ``o`` and vectors.

    Only the layer's own value map gets its gradient here. The prior ones' part leaves by their handles as two factors,
    and what came by the handles that this layer gave to later ones is added up with its own part in one pass.
    """

    @staticmethod
    def forward(
        x, q, k, gates, value_weight, weight, bias, keep, mean, var, eps, head_dim, group, followers, backend, prior,
        *rest,
    ):  # fmt: skip
        value, pooled = light_update.value_map(backend, x, value_weight)
        o, o_mean, o_var = BACKENDS[backend].forward(q, k, (*rest[:prior], value), gates, head_dim)
        ops, share = norm_residual.BACKENDS[backend], None
        if mean is None:
            mean, var, share = norm_residual.batch_statistics(o_mean, o_var, group, norm_residual.count_of(x))
        out, _, mean, var = ops.forward(x, o, mean, var, weight, bias, keep, eps, RELU)
        batch, layers, channels = k.shape
        edges = [
            edge
            for later in range(followers)
            for edge in (
                value.new_empty(1).expand(value.shape),
                q.new_empty(1).expand(batch, layers + later + 1, channels),
            )
        ]
        return out, value, pooled, *edges, o, mean, var, share

    @staticmethod
    def setup_context(ctx, inputs, output):
        (
            x, q, k, gates, value_weight, weight, bias, keep, constant, _, ctx.eps, ctx.head_dim, ctx.group, _,
            ctx.backend, ctx.prior, *rest,
        ) = inputs  # fmt: skip
        _, value, *_, o, mean, var, share = output
        ctx.mark_non_differentiable(*(t for t in (mean, var, share, o) if t is not None))
        ctx.set_materialize_grads(False)
        ctx.own_statistics = constant is None
        ctx.handles = (len(rest) - ctx.prior) // 2
        ctx.save_for_backward(
            x, value_weight, o, mean, var, share, weight, bias, keep, q, k, gates, *rest[: ctx.prior], value
        )

    @staticmethod
    def backward(ctx, grad_out: Tensor | None, grad_read: Tensor | None, grad_pooled: Tensor | None, *edges):
        *edges, _, _, _, _ = edges  # o and the statistics are detached
        saved = ctx.saved_tensors  # once: checkpointing computes it anew at every look
        x, value_weight, o, mean, var, share, weight, bias, keep, q, k, gates, *values = saved
        if grad_out is None:
            grad_out = torch.zeros_like(o)
        later_grads = [g for g in edges[::2] if g is not None]
        later_weights = [w for w in edges[1::2] if w is not None]
        needs = ctx.needs_input_grad[:8]
        need_x, need_value, need_keep = needs[0], needs[0] or needs[4], needs[7]
        shared = mean, var, weight, bias
        grad_weight, grad_bias, grad_keep = norm_residual.BACKENDS[ctx.backend].sums(
            grad_out, None, o, None, *shared, keep, ctx.eps, RELU, need_keep
        )
        sums = gradient_sums(ctx.group, share, grad_weight, grad_bias) if ctx.own_statistics else (None, None)
        grad_q, grad_k, grad_gates, grad_o, weights, grad_value = BACKENDS[ctx.backend].backward(
            grad_out, o, *shared, *sums, keep, ctx.eps, norm_residual.count_of(o), q, k, values, gates, later_grads,
            later_weights, ctx.head_dim, need_value,
        )  # fmt: skip
        grad_x = grad_value_weight = None
        if need_value:
            grad_value = grad_value if grad_read is None else grad_value + grad_read
            grad_x, grad_value_weight = light_update.value_map_backward(
                ctx.backend, grad_out, grad_value, grad_pooled, x, values[-1], value_weight, need_x
            )
        found = grad_x, grad_q, grad_k, grad_gates, grad_value_weight, grad_weight, grad_bias, grad_keep
        grads = tuple(grad if need else None for grad, need in zip(found, needs, strict=True))
        factors = (grad_o, weights) * ctx.handles
        grads = double_backward.once(
            "layer_attention", (*grads, *factors), (grad_out, grad_read, grad_pooled, *edges, *saved)
        )
        return (
            *grads[:8],
            None,  # mean
            None,  # var
            None,  # eps
            None,  # head_dim
            None,  # group
            None,  # followers
            None,  # backend
            None,  # prior
            *(None for _ in range(ctx.prior)),  # the prior value maps: by their handles
            *grads[8:],
        )
