"""The Triton kernels compiled for GPUs that need not be there: they spill nothing and read vectors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dla_kernels import triton

pytestmark = pytest.mark.skipif(triton._import_error() is not None, reason=str(triton._import_error()))

SCRIPT = Path(__file__).with_name("compile_triton.py")

#: Shared memory that a block may have, in KiB.
SHARED = {80: 163, 90: 227, 100: 227}

#: Kernels that read and write maps without neighbours, and so by vectors.
STREAMING = (
    "triton.maps._moments", "norm_residual.triton._forward", "norm_residual.triton._sums",
    "norm_residual.triton._backward", "layer_attention.triton._forward", "layer_attention.triton._backward",
)  # fmt: skip


def compiled(capability: int, shape: str, layout: str, dtype: str, *ops: str, all_tiles: bool = False) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if all_tiles:
        environment["ALL_TILES"] = "1"
    done = subprocess.run(
        [sys.executable, SCRIPT, str(capability), shape, layout, dtype, *ops],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(kernels: list[dict], capability: int, bits: int) -> None:
    assert kernels
    for k in kernels:
        assert k["stack"] == k["local"] == 0, f"spills: {k}"
        assert k["shared"] <= SHARED[capability] * 1024, k
        if k["kernel"] in STREAMING:
            assert k["load"] >= min(128, bits * k["elements"]), f"reads no vectors: {k}"


@pytest.mark.parametrize(
    ("layout", "dtype", "op"),
    [("rows", "bfloat16", "norm_residual"), ("planes", "float32", "light_update"), ("rows", "float32", "gap_dsu")],
)
def test_sm_90(layout, dtype, op):
    check(compiled(90, "2x64x32x32", layout, dtype, op), 90, 16 if dtype == "bfloat16" else 32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("shape", ["2x64x32x32", "2x256x8x8", "2x256x7x7"])
@pytest.mark.parametrize("capability", SHARED)
def test_every_tile(capability, shape, layout, dtype):
    # Planes of 49 pixels start at any address: only where they do not are vectors asked for.
    aligned = layout == "rows" or not shape.endswith("7x7")
    bits = {"float64": 64, "float32": 32}.get(dtype, 16)
    check(compiled(capability, shape, layout, dtype, all_tiles=True), capability, bits if aligned else 0)
