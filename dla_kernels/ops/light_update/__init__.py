"""``light_update``: the recurrent form of layer attention (DLA-L)."""

from torch import Tensor

from dla_kernels.backend import choose
from dla_kernels.checks import Checker
from dla_kernels.common import accumulate_dtype
from dla_kernels.ops.light_update import reference
from dla_kernels.ops.light_update.function import LightUpdate


def light_update(
    x: Tensor,  # [B, C, H, W]
    q: Tensor,  # [B, C]
    k: Tensor,  # [B, C]
    value_weight: Tensor,  # [C, 1, 3, 3]
    carried: Tensor | None = None,  # [B, C, H, W]
    carry_scale: Tensor | None = None,  # [C]
    gate: Tensor | None = None,  # [B, C]
    carry_weight: Tensor | None = None,  # [C, 1, 3, 3]
    head_dim: int = 32,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds a layer's attention to the gated carry of the layers before it (Eq. 3).

    ::

        o = sigmoid(q k^T / sqrt(head_dim)) V + carry_scale * (carried * gate + depthwise3x3(carried, carry_weight))
        V = depthwise3x3(x, value_weight)

    A softmax over one key would be 1, so the attention is a sigmoid for each head.
    Bytes: reads ``x`` and ``carried`` once, writes ``o`` once.

    Args:
        x: [B, C, H, W] the layer's map.
        q, k: [B, C] its query and key, in the state's dtype.
        value_weight: [C, 1, 3, 3] filter of the value map.
        carried: [B, C, H, W] what is carried from the layers before; none at a stage's first layer.
        carry_scale: [C] lambda; goes with ``carried``.
        gate: [B, C] the dynamic gate d of ``carried``; none leaves it as it is (MRLA-light).
        carry_weight: [C, 1, 3, 3] filter of the term depthwise3x3(carried); none leaves the term out.
        head_dim: channels of a head; divides C.
        backend: see :mod:`dla_kernels.backend`.

    Returns:
        o [B, C, H, W] in x's dtype, and for every sample and channel o's mean and biased variance over H, W,
        [B, C] each in the state's dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit, an argument of the carry without ``carried``, or no
            such backend.
        RuntimeError: the backend asked for cannot run.
    """
    check = Checker("light_update")
    check.map("x", x)
    check.state("q", q, "B C")
    check.state("k", k, "B C")
    check.weight("value_weight", value_weight, "C 1 3 3")
    check.heads(head_dim)
    if carried is None:
        for name, value in (("carry_scale", carry_scale), ("gate", gate), ("carry_weight", carry_weight)):
            if value is not None:
                check.fail(f"`{name}` goes with `carried`, which is None")
    else:
        check.map("carried", carried)
        check.weight("carry_scale", carry_scale, "C")
        if gate is not None:
            check.state("gate", gate, "B C")
        if carry_weight is not None:
            check.weight("carry_weight", carry_weight, "C 1 3 3")
    chosen = choose(x.device, backend)
    if chosen == "reference":
        return reference.light_update(x, q, k, value_weight, carried, carry_scale, gate, carry_weight, head_dim)
    value_weight, carry_scale, carry_weight = (
        None if w is None else w.to(accumulate_dtype(x)) for w in (value_weight, carry_scale, carry_weight)
    )
    return LightUpdate.apply(x, q, k, value_weight, carried, carry_scale, gate, carry_weight, head_dim, chosen)
