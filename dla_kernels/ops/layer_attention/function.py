"""``layer_attention`` with its gradient, over the fused backends."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dla_kernels import double_backward, native, triton
from dla_kernels.autograd import Function
from dla_kernels.batch_norm import BatchNorm, gradient_sums
from dla_kernels.native import empty_dense_like, empty_map_like
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
        key: [B, C] its key, before any refresh.
        handles: one for each later layer, in order; none where no gradients are taken.
    """

    value: Tensor
    pooled: Tensor
    key: Tensor
    handles: tuple[Handle, ...] = ()


def fake_forward(
    features: Tensor, gates: Tensor, query_weight: Tensor, key_weights: Tensor, x: Tensor, value_weight: Tensor,
    prior: Sequence[Tensor], head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mean, var, pooled, key, q = (features.new_empty(x.shape[:2]) for _ in range(5))
    return empty_map_like(x), mean, var, empty_map_like(x), pooled, key, q, empty_dense_like(features)


def fake_folded(
    features: Tensor, gates: Tensor, query_weight: Tensor, key_weights: Tensor, x: Tensor, value_weight: Tensor,
    prior: Sequence[Tensor], mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float, head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    pooled, key = (features.new_empty(x.shape[:2]) for _ in range(2))
    return empty_map_like(x), empty_map_like(x), pooled, key


def fake_folded_(*args) -> tuple[Tensor, Tensor, Tensor]:
    return fake_folded(*args)[1:]


def fake_backward(
    grad_out: Tensor, grad_read: Tensor | None, grad_pooled: Tensor | None, grad_key: Tensor | None, o: Tensor,
    mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, sum_weight: Tensor | None, sum_bias: Tensor | None,
    keep: Tensor | None, eps: float, count: int, q: Tensor, k: Tensor, features: Tensor, gates: Tensor,
    query_weight: Tensor, key_weights: Tensor, x: Tensor, value_weight: Tensor, values: Sequence[Tensor],
    later_grads: Sequence[Tensor], later_weights: Sequence[Tensor], head_dim: int, need_x: bool, need_value: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        empty_map_like(o) if need_x else o.new_empty(0),
        *(empty_dense_like(t) for t in (features, gates, query_weight, key_weights)),
        empty_dense_like(value_weight) if need_value else value_weight.new_empty(0),
        empty_map_like(o),
        empty_dense_like(gates),
    )


#: Where the ReLU stands, as norm_residual's library ops count the places.
RELU = norm_residual.RELU["branch"]

_fakes = {"forward": fake_forward, "folded": fake_folded, "backward": fake_backward}
#: {backend: its ops}
BACKENDS = {
    "native": native.library_ops("layer_attention", **_fakes, folded_=fake_folded_),
    "triton": triton.library_ops("layer_attention", **_fakes),
}


def folded(
    x: Tensor, features: Tensor, gates: Tensor, query_weight: Tensor, key_weights: Tensor, value_weight: Tensor,
    prior: Sequence[Tensor], norm: BatchNorm, head_dim: int, backend: str, overwrite: bool,
) -> tuple[Tensor, Layer]:  # fmt: skip
    """The op without gradients and with constant statistics; its output in the place of ``x`` or in a new map."""
    given = (
        features, gates, query_weight, key_weights, x, value_weight, prior, *norm.constants(), norm.weight, norm.bias,
        norm.eps, head_dim,
    )  # fmt: skip
    if not overwrite:
        out, *layer = BACKENDS[backend].folded(*given)
        return out, Layer(*layer)
    layer = BACKENDS[backend].folded_(*given)
    norm_residual.was_overwritten(x)
    return x, Layer(*layer)


def attend(
    x: Tensor, features: Tensor, gates: Tensor, query_weight: Tensor, key_weights: Tensor, value_weight: Tensor,
    prior: Sequence[Layer], norm: BatchNorm, keep: Tensor | None, head_dim: int, followers: int, backend: str,
) -> tuple[Tensor, Layer, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The op under autograd: its output, its layer, and what is said of the statistics."""
    handles = [layer.handles[len(prior) - m - 1] for m, layer in enumerate(prior) if layer.handles]  # else no gradient
    out, value, pooled, key, *edges, _, _, _, mean, var, share = LayerAttention.call(
        x, features, gates, query_weight, key_weights, value_weight, norm.weight, norm.bias, keep, *norm.constants(),
        norm.eps, head_dim, norm.group, followers, backend, len(prior), *(layer.value for layer in prior),
        *(t for handle in handles for t in handle),
    )  # fmt: skip
    made = tuple(Handle(*edges[i : i + 2]) for i in range(0, len(edges), 2))
    return out, Layer(value, pooled, key, made), mean, var, share


class LayerAttention(Function):
    """Saves ``x``, the value maps, which a stage shares, ``o`` and vectors.

    Only the layer's own value map gets its gradient here. The prior ones' part leaves by their handles as two factors,
    and what came by the handles that this layer gave to later ones is added up with its own part in one pass.
    """

    @staticmethod
    def forward(
        x, features, gates, query_weight, key_weights, value_weight, weight, bias, keep, mean, var, eps, head_dim,
        group, followers, backend, prior, *rest,
    ):  # fmt: skip
        ops, norm_ops, share = BACKENDS[backend], norm_residual.BACKENDS[backend], None
        o, o_mean, o_var, value, pooled, key, q, k = ops.forward(
            features, gates, query_weight, key_weights, x, value_weight, rest[:prior], head_dim
        )
        if mean is None:
            mean, var, share = norm_residual.batch_statistics(o_mean, o_var, group, norm_residual.count_of(x))
        out, _, mean, var = norm_ops.forward(x, o, mean, var, weight, bias, keep, eps, RELU)
        batch, layers, channels = k.shape
        edges = []
        if followers:
            of_map, of_weights = value.new_empty(1), q.new_empty(1)
            for later in range(followers):
                edges += of_map.expand(value.shape), of_weights.expand(batch, layers + later + 1, channels)
        return out, value, pooled, key, *edges, q, k, o, mean, var, share

    @staticmethod
    def setup_context(ctx, inputs, output):
        given, rest = inputs[:17], inputs[17:]
        *attention, weight, bias, keep, constant, _, ctx.eps, ctx.head_dim, ctx.group, _, ctx.backend, prior = given
        _, value, _, _, *_, q, k, o, mean, var, share = output
        ctx.mark_non_differentiable(*(t for t in (q, k, mean, var, share, o) if t is not None))
        ctx.set_materialize_grads(False)
        ctx.own_statistics = constant is None
        ctx.prior, ctx.handles = prior, (len(rest) - prior) // 2
        ctx.save_for_backward(*attention, o, mean, var, share, weight, bias, keep, q, k, *rest[:prior], value)

    @staticmethod
    def backward(
        ctx, grad_out: Tensor | None, grad_read: Tensor | None, grad_pooled: Tensor | None, grad_key: Tensor | None,
        *edges,
    ):  # fmt: skip
        edges = edges[: 2 * (len(edges) // 2 - 3)]  # the other six are detached
        saved = ctx.saved_tensors  # once: checkpointing computes it anew at every look
        (x, *attention, value_weight, o, mean, var, share, weight, bias, keep, q, k), values = saved[:15], saved[15:]
        if grad_out is None:
            grad_out = torch.zeros_like(o)
        later_grads = [g for g in edges[::2] if g is not None]
        later_weights = [w for w in edges[1::2] if w is not None]
        needs = ctx.needs_input_grad
        need_x, need_value, need_keep = needs[0], needs[0] or needs[5], needs[8]
        shared, ops = (mean, var, weight, bias), BACKENDS[ctx.backend]
        grad_weight, grad_bias, grad_keep = norm_residual.BACKENDS[ctx.backend].sums(
            grad_out, None, o, None, *shared, keep, ctx.eps, RELU, need_keep
        )
        sums = gradient_sums(ctx.group, share, grad_weight, grad_bias) if ctx.own_statistics else (None, None)
        *found, grad_o, weights = ops.backward(
            grad_out, grad_read, grad_pooled, grad_key, o, *shared, *sums, keep, ctx.eps, norm_residual.count_of(o),
            q, k, *attention, x, value_weight, values, later_grads, later_weights, ctx.head_dim, need_x, need_value,
        )  # fmt: skip
        found += grad_weight, grad_bias, grad_keep
        grads = tuple(grad if need else None for grad, need in zip(found, needs[:9], strict=True))
        factors = (grad_o, weights) * ctx.handles
        grads = double_backward.once(
            "layer_attention", (*grads, *factors), (grad_out, grad_read, grad_pooled, grad_key, *edges, *saved)
        )
        return (
            *grads[:9],
            None,  # mean
            None,  # var
            None,  # eps
            None,  # head_dim
            None,  # group
            None,  # followers
            None,  # backend
            None,  # prior
            *(None for _ in range(ctx.prior)),  # the prior value maps: by their handles
            *grads[9:],
        )
