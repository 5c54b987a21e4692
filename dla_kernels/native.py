"""The native libraries: loaded once, and where that fails, the cause is kept instead of raised."""

import ctypes
import functools
import importlib
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from dla_kernels.common import constant_to_a_compiler


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


def _load_cuda() -> str | None:
    """Loads ``dla_kernels._C_cuda``, the library ops' kernels for CUDA tensors; returns why it could not."""
    if ERROR is not None:
        return ERROR
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not _CUDA_LIBRARY.exists():
        return "dla_kernels._C_cuda was not built: there was no nvcc when the package was installed"
    try:
        torch.ops.load_library(str(_CUDA_LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"dla_kernels._C_cuda does not load: {error}"
    return None


_CUDA_LIBRARY = Path(__file__).with_name(f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}")

#: Why there are no native kernels for CUDA; None where there are.
CUDA_ERROR: str | None = _load_cuda()


def _cuda_text(function: str) -> str:
    call = getattr(ctypes.CDLL(str(_CUDA_LIBRARY)), function)
    call.restype = ctypes.c_char_p
    return call().decode()


@constant_to_a_compiler  # a compiler sees neither into a library nor into a device
def why_not(device: torch.device) -> str | None:
    """Why the native kernels cannot run on ``device``; None where they can."""
    if ERROR is not None:
        return ERROR
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"its kernels run on cpu and cuda, not on {device.type}"
    return CUDA_ERROR or _not_built_for(device)


@functools.cache  # every op asks at every call
def _not_built_for(device: torch.device) -> str | None:
    architectures = _cuda_text("dla_cuda_architectures")
    if not torch.cuda.is_available() or _runs_on(torch.cuda.get_device_capability(device), architectures):
        return None
    return f"it was built for sm_{architectures.replace(' ', ', sm_')}, not for {torch.cuda.get_device_name(device)}"


def _runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether code for "80 90a 120+PTX" runs there: that of its own major version, or of any before it as PTX."""
    for name in architectures.split():
        number, _, ptx = name.partition("+")
        exact = number[-1] in "af"
        built = divmod(int(number.rstrip("af")), 10)
        if built == capability or (not exact and built <= capability and (ptx or built[0] == capability[0])):
            return True
    return False


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


def commit() -> str:
    """The commit that was installed; "unknown" where it was not installed from one."""
    try:
        return Path(__file__).with_name("commit.txt").read_text()
    except OSError:
        return "unknown"


def build_info() -> dict[str, str]:
    """How the native library was built, and which instruction set its kernels use here.

    Raises:
        RuntimeError: there is none, with the cause.
    """
    if ERROR is not None:
        raise RuntimeError(ERROR)
    from dla_kernels import _C

    info = _C.build_info() | {
        "commit": commit(),
        "instruction_sets": " ".join(_C.instruction_sets()),
        "instruction_set": _C.instruction_set(),
    }
    if CUDA_ERROR is not None:
        return info | {"cuda": f"none: {CUDA_ERROR}"}
    return info | {"cuda": _cuda_text("dla_cuda_toolkit"), "cuda_architectures": _cuda_text("dla_cuda_architectures")}


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
