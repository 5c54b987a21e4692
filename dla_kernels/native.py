"""The native library: loaded once, and where that fails, the cause is kept instead of raised."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace

import torch


def _load() -> str | None:
    """Loads ``dla_kernels._C``, which registers the library ops; returns why it could not."""
    try:
        importlib.import_module("dla_kernels._C")
    except ModuleNotFoundError as error:
        if error.name != "dla_kernels._C":
            return f"dla_kernels._C does not load: {error}"
        return "dla_kernels._C was not built: there was no C++ compiler when the package was installed"
    except (ImportError, OSError, RuntimeError) as error:
        return f"dla_kernels._C does not load: {error}"
    return None


#: Why there are no native kernels; None where there are.
ERROR: str | None = _load()


def library_ops(op: str, **fakes: Callable) -> SimpleNamespace:
    """The library ops ``op_name`` of ``op`` by name, given for each what it returns under FakeTensor.

    Without the native library they do not exist, and calling one says why.
    """
    ops = SimpleNamespace()
    for name, fake in fakes.items():
        setattr(ops, name, _library_op(f"{op}_{name}", fake))
    return ops


def _library_op(name: str, fake: Callable) -> Callable:
    if ERROR is not None:

        def missing(*args):
            raise RuntimeError(f"{name}: {ERROR}")

        return missing
    torch.library.register_fake(f"dla_kernels::{name}", fake)
    return getattr(torch.ops.dla_kernels, name).default


def build_info() -> dict[str, str]:
    """How the native library was built, and which instruction set its kernels use here.

    Raises:
        RuntimeError: there is none, with the cause.
    """
    if ERROR is not None:
        raise RuntimeError(ERROR)
    from dla_kernels import _C

    return _C.build_info() | {
        "instruction_sets": " ".join(_C.instruction_sets()),
        "instruction_set": _C.instruction_set(),
    }


def is_walkable(x: torch.Tensor) -> bool:
    """Whether the kernels read this map as it is: its rows without gaps, its pixels or its channels adjacent.

    The same rule as in csrc/common/tensor.h; every other map goes through one ``contiguous()``.
    """
    height, width = x.shape[2:]
    if width == 1:
        pixel = 1 if height == 1 else x.stride(2)
    elif height == 1 or x.stride(2) == width * x.stride(3):
        pixel = x.stride(3)
    else:
        return False
    return pixel == 1 or (x.shape[1] > 1 and x.stride(1) == 1 and pixel > 1)


def empty_map_like(x: torch.Tensor) -> torch.Tensor:
    """What the kernels allocate for an output map beside ``x``."""
    return torch.empty_like(x if is_walkable(x) else x.contiguous())


def empty_dense_like(t: torch.Tensor) -> torch.Tensor:
    """What the kernels allocate for a vector or a weight like ``t``: dense, whatever t's strides."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)
