"""``layer_attention``: softmax attention of a layer over itself and all prior layers of its stage (DLA-B)."""

from collections.abc import Sequence

from torch import Tensor

from dla_kernels.backend import choose
from dla_kernels.checks import Checker
from dla_kernels.ops.layer_attention import reference
from dla_kernels.ops.layer_attention.function import LayerAttention


def layer_attention(
    q: Tensor,  # [B, C]
    k: Tensor,  # [B, T, C]
    values: Sequence[Tensor],  # T of [B, C, H, W]
    gates: Tensor,  # [B, T, C]
    head_dim: int = 32,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attends over the layers of a stage (Eq. 2) with the gates folded into the attention weights.

    A gate is constant over H and W and commutes with the depthwise convolution that made the value map, so the
    refreshed maps x * d are never written. ::

        a[b, m, head] = softmax over m of  sum over the head's channels of q k^m / sqrt(head_dim)
        o[b, c] = sum over m of  a[b, m, head(c)] gates[b, m, c] values^m[b, c]

    Bytes: reads each of the T value maps once, writes ``o`` once.

    Args:
        q: [B, C] the layer's query, in the state's dtype.
        k: [B, T, C] the refreshed keys of the T layers.
        values: T value maps [B, C, H, W] as they were first computed, of one dtype.
        gates: [B, T, C] cumulative gates of the T layers, 1 for the current one.
        head_dim: channels of a head; divides C.
        backend: see :mod:`dla_kernels.backend`.

    Returns:
        o [B, C, H, W] in the maps' dtype, and for every sample and channel o's mean and biased variance over H, W,
        [B, C] each in the state's dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit, no value map, or no such backend.
        RuntimeError: the backend asked for cannot run.
    """
    check = Checker("layer_attention")
    if not values:
        check.fail("`values` must hold the map of at least one layer, got none")
    for m, value in enumerate(values):
        check.map(f"values[{m}]", value)
    check.dims["T"] = len(values)
    check.state("q", q, "B C")
    check.state("k", k, "B T C")
    check.state("gates", gates, "B T C")
    check.heads(head_dim)
    chosen = choose(q.device, backend)
    if chosen == "reference":
        return reference.layer_attention(q, k, values, gates, head_dim)
    return LayerAttention.apply(q, k, gates, head_dim, chosen, *values)
