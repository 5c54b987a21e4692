"""What the compiler made of the CUDA kernels: no register in memory, and vectors where the source asks for them."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dla_kernels import native

pytestmark = pytest.mark.skipif(native.CUDA_ERROR is not None, reason=str(native.CUDA_ERROR))

SIZES = {"f": 4, "d": 8, "6__half": 2, "13__nv_bfloat16": 2}
#: common/cuda/walk.cuh's Walk<T, N, rows> in the mangled name of a kernel.
WALK = re.compile(r"4WalkI(\w+?)Li(\d+)ELb([01])E")


def tool(name: str) -> str:
    """One of CUDA's binary tools: of a toolkit, or the one that Triton brings along."""
    found = shutil.which(name)
    if found is None:
        triton = pytest.importorskip("triton")
        beside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        found = str(beside) if beside.exists() else None
    if found is None:
        pytest.skip(f"no {name} to look into the library with")
    return found


def output_of(*options: str) -> str:
    cuobjdump = tool("cuobjdump")
    path = f"{Path(tool('nvdisasm')).parent}:/usr/bin:/bin"
    command = [cuobjdump, *options, str(native._CUDA_LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": path}).stdout


def architectures() -> list[str]:
    return [name.partition("+")[0] for name in native.build_info()["cuda_architectures"].split()]


def test_nothing_spills():
    """Neither registers nor arrays: a stack frame or local memory would be traffic that no byte count knows of."""
    usage = output_of("-res-usage")
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(kernels) > 50 * len(architectures())
    assert [name for name, _, stack, local in kernels if int(stack) or int(local)] == []


def instructions(architecture: str) -> Iterator[tuple[str, set[str]]]:
    """Every kernel and the memory instructions in it."""
    text = output_of("-sass", "-arch", f"sm_{architecture}")
    for function in text.split("Function : ")[1:]:
        name, _, body = function.partition("\n")
        yield name, set(re.findall(r"(?:LDG|STG)\.E[.\w]*", body))


def test_vectors_stay_vectors():
    """A Walk of N elements loads and stores them as one access, of up to 16 bytes."""
    architecture = "90" if "90" in architectures() else architectures()[0]
    seen = 0
    for name, found in instructions(architecture):
        match = WALK.search(name)
        if match is None:
            continue
        width = SIZES[match[1]] * int(match[2]) * 8
        suffix = {128: ".128", 64: ".64", 32: "", 16: ".U16"}[width]
        loads = {i for i in found if i.startswith("LDG")}
        assert any(i.endswith(suffix) or f"{suffix}." in i for i in loads), f"{name}: {loads}"
        if re.search(r"\d(forward|backward)I", name):
            assert any(i.startswith("STG") and suffix in i for i in found), f"{name}: {found}"
        seen += width == 128
    assert seen > 10
