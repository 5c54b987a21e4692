"""A convolution with what follows it in a residual block."""

from torch import Tensor, nn
from torch.nn.modules import module

from dla.probe import hooks_of
from dla_kernels import BatchNorm, norm_residual


def has_hooks(m: nn.Module) -> bool:
    """Whether a hook, its own or one on all modules, sees what the module takes or returns."""
    return bool(any(hooks_of(m)) or module._global_forward_hooks or module._global_forward_pre_hooks)


def owns_output(conv: nn.Module) -> bool:
    """Whether nobody but its caller has what the module returns: torch's own convolution, without a hook on it."""
    return type(conv) is nn.Conv2d and not has_hooks(conv)


def conv_norm(
    conv: nn.Module, bn: nn.Module, x: Tensor, shortcut: Tensor | None = None, relu: str | None = None
) -> tuple[Tensor, Tensor]:
    """Convolution, BatchNorm, and the ReLU and the addition to the shortcut where there are such.

    Args:
        x: [B, C_in, H_in, W_in].
        shortcut: [B, C, H, W].
        relu: see :func:`dla_kernels.norm_residual`.

    Returns:
        The map [B, C, H, W] and its GAP [B, C].
    """
    return norm_residual(shortcut, conv(x), BatchNorm.of(bn), relu=relu, inplace=owns_output(conv))
