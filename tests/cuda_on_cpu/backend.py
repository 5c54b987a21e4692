"""The CUDA ops as one more backend of the CPU, for tests alone."""

import ctypes
import importlib
from pathlib import Path
from types import SimpleNamespace

import torch
from cuda_on_cpu.build import OPS

from dla_kernels import backend

NAME = "cuda_on_cpu"
NAMESPACE = "dla_kernels_cuda_on_cpu"  # what include/common/cuda/stream.h registers the kernels under

_definitions = torch.library.Library(NAMESPACE, "DEF")
_ops: dict[str, SimpleNamespace] = {}


def load(library: Path) -> None:
    """Defines the library ops under NAMESPACE, with the schemas of the native ones, and loads their kernels; once."""
    if _ops:
        return
    torch.ops.load_library(str(library))
    for op in OPS:
        _ops[op] = SimpleNamespace()
        for name, native_op in vars(function_of(op).BACKENDS["native"]).items():
            full_name, _, signature = str(native_op._schema).partition("(")
            _definitions.define(f"{full_name.removeprefix('dla_kernels::')}({signature}")
            setattr(_ops[op], name, getattr(getattr(torch.ops, NAMESPACE), f"{op}_{name}").default)


def function_of(op: str):
    return importlib.import_module(f"dla_kernels.ops.{op}.function")


def register(monkeypatch) -> None:
    """Lets ``backend="cuda_on_cpu"`` name it."""
    why_not = backend.why_not
    monkeypatch.setattr(backend, "BACKENDS", (*backend.BACKENDS, NAME))
    monkeypatch.setattr(backend, "why_not", lambda b, device: None if b == NAME else why_not(b, device))
    for op, ops in _ops.items():
        monkeypatch.setitem(function_of(op).BACKENDS, NAME, ops)


class Order:
    """Which block and which thread goes first: the first, or ``reverse()`` the last; and whether blocks may be launched
    together, or ``alone()`` not. Right kernels do not care."""

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        self._reverse, self._alone = loaded.cuda_on_cpu_reverse, loaded.cuda_on_cpu_no_cooperation
        self._reverse.argtypes = self._alone.argtypes = [ctypes.c_bool]

    def __enter__(self) -> "Order":
        return self

    def reverse(self, value: bool = True) -> None:
        self._reverse(value)

    def alone(self, value: bool = True) -> None:
        self._alone(value)

    def __exit__(self, *_) -> None:
        self._reverse(False)
        self._alone(False)
