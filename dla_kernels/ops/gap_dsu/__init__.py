"""``gap_dsu``: global average pooling and one step of the Dynamic Sharing Unit."""

from collections.abc import Sequence

from torch import Tensor

from dla_kernels.backend import choose
from dla_kernels.checks import GATES, Checker, remembered
from dla_kernels.common import ACTIVATIONS, in_dtype
from dla_kernels.dsu import DsuWeights, packed
from dla_kernels.ops.gap_dsu import reference
from dla_kernels.ops.gap_dsu.function import GapDsu


def pack_dsu(weights: Sequence[Tensor]) -> DsuWeights:
    """Packs the weights of a DSU into one tensor, once for all its steps: their gradients then meet in one, too.

    Args:
        weights: the joint form's three or the split form's eight, see :func:`gap_dsu`.

    Raises:
        ValueError: another number of weights, or shapes that do not fit each other.
    """
    Checker("pack_dsu").dsu_weights(weights)
    return packed(weights)


@remembered
def _check(x, h, c, weights, activation, carried, gate) -> None:
    check = Checker("gap_dsu")
    if isinstance(x, Tensor) and x.dim() == 2:
        check.state("x", x, ("B", "C"))
    else:
        check.map("x", x)
    check.state("h", h, ("B", "C"))
    check.state("c", c, ("B", "C"))
    check.dsu_weights(weights)
    check.activation(activation)
    if carried is not None:
        check.state("carried", carried, ("B", "C"))
    check.one_of("gate", gate, GATES)


def gap_dsu(
    x: Tensor,  # [B, C, H, W] or [B, C]
    h: Tensor,  # [B, C]
    c: Tensor,  # [B, C]
    weights: Sequence[Tensor] | DsuWeights,
    activation: str = "sigmoid",
    carried: Tensor | None = None,  # [B, C]
    gate: str = "context",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Pools a map, takes one step of the DSU, and gates what is carried (Eq. 4, 6, 7, 8, 9).

    ::

        y = GAP(x)
        (h', c') = Dyn(y, (h, c)):
            joint form:  s = ReLU(W1 [h, y]),  (c~, i, f) = W2 s + b
            split form:  (i, f, c~) = W2y ReLU(W1y y + b1y) + b2y + W2h ReLU(W1h h + b1h) + b2h
            c' = sigmoid(f) * c + sigmoid(i) * tanh(c~)
            h' = activation(c')
        d = Dyn(carried, (h', c'))

    Bytes: reads ``x`` once, nothing where its GAP is given; the rest is vectors.

    Args:
        x: the map [B, C, H, W], or its GAP [B, C] in the state's dtype where its producer has computed it.
        h: [B, C] the hidden state, float32 (float64 beside float64 maps), as is all state.
        c: [B, C] the context.
        weights: the joint form's (w1 [R, 2C], w2 [3C, R], b2 [3C]), or the split form's (w1y [R, C], b1y [R],
            w2y [3C, R], b2y [3C], w1h, b1h, w2h, b2h), R = C / reduction; any floating-point dtype. Packed by
            :func:`pack_dsu` where several steps share them.
        activation: sigma, from context to hidden state: "identity", "tanh", "relu" or "sigmoid".
        carried: [B, C] the GAP of the map that the layer carries on, for its gate; none for no gate.
        gate: what gates it, the new "context" or the new "hidden" state.
        backend: see :mod:`dla_kernels.backend`.

    Returns:
        y [B, C], the new hidden state h' [B, C], the new context c' [B, C], and d [B, C], None without ``carried``.

    Raises:
        ValueError: a shape, dtype, device, number of weights or name that does not fit.
        RuntimeError: the backend asked for cannot run.
    """
    _check(x, h, c, weights, activation, carried, gate)
    chosen = choose(x.device, backend, "gap_dsu")
    if chosen == "reference":
        return reference.gap_dsu(x, h, c, weights, activation, carried, gate)
    weights = packed(weights)
    sigma = tuple(ACTIVATIONS).index(activation)
    y, h, c, d = GapDsu.call(
        x, h, c, carried, in_dtype(weights.packed, h.dtype), weights.joint, sigma, gate == "context", chosen
    )
    return x if x.dim() == 2 else y, h, c, None if carried is None else d
