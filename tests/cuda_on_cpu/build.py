"""Compiles the CUDA sources for the CPU with g++: ``build(folder, sources)`` -> the path of a shared library.

The headers of ``include/`` stand in for CUDA's; the rest is the very source that nvcc takes.
"""

import fcntl
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: The ops that have CUDA kernels, and their kernels and hosts, the longest first.
OPS = sorted(path.parent.name for path in ROOT.glob("csrc/*/cuda.cu"))
SOURCES = sorted(ROOT.glob("csrc/*/cuda.c*"), key=lambda path: path.stat().st_size, reverse=True)
SOURCES = [path for path in SOURCES if path.parent.name in OPS]
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-variable", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
]
#: An access out of bounds or not aligned ends the process. Compiling takes longer than running, hence -O0.
SANITIZE = ["-O0", "-fsanitize=address,alignment", "-fsanitize-undefined-trap-on-error", "-fno-omit-frame-pointer"]
COMPILER = shutil.which("g++")


def build(folder: Path, sources: list[Path], flags: list[str] | None = None) -> Path:
    """Compiles and links, the files side by side; raises with the compiler's words."""
    include = [HERE / "include", ROOT / "csrc", *include_paths()]

    def compile_one(source: Path) -> Path:
        target = folder / ("_".join(source.parts[-2:]) + ".o")
        run([*FLAGS, *(flags or []), *(f"-I{i}" for i in include), "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*sources, HERE / "runtime.cpp"]))
    library = folder / "cuda_on_cpu.so"
    torch_lib = Path(torch.__file__).parent / "lib"
    run([*(flags or []), "-shared", *map(str, objects), f"-L{torch_lib}", "-ltorch_cpu", "-o", str(library)])
    return library


def build_once(folder: Path, sources: list[Path], flags: list[str] | None = None) -> Path:
    """The same where several processes want the library: one builds it, the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "cuda_on_cpu.so"
        return library if library.exists() else build(folder, sources, flags)


def sanitizer_environment() -> dict[str, str]:
    """What a process needs to load a library built with SANITIZE."""
    runtimes = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # the latter so that exceptions are seen from the start
    ]
    return os.environ | {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}


def run(arguments: list[str]) -> None:
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"g++ {' '.join(arguments)}\n{done.stderr}"
