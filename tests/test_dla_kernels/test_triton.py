"""The Triton backend against the reference: on a GPU where there is one, else in Triton's interpreter."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_dla_kernels.cases import MAKE, ROWS, TYPICAL, Call
from torch._subclasses.fake_tensor import FakeTensorMode

import dla_kernels
from dla_kernels import backend, native, triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = triton.why_not(DEVICE)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# As for the native kernels: see test_fused.py.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def _interpreter_prepares_once(monkeypatch):
    """The interpreter patches ``triton.language`` again at every call of one device function by another, which takes
    most of its time; once a launch, and once for Triton's own functions, is enough."""
    if not triton.interpreting():
        return
    from triton.runtime import interpreter

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module.startswith("triton.") and module not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(module)
        return self.rewrite()(*args, **kwargs)

    prepared = set()
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


def on_device(call: Call) -> Call:
    """The same call there, every tensor with its strides."""

    def moved(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage().to(device=DEVICE)
        there = torch.empty(0, dtype=t.dtype, device=DEVICE).set_(storage, t.storage_offset(), t.size(), t.stride())
        return there.requires_grad_(t.requires_grad)

    return Call(call.op, {n: moved(t.detach()) for n, t in call.tensors.items()}, call.options, call.training)


def check(call: Call, limit: float) -> None:
    expected_call = call.to_double()
    call = on_device(call).require_grad()
    outputs = call("triton")
    directions = [d.to(DEVICE) for d in call.directions([o.cpu() for o in outputs])]
    grads = torch.autograd.grad(outputs, list(call.differentiable.values()), directions)
    expected = expected_call.run("reference", [d.cpu().double() for d in directions])
    for (name, wanted), actual in zip(expected.items(), (*outputs, *grads), strict=True):
        assert_close(actual.cpu(), wanted, limit, name)


@pytest.mark.parametrize("make", ROWS)
def test_matches_the_reference(make):
    check(make(dtype=torch.float32), LIMITS[torch.float32])
