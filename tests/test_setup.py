"""What setup.py decides to build, on machines with and without nvcc and a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 12.9, V12.9.1" ;;
--list-gpu-arch) printf 'compute_80\\ncompute_90\\ncompute_120\\n' ;;
esac
"""
SMI = "#!/bin/sh\nprintf '9.0\\n9.0\\n8.6\\n'\n"


def ask(expression: str, folder: Path, programs: dict[str, str], **environment: str) -> tuple[int, str]:
    """Exit status and words of setup.py's ``expression`` where the PATH has only these programs."""
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    script = f"import setuptools; setuptools.setup = lambda **k: None; import setup; print({expression})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PATH": str(folder), "TORCH_CUDA_ARCH_LIST": "", "DLA_KERNELS_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, (done.stderr if done.returncode else done.stdout).strip()


@pytest.mark.parametrize(
    ("programs", "environment", "expected"),
    [
        ({}, {"TORCH_CUDA_ARCH_LIST": "8.0;9.0a+PTX"}, [("80", False), ("90a", True)]),
        ({}, {"TORCH_CUDA_ARCH_LIST": "8.0 10.0+PTX"}, [("80", False), ("100", True)]),
        ({"nvcc": NVCC, "nvidia-smi": SMI}, {}, [("86", False), ("90", False)]),
        ({"nvcc": NVCC}, {}, [("80", False), ("90", True)]),
        ({"nvcc": NVCC.replace("compute_80\\n", "")}, {}, [("90", True)]),  # of the default list what nvcc knows
    ],
    ids=["asked for", "asked for with spaces", "those of the machine", "default", "default of a newer nvcc"],
)
def test_architectures(tmp_path, programs, environment, expected):
    assert ask("setup.architectures()", tmp_path, programs, **environment) == (0, str(expected))


@pytest.mark.parametrize("name", ["Hopper", "90", "9.0+ptx"])
def test_unknown_architecture(tmp_path, name):
    status, words = ask("setup.architectures()", tmp_path, {}, TORCH_CUDA_ARCH_LIST=name)
    assert status != 0
    assert f"TORCH_CUDA_ARCH_LIST: '{name}' is not of the form 9.0, 9.0a or 9.0+PTX" in words


def test_cuda_without_nvcc_is_an_error_only_where_it_is_asked_for(tmp_path):
    status, words = ask("0", tmp_path, {}, DLA_KERNELS_CUDA="1")
    assert status != 0
    assert words.endswith("DLA_KERNELS_CUDA=1, but no `nvcc` is on the PATH")
    (tmp_path / "other").mkdir()
    assert ask("setup.cuda_wanted()", tmp_path / "other", {}, DLA_KERNELS_CUDA="auto") == (0, "False")


def test_commit_outside_a_clone(tmp_path):
    outside = f"setattr(setup, 'ROOT', setup.Path({str(tmp_path)!r})) or setup.git_commit()"
    assert ask(outside, tmp_path, {}, DLA_KERNELS_COMMIT="abc") == (0, "abc")


def test_unknown_choice(tmp_path):
    status, words = ask("0", tmp_path, {}, DLA_KERNELS_CUDA="yes")
    assert status != 0
    assert "DLA_KERNELS_CUDA must be 0, 1 or auto, got 'yes'" in words
