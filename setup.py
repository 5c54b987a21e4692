"""Builds ``dla_kernels._C`` from ``csrc/``; everything else stands in ``pyproject.toml``.

``DLA_KERNELS_CUDA`` is ``auto`` (the default: CUDA kernels where they can be built), ``0`` (never) or ``1`` (an error
where they cannot). Without a C++ compiler the package installs without ``_C`` and runs on its reference.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# The oldest torch whose stable ABI is enough; one build serves it and all later ones.
TORCH_TARGET = "0x020a000000000000"


def cuda_wanted() -> bool:
    choice = os.environ.get("DLA_KERNELS_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"DLA_KERNELS_CUDA must be 0, 1 or auto, got {choice!r}")
    sources = list(ROOT.glob("csrc/*/cuda.cu"))
    if choice == "1" and not sources:
        raise SystemExit("DLA_KERNELS_CUDA=1, but this version has no CUDA kernels")
    if choice == "1" and shutil.which("nvcc") is None:
        raise SystemExit("DLA_KERNELS_CUDA=1, but no `nvcc` is on the PATH")
    return choice != "0" and bool(sources) and shutil.which("nvcc") is not None


def compiler() -> str | None:
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    return shutil.which(command[0])


def git_commit() -> str:
    if not (ROOT / ".git").exists():
        return "unknown"
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


class BuildExt(build_ext):
    """Compiles the sources side by side."""

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler.compile

        def compile_all(sources: list[str], **kwargs) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_one([source], **kwargs), sources)
                return [o for group in objects for o in group]

        self.compiler.compile = compile_all
        super().build_extension(ext)


def native_extension() -> Extension:
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise SystemExit(
            f"building `dla_kernels._C` needs torch and pybind11 ({error}): install both, or leave out "
            "--no-build-isolation"
        ) from error
    # GCC 12 takes the undefined operands inside its own intrinsics for uninitialised variables.
    flags = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-maybe-uninitialized"]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    version = next(
        line.split('"')[1] for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version")
    )
    texts = {
        "DLA_VERSION": version,
        "DLA_COMMIT": git_commit(),
        "DLA_TORCH": torch.__version__,
        "DLA_FLAGS": " ".join(flags),
    }
    return Extension(
        "dla_kernels._C",
        sources=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp")),
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")),
        include_dirs=["csrc", pybind11.get_include(), *include_paths()],
        # Only to name the library as needed: torch is always loaded before `_C`.
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), *((k, f'"{v}"') for k, v in texts.items())],
        extra_compile_args=flags,
        language="c++",
    )


cuda_wanted()
if compiler() is None:
    sys.stderr.write("dla-kernels: no C++ compiler was found, so the ops will run on their PyTorch reference.\n")
    setup()
else:
    setup(ext_modules=[native_extension()], cmdclass={"build_ext": BuildExt})
