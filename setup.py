"""Builds ``dla_kernels._C`` and ``dla_kernels._C_cuda`` from ``csrc/``; everything else stands in ``pyproject.toml``.

``DLA_KERNELS_CUDA`` is ``auto`` (the default: CUDA kernels where they can be built), ``0`` (never) or ``1`` (an error
where they cannot). ``TORCH_CUDA_ARCH_LIST`` ("8.0;9.0+PTX") names the architectures; without it they are those of the
GPUs in this machine, and where there is none, DEFAULT_ARCHITECTURES. Without a C++ compiler the package installs
without ``_C`` and runs on its reference.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import ExecError
from setuptools.modified import newer_group

ROOT = Path(__file__).parent.resolve()
# The oldest torch whose stable ABI is enough; one build serves it and all later ones.
TORCH_TARGET = "0x020a000000000000"


#: Ampere and Ada run the first, Hopper the second; what comes later compiles its PTX once. Each takes minutes to build.
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"


def cuda_wanted() -> bool:
    choice = os.environ.get("DLA_KERNELS_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"DLA_KERNELS_CUDA must be 0, 1 or auto, got {choice!r}")
    missing = None
    if shutil.which("nvcc") is None:
        missing = "no `nvcc` is on the PATH"
    elif not any((Path(folder) / "libtorch_cuda.so").exists() for folder in torch_libraries()):
        missing = "the torch to build against has no CUDA"
    if choice == "1" and missing:
        raise SystemExit(f"DLA_KERNELS_CUDA=1, but {missing}")
    return choice != "0" and missing is None


def torch_libraries() -> list[str]:
    try:
        from torch.utils.cpp_extension import library_paths
    except ImportError:
        return []
    return library_paths()


def output_of(*command: str) -> str:
    """What a command prints; nothing where it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def architectures() -> list[tuple[str, bool]]:
    """The architectures to build for, ("90a", whether with PTX for later ones)."""
    present = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(sorted(set(present))) or DEFAULT_ARCHITECTURES
    known = set(re.findall(r"compute_(\w+)", output_of("nvcc", "--list-gpu-arch")))
    found = []
    for name in re.split(r"[;,\s]+", asked.strip("; ")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {name!r} is not of the form 9.0, 9.0a or 9.0+PTX")
        major, minor, suffix, ptx = match.groups()
        if major + minor in known or asked != DEFAULT_ARCHITECTURES:
            found.append((major + minor + suffix, bool(ptx)))
    return found


def compiler() -> str | None:
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    return shutil.which(command[0])


def git_commit() -> str:
    """The commit of this tree, with "-dirty" where files differ; outside a clone what DLA_KERNELS_COMMIT says."""
    if not (ROOT / ".git").exists():
        return os.environ.get("DLA_KERNELS_COMMIT", "unknown")
    return output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()


class BuildPy(build_py):
    """Leaves the commit beside the modules: there is one without a compiler too, and no C++ is compiled for it."""

    def run(self) -> None:
        super().run()
        Path(self.build_lib, "dla_kernels", "commit.txt").write_text(git_commit() or "unknown")


class BuildExt(build_ext):
    """Compiles the sources side by side, those of CUDA with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "dla_kernels._C_cuda":
            try:
                self.build_cuda(ext)
            except ExecError as error:
                raise SystemExit(f"{error}; DLA_KERNELS_CUDA=0 installs without the CUDA kernels") from error
            return
        # Other flags or another torch, another library; setuptools looks at the sources' times alone.
        wanted = repr((ext.define_macros, ext.extra_compile_args, os.environ.get("LDFLAGS")))
        record = Path(self.build_temp, "built.txt")
        self.force = self.force or not record.exists() or record.read_text() != wanted
        compile_one = self.compiler.compile

        def compile_all(sources: list[str], **kwargs) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_one([source], **kwargs), sources)
                return [o for group in objects for o in group]

        self.compiler.compile = compile_all
        super().build_extension(ext)
        self.compiler.compile = compile_one
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(wanted)

    def build_cuda(self, ext: Extension) -> None:
        """nvcc compiles kernels and hosts, and links: it knows where its own libraries are."""
        macros = [f"-D{name}={value}" for name, value in ext.define_macros]
        include = [f"-I{folder}" for folder in ext.include_dirs]
        # Those of the host compiler, one by one. A static runtime of CUDA needs nothing of the machine but its driver.
        host = [word for flag in ext.extra_compile_args for word in ("-Xcompiler", flag)]

        def compile_one(source: str) -> str:
            device = generate_code() if source.endswith(".cu") else []
            command = ["nvcc", *NVCC_FLAGS, *device, *host, *macros, *include, "-c", source]
            # Other flags, other objects: those of a build for other architectures are not taken again.
            folder = hashlib.sha256("\0".join(command).encode()).hexdigest()[:16]
            target = Path(self.build_temp, folder, Path(source).name + ".o")
            if target.exists() and not newer_group([source, *ext.depends], str(target)):
                return str(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.spawn([*command, "-o", str(target)])
            return str(target)

        # The longest first, so that none is left alone at the end.
        sources = sorted(ext.sources, key=lambda s: Path(s).stat().st_size, reverse=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = [*(f"-L{d}" for d in ext.library_dirs), *(f"-l{name}" for name in ext.libraries)]
        self.spawn(["nvcc", "-shared", "-cudart", "static", *objects, *libraries, "-o", str(target)])


NVCC_FLAGS = ["-std=c++17", "-O3"]


def generate_code() -> list[str]:
    flags = []
    for name, ptx in architectures():
        kinds = f"sm_{name},compute_{name}" if ptx else f"sm_{name}"
        flags += ["-gencode", f"arch=compute_{name},code=[{kinds}]"]
    return flags


def cuda_extension(native: Extension) -> Extension:
    """The kernels and hosts of the GPU, built like those of the CPU where there is a choice."""
    csrc = ROOT / "csrc"
    texts = {
        "DLA_CUDA_ARCHITECTURES": " ".join(name + "+PTX" * ptx for name, ptx in architectures()),
        "DLA_CUDA_TOOLKIT": re.search(r"release [\d.]+, V([\d.]+)", output_of("nvcc", "--version"))[1],
    }
    target = next(macro for macro in native.define_macros if macro[0] == "TORCH_TARGET_VERSION")
    return Extension(
        "dla_kernels._C_cuda",
        sources=sorted(str(p.relative_to(ROOT)) for p in csrc.rglob("cuda*.c*") if p.suffix in (".cu", ".cpp")),
        depends=sorted(str(p.relative_to(ROOT)) for p in csrc.rglob("*") if p.suffix in (".h", ".cuh")),
        include_dirs=native.include_dirs,
        library_dirs=native.library_dirs,
        libraries=["torch_cpu", "torch_cuda"],
        # USE_CUDA: torch's headers then declare what tells the current stream.
        define_macros=[target, ("USE_CUDA", "1"), *((k, f'"{v}"') for k, v in texts.items())],
        extra_compile_args=["-fPIC", "-fvisibility=hidden", *shlex.split(os.environ.get("CXXFLAGS", ""))],
    )


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
        "DLA_TORCH": torch.__version__,
        "DLA_FLAGS": " ".join(flags),
    }
    return Extension(
        "dla_kernels._C",
        sources=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp") if p.stem != "cuda"),
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")),
        include_dirs=["csrc", pybind11.get_include(), *include_paths()],
        # Only to name the library as needed: torch is always loaded before `_C`.
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), *((k, f'"{v}"') for k, v in texts.items())],
        extra_compile_args=flags,
        language="c++",
    )


def extensions() -> list[Extension]:
    with_cuda = cuda_wanted()
    if compiler() is None:
        sys.stderr.write("dla-kernels: no C++ compiler was found, so the ops will run on their PyTorch reference.\n")
        return []
    native = native_extension()
    return [native, cuda_extension(native)] if with_cuda else [native]


setup(
    packages=[*find_packages(include=["dla*"]), "dla.benchmarks"],
    package_dir={"dla.benchmarks": "benchmarks"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
