"""What the compiler made of the CUDA kernels: no register in memory, and vectors where the source asks for them.

The installed library's architectures are looked at, and those of ARCHITECTURES that it lacks are compiled for it.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_on_cpu.build import HERE, ROOT

from dla_kernels import native

#: Ampere, Hopper and Blackwell.
ARCHITECTURES = ("80", "90", "100")
#: Bytes of an element, by its name in a mangled one; __half and __nv_bfloat16.
SIZES = {"f": 4, "d": 8, "6__half": 2, "13__nv_bfloat16": 2}
#: common/cuda/walk.cuh's Walk<T, N, rows> and layer_attention's Place<N, rows> in the mangled name of a kernel, and
#: light_update's kernels of channels_last with kAligned.
WALK = re.compile(r"4WalkI(\w+?)Li(\d+)ELb[01]E")
PLACE = re.compile(r"I(f|d|6__half|13__nv_bfloat16)NS0_5PlaceILi(\d+)ELb[01]EE")
ROWS = re.compile(r"(?:forward|backward)_rowsI(f|d|6__half|13__nv_bfloat16)(?:LNS0_5CarryE\dELb[01]|Li\d)ELb1ELi\dEE")
PLANES = re.compile(r"(?:forward|backward)_planesI(f|d|6__half|13__nv_bfloat16)")


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


def output_of(path: Path, *options: str) -> str:
    cuobjdump = tool("cuobjdump")
    environment = {"PATH": f"{Path(tool('nvdisasm')).parent}:/usr/bin:/bin"}
    command = [cuobjdump, *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def stack_frames(path: Path) -> dict[str, int]:
    """Bytes of local memory of every kernel, the most that it has on any architecture: arrays that are not in
    registers, and registers that were spilled."""
    usage = output_of(path, "-res-usage")
    frames: dict[str, int] = {}
    for name, stack, local in re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage):
        frames[name] = max(frames.get(name, 0), int(stack) + int(local))
    return frames


def instructions(path: Path, architecture: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """Every kernel and the instructions in it that move global memory."""
    text = output_of(path, "-sass", *(["-arch", f"sm_{architecture}"] if architecture else []))
    for function in text.split("Function : ")[1:]:
        name, _, body = function.partition("\n")
        yield name, re.findall(r"\b(?:LDG|STG|LDGSTS)\.E[.\w]*", body)


def vector_bytes(name: str) -> int | None:
    """What a kernel's accesses to maps must be wide, by its name; None where it has no vectors."""
    for pattern in (WALK, PLACE):
        if match := pattern.search(name):
            width = SIZES[match[1]] * int(match[2])
            return width if int(match[2]) > 1 else None
    if match := ROWS.search(name) or PLANES.search(name):
        return 16
    return None


def narrow(name: str, found: list[str]) -> str | None:
    """What is wrong with a kernel's accesses, if anything."""
    width = vector_bytes(name)
    if width is None:
        return None
    suffix = {4: "E", 8: "64", 16: "128"}[width]
    if not any(suffix in i.split(".") for i in found if i.startswith("LD")):
        return f"{name} reads no {width} bytes at once: {sorted(set(found))}"
    # Vectors and weights are of 4 and 8 bytes: what is of 2 is an element of a map. In NCHW, light_update takes the
    # ends of its rows alone, and may have to store so; in channels_last a thread of its backward has one channel, and a
    # warp stores 64 bytes.
    alone = [i for i in found if "U16" in i.split(".") and not ("backward_rows" in name and i.startswith("STG"))]
    if alone and not PLANES.search(name):
        return f"{name} moves elements alone: {sorted(set(alone))}"
    return None


def faults(path: Path, architecture: str | None = None) -> tuple[list[str], int]:
    """What is wrong in a library or a cubin, and how many kernels in vectors were looked at."""
    found = [f"{name} keeps {n} bytes in local memory" for name, n in stack_frames(path).items() if n]
    kernels = list(instructions(path, architecture))
    found += [fault for name, access in kernels if (fault := narrow(name, access))]
    return found, sum(vector_bytes(name) is not None for name, _ in kernels)


def installed() -> list[str]:
    return [name.partition("+")[0] for name in native.build_info()["cuda_architectures"].split()]


@pytest.mark.skipif(native.CUDA_ERROR is not None, reason=str(native.CUDA_ERROR))
def test_the_installed_library():
    """One architecture's instructions, which take ten seconds to write out, and all of their local memory."""
    architectures = installed()
    frames = stack_frames(native._CUDA_LIBRARY)
    assert len(frames) > 100
    found, vectors = faults(native._CUDA_LIBRARY, "90" if "90" in architectures else architectures[0])
    assert found == []
    assert vectors > 60


def compiled(source: Path, architecture: str, folder: Path, *options: str) -> Path:
    target = folder / f"{'_'.join(source.parts[-2:])}.{architecture}.cubin"
    command = ["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-cubin", f"-arch=sm_{architecture}", *options]
    done = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")


@needs_nvcc
@pytest.mark.slow  # minutes on two cores
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture, tmp_path):
    if native.CUDA_ERROR is None and architecture in installed():
        found, vectors = faults(native._CUDA_LIBRARY, architecture)
    else:
        sources = sorted(ROOT.glob("csrc/*/cuda.cu"), key=lambda path: path.stat().st_size, reverse=True)
        with ThreadPoolExecutor(2) as pool:
            cubins = pool.map(lambda source: compiled(source, architecture, tmp_path), sources)
            of_each = [faults(cubin) for cubin in cubins]
        found, vectors = [f for faults_of_one, _ in of_each for f in faults_of_one], sum(n for _, n in of_each)
    assert found == []
    assert vectors > 60


@needs_nvcc
def test_faults_are_seen(tmp_path):
    """Planted: an array in local memory, spilled registers, and a kernel that moves a vector element by element."""
    planted = HERE / "planted_build.cu"
    found, vectors = faults(compiled(planted, "90", tmp_path, "-maxrregcount=32"))
    words = sorted(fault.split(maxsplit=1) for fault in found)
    assert vectors == 3
    for kernel, fault in {
        "array": "bytes in local memory",
        "spilled": "bytes in local memory",
        "narrow_loads": "reads no 16 bytes at once",
        "element_alone": "moves elements alone: ['STG.E.U16']",
    }.items():
        assert [text for name, text in words if kernel in name and fault in text], f"{kernel}: {words}"
    assert not [name for name, _ in words if "right" in name]
    assert len(words) == 4
