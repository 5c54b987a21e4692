"""The Triton backend: whether it can run, and its library ops. Triton itself is imported when the first kernel runs."""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

_library = torch.library.Library("dla_kernels_triton", "DEF")


def interpreting() -> bool:
    """Whether Triton's interpreter is asked for: it runs kernels on any machine, to test them, and is slow."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


_looked: list[str | None] = []


def _import_error() -> str | None:
    """Why Triton cannot be imported; None where it can. Kept in a list: a compiler warns of a cached function."""
    if not _looked:
        _looked.append(_import())
    return _looked[0]


def _import() -> str | None:
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError as error:
        return "Triton is not installed" if error.name == "triton" else f"Triton does not load: {error}"
    except (ImportError, OSError, RuntimeError) as error:
        return f"Triton does not load: {error}"
    return None


def why_not(device: torch.device) -> str | None:
    """The reason why the kernels cannot run on ``device``; None where they can."""
    if device.type == "cuda" or (device.type == "cpu" and interpreting()):
        return _import_error()
    return f"its kernels run on cuda, and on cpu in Triton's interpreter (TRITON_INTERPRET=1), not on {device.type}"


def library_ops(op: str, **fakes: Callable) -> SimpleNamespace:
    """The library ops ``op_name`` of ``op`` by name, given for each what it returns under FakeTensor.

    The fake's annotations are the op's schema. To a compiler an op is a black box: a launch has nothing to fuse with,
    and the kernels take tuples of maps, which PyTorch's wrappers of Triton kernels do not.
    """
    ops = SimpleNamespace()
    for name, fake in fakes.items():
        qualified = f"{op}_{name}"
        _library.define(
            qualified + torch.library.infer_schema(fake, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
        )  # fmt: skip
        for key in ("CPU", "CUDA"):
            _library.impl(qualified, functools.partial(_run, op, name), key)
        torch.library.register_fake(f"dla_kernels_triton::{qualified}", fake, lib=_library)
        setattr(ops, name, getattr(torch.ops.dla_kernels_triton, qualified).default)
    return ops


def _run(op: str, name: str, *args) -> Tensor | tuple[Tensor, ...]:
    """Runs the kernels of an op on the device of its tensors."""
    implementation = getattr(importlib.import_module(f"dla_kernels.ops.{op}.triton"), name)
    first = next(a for a in args if isinstance(a, Tensor))
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        return implementation(*args)
