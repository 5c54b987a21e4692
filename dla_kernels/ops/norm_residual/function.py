"""``norm_residual`` with its gradient, over the fused backends."""

import torch
import torch.distributed as dist
from torch import Tensor

from dla_kernels import double_backward, native, triton
from dla_kernels.autograd import Function
from dla_kernels.batch_norm import BatchNorm, across, gradient_sums
from dla_kernels.native import empty_dense_like, empty_map_like
from dla_kernels.ops.norm_residual import reference

#: Where a ReLU may stand, as the library ops count the places.
RELU = {None: 0, "branch": 1, "sum": 2}


def fake_moments(o: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if o.dtype == torch.float64 else torch.float32
    return tuple(o.new_empty(o.shape[:2], dtype=dtype) for _ in range(2))


def fake_forward(
    x: Tensor | None, o: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None,
    eps: float, relu: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    channels = o.shape[1]
    vectors = weight.new_empty(o.shape[:2]), weight.new_empty(channels), weight.new_empty(channels)
    return empty_map_like(o if x is None else x), *vectors


def fake_forward_(*args) -> Tensor:
    return fake_forward(*args)[1]


def fake_sums(
    grad_out: Tensor, grad_y: Tensor | None, o: Tensor, out: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor,
    bias: Tensor, keep: Tensor | None, eps: float, relu: int, need_keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return empty_dense_like(weight), empty_dense_like(bias), weight.new_empty(o.shape[0] if need_keep else 0)


def fake_backward(
    grad_out: Tensor, grad_y: Tensor | None, o: Tensor, out: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor,
    bias: Tensor, sum_weight: Tensor | None, sum_bias: Tensor | None, keep: Tensor | None, eps: float, relu: int,
    count: int, need_x: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_map_like(o) if need_x else o.new_empty(0), empty_map_like(o)


def fake_update(running_mean, running_var, num_batches_tracked, mean, var, momentum, count):
    return None


_fakes = {"moments": fake_moments, "forward": fake_forward, "sums": fake_sums, "backward": fake_backward}

#: {backend: its ops}
BACKENDS = {
    "native": native.library_ops("norm_residual", **_fakes, forward_=fake_forward_, update_running_stats=fake_update),
    "triton": triton.library_ops("norm_residual", **_fakes),
}
BACKENDS["triton"].update_running_stats = reference.update_running_stats  # a few vectors


def count_of(o: Tensor) -> int:
    """Values per channel."""
    batch, _, height, width = o.shape
    return batch * height * width


def batch_statistics(
    mean: Tensor, var: Tensor, group: dist.ProcessGroup | None, count: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From a map's moments what normalises it: themselves [B, C], or those of a group [C] with this one's share."""
    return (mean, var, None) if group is None else across(group, mean, var, count)


def may_overwrite(o: Tensor, norm: BatchNorm, backend: str) -> bool:
    """Whether nothing needs ``o`` after the op, and the op can write over it; a compiler reuses memory itself."""
    return (
        backend == "native"
        and o.device.type == "cpu"
        and norm.constants()[0] is not None
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and (o.is_contiguous() or o.is_contiguous(memory_format=torch.channels_last))
    )


def was_overwritten(o: Tensor) -> None:
    """Lets autograd find out, should it have saved ``o``."""
    if not o.is_inference():
        torch.autograd.graph.increment_version(o)


def overwrite(
    x: Tensor | None, o: Tensor, norm: BatchNorm, keep: Tensor | None, relu: str | None, backend: str
) -> Tensor:
    """The op without gradients and with constant statistics, ``out`` in the place of ``o``; returns y."""
    y = BACKENDS[backend].forward_(x, o, *norm.constants(), norm.weight, norm.bias, keep, norm.eps, RELU[relu])
    was_overwritten(o)
    return y


def keep_books(norm: BatchNorm, mean: Tensor, var: Tensor, count: int, share: Tensor | None, backend: str) -> None:
    """In training updates the running statistics by those that were used."""
    if not norm.training or norm.running_mean is None:
        return
    if backend == "reference" or share is not None:
        update, count = reference.update_running_stats, count if share is None else count / share
    else:
        update = BACKENDS[backend].update_running_stats
    update(norm.running_mean, norm.running_var, norm.num_batches_tracked, mean, var, norm.momentum, count)


class NormResidual(Function):
    """Saves ``o`` and vectors, and ``out`` where the ReLU follows the addition; what follows y is detached.

    The gradient of ``x`` is that of ``out`` itself where neither y's nor a ReLU's is between them.
    """

    @staticmethod
    def forward(x, o, weight, bias, keep, mean, var, eps, relu, group, backend):
        ops, share = BACKENDS[backend], None
        if mean is None:
            mean, var, share = batch_statistics(*ops.moments(o), group, count_of(o))
        return *ops.forward(x, o, mean, var, weight, bias, keep, eps, RELU[relu]), share

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, o, weight, bias, keep, constant, _, ctx.eps, ctx.relu, ctx.group, ctx.backend = inputs
        out, _, mean, var, share = output
        ctx.mark_non_differentiable(*(t for t in (mean, var, share) if t is not None))
        ctx.set_materialize_grads(False)
        ctx.own_statistics = constant is None
        ctx.save_for_backward(o, out if ctx.relu == "sum" else None, weight, bias, keep, mean, var, share)

    @staticmethod
    def backward(ctx, grad_out: Tensor | None, grad_y: Tensor | None, *_):
        saved = ctx.saved_tensors  # once: checkpointing computes it anew at every look
        o, out, weight, bias, keep, mean, var, share = saved
        if grad_out is None:
            grad_out = torch.zeros_like(o)
        need_x, need_o, need_weight, need_bias, need_keep = ctx.needs_input_grad[:5]
        ops, relu = BACKENDS[ctx.backend], RELU[ctx.relu]
        shared = grad_out, grad_y, o, out, mean, var, weight, bias
        grad_weight, grad_bias, grad_keep = ops.sums(*shared, keep, ctx.eps, relu, need_keep)
        sums = gradient_sums(ctx.group, share, grad_weight, grad_bias) if ctx.own_statistics else (None, None)
        passes_on = grad_y is None and ctx.relu != "sum"
        grad_x = grad_o = None
        if need_o or (need_x and not passes_on):
            grad_x, grad_o = ops.backward(
                *shared, *sums, keep, ctx.eps, relu, count_of(o), need_x and not passes_on
            )  # fmt: skip
        grads = (
            (grad_out if passes_on else grad_x) if need_x else None,
            grad_o if need_o else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            grad_keep if need_keep else None,
        )
        return *double_backward.once("norm_residual", grads, (grad_out, grad_y, *saved)), *(
            None,  # mean
            None,  # var
            None,  # eps
            None,  # relu
            None,  # group
            None,  # backend
        )
