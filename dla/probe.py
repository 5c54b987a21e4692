"""Looking at what modules compute, without touching them: on copies, with random weights."""

import copy
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def random_copies(modules: Iterable[nn.Module]) -> tuple[list[nn.Module], Callable[..., Tensor]]:
    """Copies of modules without hooks, in inference, with random weights, and a source of random maps for them.

    They are on the modules' device (on the CPU for the meta device) and in the default dtype, the only one in which
    every code runs. No random number of the process is drawn.
    """
    copies = nn.ModuleList(copy.deepcopy(list(modules))).eval()
    device = next((p.device for p in copies.parameters()), torch.device("cpu"))
    if device.type == "meta":
        device = torch.device("cpu")
        copies.to_empty(device=device)
    copies.to(torch.get_default_dtype())
    for module in copies.modules():
        for hooks in hooks_of(module):
            hooks.clear()
    generator = torch.Generator(device).manual_seed(0)
    for tensor in itertools.chain(copies.parameters(), copies.buffers()):
        if not tensor.is_floating_point():
            continue
        if tensor.dim() > 1:
            tensor.data.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
        else:
            tensor.data.uniform_(0.5, 1.5, generator=generator)

    def maps(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    return list(copies), maps


def hooks_of(module: nn.Module) -> list[dict]:
    """The dictionaries that hold a module's own hooks on its calls."""
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()
