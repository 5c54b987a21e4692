"""``refresh_gates`` with its gradient, over the fused backends."""

from torch import Tensor

from dla_kernels import double_backward, native, triton
from dla_kernels.autograd import Function
from dla_kernels.native import empty_dense_like


def fake_forward(
    features: Tensor, gates: Tensor, h: Tensor, c: Tensor, weights: Tensor, joint: bool, activation: int,
    of_context: bool,
) -> Tensor:  # fmt: skip
    return empty_dense_like(gates)


def fake_backward(
    grad: Tensor, features: Tensor, gates: Tensor, h: Tensor, c: Tensor, weights: Tensor, joint: bool,
    activation: int, of_context: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(empty_dense_like(t) for t in (features, gates, h, c, weights))


#: {backend: its ops}
BACKENDS = {
    name: module.library_ops("refresh_gates", forward=fake_forward, backward=fake_backward)
    for name, module in (("native", native), ("triton", triton))
}


class RefreshGates(Function):
    """Saves its arguments: what a step computes on its way is computed again."""

    @staticmethod
    def forward(features, gates, h, c, weights, joint, activation, of_context, backend):
        return BACKENDS[backend].forward(features, gates, h, c, weights, joint, activation, of_context)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.joint, ctx.activation, ctx.of_context, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad: Tensor):
        saved = ctx.saved_tensors  # once: checkpointing computes it anew at every look
        grads = BACKENDS[ctx.backend].backward(grad, *saved, ctx.joint, ctx.activation, ctx.of_context)
        grads = tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:5], strict=True))
        return *double_backward.once("refresh_gates", grads, (grad, *saved)), *(
            None,  # joint
            None,  # activation
            None,  # of_context
            None,  # backend
        )
