"""``light_update``: the recurrent form of layer attention (DLA-L)."""

import torch
from torch import Tensor

from dla_kernels.backend import choose
from dla_kernels.batch_norm import BatchNorm
from dla_kernels.checks import Checker, remembered
from dla_kernels.common import accumulate_dtype, in_dtype
from dla_kernels.ops.light_update import reference
from dla_kernels.ops.light_update.function import LightUpdate, folded
from dla_kernels.ops.norm_residual.function import count_of, keep_books, may_overwrite


@remembered
def _check(
    x, y, query_weight, key_weight, value_weight, norm, carried, carry_scale, gate, carry_weight, keep, head_dim
) -> None:  # fmt: skip
    check = Checker("light_update")
    check.map("x", x)
    check.state("y", y, ("B", "C"))
    check.weight("query_weight", query_weight, (1, 1, "K"))
    check.weight("key_weight", key_weight, (1, 1, "K"))
    check.odd("query_weight", "K")
    check.weight("value_weight", value_weight, ("C", 1, 3, 3))
    check.batch_norm(norm, count_of(x))
    check.heads(head_dim)
    if carried is None:
        for name, value in (("carry_scale", carry_scale), ("gate", gate), ("carry_weight", carry_weight)):
            if value is not None:
                check.fail(f"`{name}` goes with `carried`, which is None")
    else:
        check.map("carried", carried)
        check.weight("carry_scale", carry_scale, ("C",))
        if gate is not None:
            check.state("gate", gate, ("B", "C"))
        if carry_weight is not None:
            check.weight("carry_weight", carry_weight, ("C", 1, 3, 3))
    if keep is not None:
        check.state("keep", keep, ("B",))


def light_update(
    x: Tensor,  # [B, C, H, W]
    y: Tensor,  # [B, C]
    query_weight: Tensor,  # [1, 1, K]
    key_weight: Tensor,  # [1, 1, K]
    value_weight: Tensor,  # [C, 1, 3, 3]
    norm: BatchNorm,
    carried: Tensor | None = None,  # [B, C, H, W]
    carry_scale: Tensor | None = None,  # [C]
    gate: Tensor | None = None,  # [B, C]
    carry_weight: Tensor | None = None,  # [C, 1, 3, 3]
    keep: Tensor | None = None,  # [B]
    head_dim: int = 32,
    need_o: bool = True,
    backend: str | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Adds a layer's attention to the gated carry of the layers before it, and the sum to the layer's map (Eq. 3).

    ::

        Q = conv1d(y, query_weight),  K = conv1d(y, key_weight),  V = depthwise3x3(x, value_weight)
        o = sigmoid(Q K^T / sqrt(head_dim)) V + carry_scale * (carried * gate + depthwise3x3(carried, carry_weight))
        out = x + keep * BatchNorm(o)

    A softmax over one key would be 1, so the attention is a sigmoid for each head. The value map is never written.
    Bytes: in training reads ``x`` twice and ``carried`` once, writes ``o``, reads it, writes ``out``. In inference
    BatchNorm folds: ``x`` and ``carried`` are read once, ``out`` and, where it is needed, ``o`` are written.

    Args:
        x: [B, C, H, W] the layer's map.
        y: [B, C] its GAP, in the state's dtype.
        query_weight, key_weight: [1, 1, K] filters along the channels, K odd, zero-padded at both ends.
        value_weight: [C, 1, 3, 3] filter of the value map.
        norm: the BatchNorm of ``o``; its running statistics are updated in training.
        carried: [B, C, H, W] what is carried from the layers before; none at a stage's first layer.
        carry_scale: [C] lambda; goes with ``carried``.
        gate: [B, C] the dynamic gate d of ``carried``; none leaves it as it is (MRLA-light).
        carry_weight: [C, 1, 3, 3] filter of the term depthwise3x3(carried); none leaves the term out.
        keep: [B] drop path's factor of each sample, 0 or 1 / (1 - rate), in the state's dtype; none keeps all.
        head_dim: channels of a head; divides C.
        need_o: whether ``o`` itself is needed, as what the next layer carries. Inference then writes it.
        backend: see :mod:`dla_kernels.backend`.
        inplace: whether ``out`` may be ``x`` itself, written over, as in :func:`norm_residual`, and ``o`` may be
            ``carried``: where nothing drops, both are contiguous and share no memory, and for ``o`` there is no
            ``carry_weight``.

    Returns:
        out [B, C, H, W] in x's dtype and its GAP [B, C] in the state's dtype; o [B, C, H, W], None where it is not
        needed, and its GAP [B, C].

    Raises:
        ValueError: a shape, dtype or device that does not fit, an argument of the carry without ``carried``, a single
            value per channel in training, or no such backend.
        RuntimeError: the backend asked for cannot run.
    """
    _check(x, y, query_weight, key_weight, value_weight, norm, carried, carry_scale, gate, carry_weight, keep, head_dim)
    chosen = choose(x.device, backend, "light_update")
    dtype = accumulate_dtype(x)
    norm = norm.to(dtype)
    query_weight, key_weight, value_weight, carry_scale, carry_weight = (
        in_dtype(w, dtype) for w in (query_weight, key_weight, value_weight, carry_scale, carry_weight)
    )
    attention = x, y, query_weight, key_weight, value_weight, carried, carry_scale, gate, carry_weight
    if chosen == "reference":
        out, out_mean, o, o_mean, mean, var, share = reference.light_update(*attention, norm, keep, head_dim)
    elif not (norm.training or torch.is_grad_enabled()) and keep is None:
        overwrite = inplace and may_overwrite(x, norm, chosen) and _contiguous_and_apart(x, carried)
        return folded(*attention, norm, head_dim, need_o, chosen, overwrite)
    else:
        out, out_mean, o, o_mean, mean, var, share = LightUpdate.call(
            *attention, norm.weight, norm.bias, keep, *norm.constants(), norm.eps, head_dim, norm.group, chosen
        )
    keep_books(norm, mean, var, count_of(x), share, chosen)
    return out, out_mean, o if need_o else None, o_mean


def _contiguous_and_apart(x: Tensor, carried: Tensor | None) -> bool:
    if carried is None:
        return x.is_contiguous()
    share = x.untyped_storage().data_ptr() == carried.untyped_storage().data_ptr()
    return x.is_contiguous() and carried.is_contiguous() and not share
