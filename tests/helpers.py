"""What the tests share: one measure of error, and random arguments of the ops."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor, at_least: float = 0.0) -> float:
    """||actual - expected|| / ||expected|| in float64, that norm taken for ``at_least`` so much; NaN where either holds
    one."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
    difference, scale = (actual - expected).norm(), expected.norm().clamp(min=at_least)
    return (difference / scale if scale > 0 else difference).item()


def assert_close(
    actual: Tensor, expected: Tensor, limit: float, name: str = "output", at_least: float = 0.0
) -> None:  # fmt: skip
    error = relative_error(actual, expected, at_least)
    assert error <= limit, f"{name}: relative error {error:.2e}, limit {limit:.0e}"


def gradients(outputs: Iterable[Tensor], inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of a fixed random combination of all outputs."""
    outputs = list(outputs)
    return list(torch.autograd.grad(outputs, inputs, directions_of(outputs, seed)))


def directions_of(outputs: Iterable[Tensor], seed: int = 1) -> list[Tensor]:
    """What the outputs' gradients are multiplied with, the same at every call and on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64, device="cpu").to(o) for o in outputs]


def on_gpu() -> bool:
    """Whether the tests' tensors are on one: ``pytest --device cuda``."""
    return torch.get_default_device().type == "cuda"


def dsu_weights(form: str, channels: int, reduced: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random weights of a DSU in the order of ``dla_kernels.gap_dsu``."""
    c, r = channels, reduced
    shapes = [(r, 2 * c), (3 * c, r), (3 * c,)] if form == "joint" else [(r, c), (r,), (3 * c, r), (3 * c,)] * 2
    return [torch.randn(s, dtype=dtype) / s[-1] ** 0.5 for s in shapes]


def require_grad(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.requires_grad_()
