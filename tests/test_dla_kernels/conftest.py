import os

import pytest
import torch
from helpers import on_gpu

from dla_kernels import triton

# Before any kernel is imported: Triton decides then whether to interpret it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _new_memory_holds_nan():
    """An element of an output that a kernel forgets is NaN, not what happened to lie there."""
    # On a GPU torch's own ops may have no deterministic algorithm; ours need none.
    torch.use_deterministic_algorithms(True, warn_only=on_gpu())
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    """Triton's interpreter, where it runs, nearer to what a GPU does, and in less time."""
    if triton.why_not(torch.device("cpu")) is None:
        prepare_once(monkeypatch)
        round_to_nearest(monkeypatch)
        refuse_masks_of_numbers(monkeypatch)


def prepare_once(monkeypatch):
    """The interpreter patches ``triton.language`` again at every call of one device function by another, which takes
    most of its time; once a launch, and once for Triton's own functions, is enough."""
    from triton.runtime import interpreter

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module.startswith("triton.") and module not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(module)
        return self.rewrite()(*args, **kwargs)

    prepared = set()
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


def round_to_nearest(monkeypatch):
    """The interpreter cuts float32 off to bfloat16, where a GPU rounds to the nearest."""
    import triton.language as tl
    from triton.runtime import interpreter

    def cast(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, src, dst_type)
        rounded = torch.from_numpy(src.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    cast_impl = interpreter.InterpreterBuilder.cast_impl
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)


def refuse_masks_of_numbers(monkeypatch):
    """The interpreter of Triton 3.9 takes booleans alone as a mask, those before it take anything."""
    from triton.runtime.interpreter import InterpreterBuilder

    def checked(name, position):
        access = getattr(InterpreterBuilder, name)

        def run(self, *args, **kwargs):
            assert args[position].data.dtype == bool, f"a mask of {args[position].data.dtype}"
            return access(self, *args, **kwargs)

        return run

    for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
        monkeypatch.setattr(InterpreterBuilder, name, checked(name, position))
