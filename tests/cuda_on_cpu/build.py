"""Compiles the CUDA sources for the CPU with g++: ``build(folder, sources)`` -> the path of a shared library.

The headers of ``include/`` stand in for CUDA's; the rest is the very source that nvcc takes.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: The ops' kernels and hosts.
SOURCES = sorted((*ROOT.glob("csrc/*/cuda.cu"), *ROOT.glob("csrc/*/cuda.cpp")))
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-variable", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
]
#: An access out of bounds or not aligned ends the process.
SANITIZE = ["-fsanitize=address,alignment", "-fsanitize-undefined-trap-on-error", "-fno-omit-frame-pointer"]
COMPILER = shutil.which("g++")


def build(folder: Path, sources: list[Path], flags: list[str] | None = None) -> Path:
    """Compiles and links, two files at a time; raises with the compiler's words."""
    include = [HERE / "include", ROOT / "csrc", *include_paths()]

    def compile_one(source: Path) -> Path:
        target = folder / ("_".join(source.parts[-2:]) + ".o")
        run([*FLAGS, *(flags or []), *(f"-I{i}" for i in include), "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, [HERE / "runtime.cpp", *sources]))
    library = folder / "cuda_on_cpu.so"
    torch_lib = Path(torch.__file__).parent / "lib"
    run([*(flags or []), "-shared", *map(str, objects), f"-L{torch_lib}", "-ltorch_cpu", "-o", str(library)])
    return library


def run(arguments: list[str]) -> None:
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"g++ {' '.join(arguments)}\n{done.stderr}"
