"""``gap_dsu`` with its gradient, over the fused backends."""

from torch import Tensor

from dla_kernels import double_backward, native, triton
from dla_kernels.autograd import Function
from dla_kernels.native import empty_dense_like


def fake_forward(
    x: Tensor, h: Tensor, c: Tensor, carried: Tensor | None, weights: Tensor, joint: bool, activation: int,
    of_context: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        h.new_empty(h.shape if x.dim() == 4 else 0),
        empty_dense_like(h),
        empty_dense_like(c),
        h.new_empty(0 if carried is None else h.shape),
    )


def fake_backward(
    grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, grad_gate: Tensor | None, y: Tensor,
    h: Tensor, c: Tensor, carried: Tensor | None, weights: Tensor, joint: bool, activation: int, of_context: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        *(empty_dense_like(t) for t in (y, h, c)),
        h.new_empty(0 if carried is None else h.shape),
        empty_dense_like(weights),
    )


#: {backend: its ops}
BACKENDS = {
    name: module.library_ops("gap_dsu", forward=fake_forward, backward=fake_backward)
    for name, module in (("native", native), ("triton", triton))
}


class GapDsu(Function):
    """Saves vectors and weights; the gradient of a map is one number for each channel, handed on without being
    written out."""

    @staticmethod
    def forward(x, h, c, carried, weights, joint, activation, of_context, backend):
        return BACKENDS[backend].forward(x, h, c, carried, weights, joint, activation, of_context)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, h, c, carried, weights, *ctx.options, ctx.backend = inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[0] if x.dim() == 4 else x, h, c, carried, weights)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor | None):
        y, h, c, carried, weights = saved = ctx.saved_tensors  # once: checkpointing computes it anew at every look
        if len(ctx.shape) == 2:  # y was not an output, but the argument itself
            grad_outputs = (None, *grad_outputs[1:])
        if carried is None:
            grad_outputs = (*grad_outputs[:3], None)
        grad_x, *grads = BACKENDS[ctx.backend].backward(*grad_outputs, y, h, c, carried, weights, *ctx.options)
        if len(ctx.shape) == 4:
            grad_x = grad_x.div(ctx.shape[2] * ctx.shape[3]).to(ctx.dtype)[..., None, None].expand(ctx.shape)
        grads = tuple(g if n else None for g, n in zip((grad_x, *grads), ctx.needs_input_grad[:5], strict=True))
        return *double_backward.once("gap_dsu", grads, (*grad_outputs, *saved)), *(
            None,  # joint
            None,  # activation
            None,  # of_context
            None,  # backend
        )
