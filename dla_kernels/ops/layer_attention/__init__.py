"""``layer_attention``: softmax attention of a layer over itself and all prior layers of its stage (DLA-B)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dla_kernels.backend import choose
from dla_kernels.batch_norm import BatchNorm
from dla_kernels.checks import Checker, remembered
from dla_kernels.common import accumulate_dtype, in_dtype
from dla_kernels.ops.layer_attention import reference
from dla_kernels.ops.layer_attention.function import Layer, attend, folded
from dla_kernels.ops.norm_residual.function import count_of, keep_books, may_overwrite

_fail = Checker("layer_attention").fail


@remembered
def _check(
    x, features, gates, query_weight, key_weights, value_weight, values, norm, keep, head_dim, followers
) -> None:
    check = Checker("layer_attention")
    check.map("x", x)
    check.weight("value_weight", value_weight, ("C", 1, 3, 3))
    for m, value in enumerate(values):
        check.map(f"prior[{m}]", value)
    check.dims["T"] = layers = len(values) + 1
    check.state("features", features, ("B", "T", "C"))
    check.state("gates", gates, ("B", "T", "C"))
    check.weight("query_weight", query_weight, (1, 1, "K"))
    check.odd("query_weight", "K")
    check.weight("key_weights", key_weights, ("filters", 1, "K"))
    if len(key_weights) not in (1, layers):
        check.fail(f"`key_weights` must hold a filter for each of the {layers} layers or one, got {len(key_weights)}")
    check.batch_norm(norm, count_of(x))
    check.heads(head_dim)
    if keep is not None:
        check.state("keep", keep, ("B",))
    if followers < 0:
        check.fail(f"`followers` must be at least 0, got {followers}")


def layer_attention(
    x: Tensor,  # [B, C, H, W]
    features: Tensor,  # [B, T, C]
    gates: Tensor,  # [B, T, C]
    query_weight: Tensor,  # [1, 1, K]
    key_weights: Tensor,  # [T, 1, K] or [1, 1, K]
    value_weight: Tensor,  # [C, 1, 3, 3]
    prior: Sequence[Layer],
    norm: BatchNorm,
    keep: Tensor | None = None,  # [B]
    head_dim: int = 32,
    followers: int = 0,
    backend: str | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Layer]:
    """Attends over the layers of a stage with the gates folded in, and adds the result to the layer's map (Eq. 2).

    A gate is constant over H and W and commutes with the depthwise convolution that made the value map, so the
    refreshed maps x * d are never written. ::

        q = conv1d(features[T], query_weight),  k^m = conv1d(features[m] * gates[m], key_weights[m])
        V = depthwise3x3(x, value_weight)
        a[b, m, head] = softmax over m of  sum over the head's channels of q k^m / sqrt(head_dim)
        o[b, c] = sum over m of  a[b, m, head(c)] gates[b, m, c] V^m[b, c]
        out = x + keep * ReLU(BatchNorm(o))

    The gradient of a value map is one weighted sum over the layers that read it, taken where the map was made: not
    one map-sized addition for each of them.
    Bytes: reads ``x``, writes V, reads the T value maps, writes ``o``, reads it and ``x``, writes ``out``; in inference
    BatchNorm folds and ``o`` is not written.

    Args:
        x: [B, C, H, W] the layer's map.
        features: [B, T, C] the pooled maps of the T layers, its own the last, in the state's dtype.
        gates: [B, T, C] cumulative gates of the T layers, 1 for its own.
        query_weight: [1, 1, K] the query's filter along the channels, K odd, zero-padded at both ends.
        key_weights: [T, 1, K] the keys' filters of the T layers. Or its own alone, [1, 1, K]: the ``features`` of the
            layers before are their refreshed keys then, which no gate touches.
        value_weight: [C, 1, 3, 3] filter of its value map.
        prior: what this op returned for the T - 1 layers before, in order.
        norm: the BatchNorm of ``o``; its running statistics are updated in training.
        keep: [B] drop path's factor of each sample, 0 or 1 / (1 - rate), in the state's dtype; none keeps all.
        head_dim: channels of a head; divides C.
        followers: how many later layers may attend to this one where gradients are taken.
        backend: see :mod:`dla_kernels.backend`.
        inplace: whether ``out`` may be ``x`` itself, written over, as in :func:`norm_residual` and where nothing drops.

    Returns:
        out [B, C, H, W] in x's dtype, and the layer as later ones take it.

    Raises:
        ValueError: a shape, dtype or device that does not fit, a prior layer that was made for fewer followers, a
            single value per channel in training, or no such backend.
        RuntimeError: the backend asked for cannot run.
    """
    for m, layer in enumerate(prior):
        if not isinstance(layer, Layer):
            _fail(f"`prior[{m}]` must be a layer as layer_attention returns it, got {type(layer).__name__}")
    values = [layer.value for layer in prior]
    _check(x, features, gates, query_weight, key_weights, value_weight, values, norm, keep, head_dim, followers)
    chosen = choose(x.device, backend, "layer_attention")
    dtype = accumulate_dtype(x)
    norm, *filters = norm.to(dtype), *(in_dtype(w, dtype) for w in (query_weight, key_weights, value_weight))
    attention = x, features, gates, *filters
    if chosen == "reference":
        out, value, pooled, key, mean, var, share = reference.layer_attention(*attention, values, norm, keep, head_dim)
        layer = Layer(value, pooled, key)
    elif not (norm.training or torch.is_grad_enabled()) and keep is None:
        return folded(*attention, values, norm, head_dim, chosen, inplace and may_overwrite(x, norm, chosen))
    else:
        recording = torch.is_grad_enabled()
        for m, earlier in enumerate(prior):
            if recording and earlier.value.requires_grad and len(prior) - m > len(earlier.handles):
                _fail(f"`prior[{m}]` was made for {len(earlier.handles)} followers, this is number {len(prior) - m}")
        out, layer, mean, var, share = attend(
            *attention, prior, norm, keep, head_dim, followers if recording else 0, chosen
        )
    keep_books(norm, mean, var, count_of(x), share, chosen)
    return out, layer
