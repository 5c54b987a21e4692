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

#: Kernels that read and write maps without neighbours, and so by vectors in both layouts.
STREAMING = (
    "triton.maps._moments", "norm_residual.triton._forward", "norm_residual.triton._sums",
    "norm_residual.triton._backward", "layer_attention.triton._forward", "layer_attention.triton._backward",
)  # fmt: skip
#: Kernels that read the neighbours of a pixel too, which are beside each other in channels_last only.
OF_NEIGHBOURS = ("light_update.triton._forward", "light_update.triton._backward")

BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}


def compiled(capability: int, shape: str, layout: str, dtype: str, tiles: str, *ops: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, str(capability), shape, layout, dtype, tiles, *ops],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(kernels: list[dict], capability: int, layout: str, dtype: str, aligned: bool = True) -> None:
    """No spills, shared memory that the chip has, and vectors wherever they lie at their own multiples."""
    assert kernels
    for k in kernels:
        assert k["stack"] == k["local"] == 0, f"spills: {k}"
        assert k["shared"] <= SHARED[capability] * 1024, f"too much shared memory: {k}"
        if aligned and (k["kernel"] in STREAMING or (k["kernel"] in OF_NEIGHBOURS and layout == "rows")):
            assert k["load"] >= min(128, BITS[dtype] * k["elements"]), f"reads no vectors: {k}"
            # What has 16 bits is a map. The state's vectors hide those of the wider dtypes, which share the source.
            assert k["single"] == 0 or k["elements"] < 2 or BITS[dtype] > 16, f"moves single elements: {k}"


@pytest.mark.parametrize(
    ("layout", "dtype", "op"),
    [
        ("rows", "bfloat16", "norm_residual"),
        ("planes", "float32", "light_update"),
        ("rows", "float32", "refresh_gates"),
    ],
)
def test_sm_90(layout, dtype, op):
    check(compiled(90, "2x64x32x32", layout, dtype, "default", op), 90, layout, dtype)


def test_check_finds_what_is_planted():
    sound = {"kernel": STREAMING[0], "elements": 8, "stack": 0, "local": 0, "shared": 0, "load": 128, "single": 0}
    check([sound], 90, "rows", "bfloat16")
    for planted in ({"local": 1}, {"stack": 8}, {"shared": 228 * 1024}, {"load": 64}, {"single": 1}):
        with pytest.raises(AssertionError, match=r"spills|shared memory|vectors|single"):
            check([sound | planted], 90, "rows", "bfloat16")
    with pytest.raises(AssertionError):
        check([], 90, "rows", "bfloat16")


def test_sees_planes_that_begin_at_any_address():
    unaligned = compiled(90, "2x256x7x7", "planes", "bfloat16", "default", "norm_residual")
    with pytest.raises(AssertionError, match="reads no vectors: "):
        check(unaligned, 90, "planes", "bfloat16")
    check(unaligned, 90, "planes", "bfloat16", aligned=False)


@pytest.mark.parametrize("lost", [True, False])
def test_sees_a_variable_that_a_loop_would_lose(tmp_path, lost):
    file = tmp_path / "planted.py"
    file.write_text(f"""
import compile_triton, torch, triton, triton.language as tl

@triton.jit
def shift(x, y, n):
    here = tl.zeros([16], tl.float32)
    above = {"here" if lost else "tl.zeros([16], tl.float32)"}
    for i in range(n):
        tl.store(y + 16 * i + tl.arange(0, 16), above)
        above = here
        here = tl.load(x + 16 * i + tl.arange(0, 16))

compile_triton.prepare(90)
shift[(1,)](torch.empty(99), torch.empty(99), 2)
""")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, env=environment)
    assert (done.returncode != 0) == lost, done.stderr
    assert ("lost in a loop: ['above']" in done.stderr) == lost


@pytest.mark.slow
def test_sees_a_tile_of_more_elements_than_registers():
    with pytest.raises(AssertionError, match="spills: "):
        check(compiled(90, "2x64x32x32", "rows", "bfloat16", "2048x4", "light_update"), 90, "rows", "bfloat16")


# Whatever the tuning may choose, one to three minutes each.


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("capability", SHARED)
def test_every_tile(capability, layout, dtype):
    check(compiled(capability, "2x64x32x32", layout, dtype, "all"), capability, layout, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize(
    ("shape", "layout"), [("2x256x7x7", "planes"), ("2x256x7x7", "rows"), ("2x48x56x56", "planes")]
)
def test_every_tile_of_other_maps(shape, layout, dtype):
    """Planes of 49 pixels begin at any address, and rows of 56 are no power of two; channels of 256 are four blocks."""
    aligned = layout == "rows" or not shape.endswith("7x7")
    check(compiled(90, shape, layout, dtype, "all"), 90, layout, dtype, aligned)
