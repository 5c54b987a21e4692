"""``norm_residual``: BatchNorm of a residual branch, drop path and the addition to the shortcut."""

from torch import Tensor

from dla_kernels.backend import choose
from dla_kernels.checks import Checker
from dla_kernels.common import accumulate_dtype
from dla_kernels.ops.norm_residual import reference
from dla_kernels.ops.norm_residual.function import RELU, NormResidual


def norm_residual(
    x: Tensor,  # [B, C, H, W]
    o: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    mean: Tensor | None = None,  # [B, C] or [C]
    var: Tensor | None = None,  # [B, C] or [C]
    keep: Tensor | None = None,  # [B]
    eps: float = 1e-5,
    relu: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalises a residual branch, adds it to the shortcut, and pools the sum.

    ::

        normed = (o - mean) / sqrt(var + eps) * weight + bias
        out = x + keep * normed         or  x + keep * ReLU(normed)  or  ReLU(x + keep * normed)
        y = GAP(out)

    With no statistics given they are those of ``o`` over the batch, as in any BatchNorm in training. Those of every
    sample, as :func:`dla_kernels.light_update` and :func:`dla_kernels.layer_attention` emit them, are merged over the
    batch and save that pass; those of the channels, the running ones in eval, are taken as they are. The gradient
    flows through them as through any argument.
    Bytes: reads ``x`` and ``o`` once, writes ``out`` once; ``o`` once more for its own statistics.

    Args:
        x: [B, C, H, W] the shortcut.
        o: [B, C, H, W] the branch, in x's dtype.
        weight, bias: [C] BatchNorm's scale and shift.
        mean, var: [B, C] each sample's mean and biased variance of ``o``, [C] the statistics to use, or none.
        keep: [B] drop path's factor of each sample, 0 or 1 / (1 - rate), in the state's dtype; none keeps all.
        eps: added to the variance.
        relu: where a ReLU stands, None for nowhere, "branch" after the normalisation, "sum" after the addition.
        backend: see :mod:`dla_kernels.backend`.

    Returns:
        out [B, C, H, W] in x's dtype and its GAP y [B, C] in the state's dtype; the mean and biased variance [C] that
        were used, detached, for the running averages.

    Raises:
        ValueError: a shape, dtype or device that does not fit, a single value per channel to take statistics of, an
            unknown place for the ReLU, or no such backend.
        RuntimeError: the backend asked for cannot run.
    """
    check = Checker("norm_residual")
    check.map("x", x)
    check.map("o", o)
    check.weight("weight", weight, "C")
    check.weight("bias", bias, "C")
    if mean is None:
        if var is not None:
            check.fail("`var` goes with `mean`, which is None")
        if o.numel() == o.shape[1]:
            check.fail(f"`o` must have more than one value per channel to take statistics of, got {tuple(o.shape)}")
    elif isinstance(mean, Tensor) and mean.dim() == 2:
        check.state("mean", mean, "B C")
        check.state("var", var, "B C")
    else:
        check.weight("mean", mean, "C")
        check.weight("var", var, "C")
    if keep is not None:
        check.state("keep", keep, "B")
    if relu not in RELU:
        check.fail(f"`relu` must be one of {', '.join(map(repr, RELU))}, got {relu!r}")
    chosen = choose(x.device, backend)
    dtype = accumulate_dtype(x)
    weight, bias = weight.to(dtype), bias.to(dtype)
    if mean is not None:
        mean, var = mean.to(dtype), var.to(dtype)
    if chosen == "reference":
        return reference.norm_residual(x, o, weight, bias, mean, var, keep, eps, relu)
    return NormResidual.apply(x, o, mean, var, weight, bias, keep, eps, relu, chosen)
