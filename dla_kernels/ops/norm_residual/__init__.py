"""``norm_residual``: BatchNorm of the attention output, drop path and the residual addition."""

from torch import Tensor

from dla_kernels.backend import choose
from dla_kernels.checks import Checker
from dla_kernels.common import accumulate_dtype
from dla_kernels.ops.norm_residual import reference
from dla_kernels.ops.norm_residual.function import NormResidual


def norm_residual(
    x: Tensor,  # [B, C, H, W]
    o: Tensor,  # [B, C, H, W]
    mean: Tensor,  # [B, C] or [C]
    var: Tensor,  # [B, C] or [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    keep: Tensor | None = None,  # [B]
    eps: float = 1e-5,
    relu: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalises the attention output and adds it to the block's map.

    ::

        out = x + keep * act((o - mean) / sqrt(var + eps) * weight + bias)        act = ReLU (DLA-B) or identity
        y = GAP(out)

    The statistics are arguments: those of every sample, as :func:`dla_kernels.light_update` and
    :func:`dla_kernels.layer_attention` emit them, are merged over the batch (training); those of the channels, the
    running ones, are taken as they are (eval). The gradient flows through them as through any argument.
    Bytes: reads ``x`` and ``o`` once, writes ``out`` once.

    Args:
        x: [B, C, H, W] the block's map.
        o: [B, C, H, W] the attention output, in x's dtype.
        mean, var: [B, C] each sample's mean and biased variance of ``o``, or [C] the statistics to use.
        weight, bias: [C] BatchNorm's scale and shift.
        keep: [B] drop path's factor of each sample, 0 or 1 / (1 - rate), in the state's dtype; none keeps all.
        eps: added to the variance.
        relu: whether a ReLU follows the normalisation.
        backend: see :mod:`dla_kernels.backend`.

    Returns:
        out [B, C, H, W] in x's dtype and its GAP y [B, C] in the state's dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or no such backend.
        RuntimeError: the backend asked for cannot run.
    """
    check = Checker("norm_residual")
    check.map("x", x)
    check.map("o", o)
    if isinstance(mean, Tensor) and mean.dim() == 2:
        check.state("mean", mean, "B C")
        check.state("var", var, "B C")
    else:
        check.weight("mean", mean, "C")
        check.weight("var", var, "C")
    check.weight("weight", weight, "C")
    check.weight("bias", bias, "C")
    if keep is not None:
        check.state("keep", keep, "B")
    chosen = choose(x.device, backend)
    if chosen == "reference":
        return reference.norm_residual(x, o, mean, var, weight, bias, keep, eps, relu)
    mean, var, weight, bias = (t.to(accumulate_dtype(x)) for t in (mean, var, weight, bias))
    return NormResidual.apply(x, o, mean, var, weight, bias, keep, eps, relu, chosen)
