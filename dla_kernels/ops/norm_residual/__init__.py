"""``norm_residual``: BatchNorm and ReLU; of a residual branch drop path and the addition to the shortcut too."""

from torch import Tensor

from dla_kernels.backend import choose
from dla_kernels.batch_norm import BatchNorm
from dla_kernels.checks import Checker, remembered
from dla_kernels.common import accumulate_dtype
from dla_kernels.ops.norm_residual import reference
from dla_kernels.ops.norm_residual.function import (
    RELU,
    NormResidual,
    count_of,
    keep_books,
    may_overwrite,
    overwrite,
)


@remembered
def _check(x, o, norm, keep, relu) -> None:
    check = Checker("norm_residual")
    if x is not None:
        check.map("x", x)
    check.map("o", o)
    check.batch_norm(norm, count_of(o))
    if keep is not None:
        check.state("keep", keep, ("B",))
    if relu not in RELU:
        check.fail(f"`relu` must be one of {', '.join(map(repr, RELU))}, got {relu!r}")


def norm_residual(
    x: Tensor | None,  # [B, C, H, W]
    o: Tensor,  # [B, C, H, W]
    norm: BatchNorm,
    keep: Tensor | None = None,  # [B]
    relu: str | None = None,
    backend: str | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalises a residual branch, adds it to the shortcut where there is one, and pools the sum.

    ::

        normed = (o - mean) / sqrt(var + eps) * weight + bias
        out = x + keep * normed         or  x + keep * ReLU(normed)  or  ReLU(x + keep * normed)
        y = GAP(out)

    Without a shortcut x is 0: BatchNorm and ReLU behind a convolution, for ``relu="branch"``.
    In training mean and variance are those of ``o`` over the batch, else the running ones, which then are constants.
    Bytes: reads ``x`` and ``o`` once, writes ``out`` once; reads ``o`` once more for its own statistics.

    Args:
        x: [B, C, H, W] the shortcut, or None.
        o: [B, C, H, W] the branch, in x's dtype.
        norm: the BatchNorm; its running statistics are updated in training.
        keep: [B] drop path's factor of each sample, 0 or 1 / (1 - rate), in the state's dtype; none keeps all.
        relu: where a ReLU stands, None for nowhere, "branch" after the normalisation, "sum" after the addition.
        backend: see :mod:`dla_kernels.backend`.
        inplace: whether ``out`` may be ``o`` itself, written over: on the CPU without gradients and with constant
            statistics, where a line that was just read need not be fetched again to be written. Elsewhere, and where
            ``o`` is not dense, it changes nothing.

    Returns:
        out [B, C, H, W] in x's dtype and its GAP y [B, C] in the state's dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit, a single value per channel to take statistics of, an
            unknown place for the ReLU, or no such backend.
        RuntimeError: the backend asked for cannot run.
    """
    _check(x, o, norm, keep, relu)
    chosen = choose(o.device, backend, "norm_residual")
    norm = norm.to(accumulate_dtype(o))
    if inplace and may_overwrite(o, norm, chosen):
        return o, overwrite(x, o, norm, keep, relu, chosen)
    if chosen == "reference":
        out, y, mean, var, share = reference.norm_residual(x, o, norm, keep, relu)
    else:
        out, y, mean, var, share = NormResidual.call(
            x, o, norm.weight, norm.bias, keep, *norm.constants(), norm.eps, relu, norm.group, chosen
        )
    keep_books(norm, mean, var, count_of(o), share, chosen)
    return out, y
