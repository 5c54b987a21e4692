"""``refresh_gates``: the DSU over all prior layers at once."""

from collections.abc import Sequence

from torch import Tensor

from dla_kernels.backend import choose
from dla_kernels.checks import GATES, Checker, remembered
from dla_kernels.common import ACTIVATIONS, in_dtype
from dla_kernels.dsu import DsuWeights, packed
from dla_kernels.ops.refresh_gates import reference
from dla_kernels.ops.refresh_gates.function import RefreshGates


@remembered
def _check(features, gates, h, c, weights, activation, gate) -> None:
    check = Checker("refresh_gates")
    check.state("features", features, ("B", "T", "C"))
    check.state("gates", gates, ("B", "T", "C"))
    check.state("h", h, ("B", "C"))
    check.state("c", c, ("B", "C"))
    check.dsu_weights(weights)
    check.activation(activation)
    check.one_of("gate", gate, GATES)


def refresh_gates(
    features: Tensor,  # [B, T, C]
    gates: Tensor,  # [B, T, C]
    h: Tensor,  # [B, C]
    c: Tensor,  # [B, C]
    weights: Sequence[Tensor] | DsuWeights,
    activation: str = "sigmoid",
    gate: str = "context",
    backend: str | None = None,
) -> Tensor:
    """Refreshes all prior layers by the current context (Eq. 6), without touching their maps.

    A layer's map is never rewritten: its pooled features as they were first computed and the product of all its
    gates stand for it, since GAP(x * d) = GAP(x) * d. ::

        d = Dyn(features * gates, (h, c))
        gates' = gates * d

    Bytes: vectors of (B, T, C) only, no map.

    Args:
        features: [B, T, C] pooled features of the T prior layers, not gated.
        gates: [B, T, C] the product of each layer's gates so far.
        h, c: [B, C] the current layer's hidden state and context.
        weights, activation: the DSU's, see :func:`dla_kernels.gap_dsu`.
        gate: what gates a layer, the new "context" c' or the new "hidden" state h'.
        backend: see :mod:`dla_kernels.backend`.

    Returns:
        [B, T, C] the cumulative gates.

    Raises:
        ValueError: a shape, dtype, device, number of weights or name that does not fit.
        RuntimeError: the backend asked for cannot run.
    """
    _check(features, gates, h, c, weights, activation, gate)
    chosen = choose(features.device, backend, "refresh_gates")
    if chosen == "reference":
        return reference.refresh_gates(features, gates, h, c, weights, activation, gate)
    weights = packed(weights)
    sigma = tuple(ACTIVATIONS).index(activation)
    return RefreshGates.call(
        features, gates, h, c, in_dtype(weights.packed, h.dtype), weights.joint, sigma, gate == "context", chosen
    )
