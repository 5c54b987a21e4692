"""``gap_dsu``: global average pooling and one step of the Dynamic Sharing Unit."""

from collections.abc import Sequence

from torch import Tensor

from dla_kernels.backend import choose
from dla_kernels.checks import Checker
from dla_kernels.common import ACTIVATIONS
from dla_kernels.ops.gap_dsu import reference
from dla_kernels.ops.gap_dsu.function import GapDsu


def gap_dsu(
    x: Tensor,  # [B, C, H, W] or [B, C]
    h: Tensor,  # [B, C]
    c: Tensor,  # [B, C]
    weights: Sequence[Tensor],
    activation: str = "sigmoid",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pools a map and takes one step of the DSU (Eq. 4, 7, 8, 9).

    ::

        y = GAP(x)
        joint form:  s = ReLU(W1 [h, y]),  (c~, i, f) = W2 s + b
        split form:  (i, f, c~) = W2y ReLU(W1y y + b1y) + b2y + W2h ReLU(W1h h + b1h) + b2h
        c' = sigmoid(f) * c + sigmoid(i) * tanh(c~)
        h' = activation(c')

    Bytes: reads ``x`` once, nothing where its GAP is given; the rest is vectors.

    Args:
        x: the map [B, C, H, W], or its GAP [B, C] in the state's dtype where its producer has computed it.
        h: [B, C] the hidden state, float32 (float64 beside float64 maps), as is all state.
        c: [B, C] the context.
        weights: the joint form's (w1 [R, 2C], w2 [3C, R], b2 [3C]), or the split form's (w1y [R, C], b1y [R],
            w2y [3C, R], b2y [3C], w1h, b1h, w2h, b2h), R = C / reduction; any floating-point dtype.
        activation: sigma, from context to hidden state: "identity", "tanh", "relu" or "sigmoid".
        backend: see :mod:`dla_kernels.backend`.

    Returns:
        y [B, C], the new hidden state h' [B, C] and the new context c' [B, C].

    Raises:
        ValueError: a shape, dtype, device, number of weights or name that does not fit.
        RuntimeError: the backend asked for cannot run.
    """
    check = Checker("gap_dsu")
    if isinstance(x, Tensor) and x.dim() == 2:
        check.state("x", x, "B C")
    else:
        check.map("x", x)
    check.state("h", h, "B C")
    check.state("c", c, "B C")
    check.dsu_weights(weights)
    check.activation(activation)
    chosen = choose(x.device, backend)
    if chosen == "reference":
        return reference.gap_dsu(x, h, c, weights, activation)
    weights = (w.to(h.dtype) for w in weights)
    return GapDsu.apply(x, h, c, tuple(ACTIVATIONS).index(activation), chosen, *weights)
