"""Which backend runs, and what is said when it cannot."""

import importlib
import re
import subprocess
import sys

import pytest
import torch
from test_dla_kernels.cases import TYPICAL

import dla_kernels
from dla_kernels import backend, measured, native

needs_native = pytest.mark.skipif(native.ERROR is not None, reason=str(native.ERROR))
CPU = torch.device("cpu")


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(native, "ERROR", "dla_kernels._C was not built")


def runs_fused(op, monkeypatch, **kwargs) -> bool:
    """Whether a call of ``op`` reaches the native kernels."""
    module = importlib.import_module(f"dla_kernels.ops.{op}.function")
    forward, seen = module.BACKENDS["native"].forward, []
    monkeypatch.setattr(module.BACKENDS["native"], "forward", lambda *a: seen.append(op) or forward(*a))
    TYPICAL[op](dtype=torch.float32)(**kwargs)
    return bool(seen)


@needs_native
@pytest.mark.parametrize("op", TYPICAL)
def test_auto_runs_native(op, monkeypatch):
    assert runs_fused(op, monkeypatch)


@pytest.mark.parametrize("op", TYPICAL)
def test_reference_by_name(op, monkeypatch):
    assert not runs_fused(op, monkeypatch, backend="reference")


@needs_native
def test_argument_before_context_before_environment(monkeypatch):
    monkeypatch.setenv("DLA_KERNELS_BACKEND", "reference")
    assert backend.choose(CPU) == "reference"
    with dla_kernels.use_backend("native"):
        assert backend.choose(CPU) == "native"
        with dla_kernels.use_backend("reference"):
            assert backend.choose(CPU) == "reference"
            assert backend.choose(CPU, "native") == "native"
        assert backend.choose(CPU) == "native"
        with dla_kernels.use_backend("auto"):
            assert backend.choose(CPU) == "native"
    assert backend.choose(CPU) == "reference"
    monkeypatch.setenv("DLA_KERNELS_BACKEND", "")
    assert backend.choose(CPU) == "native"


def test_auto_follows_what_was_measured_of_a_gpu(monkeypatch):
    """Op by op and by compute capability; what was not measured, and the CPU, take the usual order."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backend.triton, "interpreting", lambda: False)
    missing = set()
    monkeypatch.setattr(backend, "why_not", lambda name, device: "not here" if name in missing else None)
    assert [backend.choose(gpu, op=op) for op in TYPICAL] == ["native"] * len(TYPICAL)  # no figures yet
    monkeypatch.setattr(measured, "FASTEST", {"9.0": {"light_update": "triton", "gap_dsu": "native"}})
    assert backend.choose(gpu, op="light_update") == "triton"
    assert [backend.choose(gpu, op=op) for op in ("gap_dsu", "norm_residual")] == ["native"] * 2
    assert backend.choose(CPU, op="light_update") == "native"
    assert backend.choose(gpu, "native", "light_update") == "native"  # asked for by name
    missing.add("triton")
    assert backend.choose(gpu, op="light_update") == "native"
    missing.update({"native"})
    assert backend.choose(gpu, op="light_update") == "reference"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    missing.clear()
    assert backend.choose(gpu, op="light_update") == "native"


@pytest.mark.parametrize("op", TYPICAL)
def test_every_op_asks_for_its_own_choice(op, monkeypatch):
    module, asked = importlib.import_module(f"dla_kernels.ops.{op}"), set()

    def choose(device, backend=None, op=None):
        asked.add(op)
        return "reference"

    monkeypatch.setattr(module, "choose", choose)
    TYPICAL[op](dtype=torch.float32)()
    assert asked == {op}


def test_unknown_names(monkeypatch):
    allowed = "must be one of auto, native, triton, reference, got 'cudnn'"
    with pytest.raises(ValueError, match=f"`backend` {allowed}"):
        backend.choose(CPU, "cudnn")
    with pytest.raises(ValueError, match=f"`name` {allowed}"), dla_kernels.use_backend("cudnn"):
        pass
    monkeypatch.setenv("DLA_KERNELS_BACKEND", "cudnn")
    with pytest.raises(ValueError, match=f"DLA_KERNELS_BACKEND {allowed}"):
        TYPICAL["gap_dsu"](dtype=torch.float32)()


@pytest.mark.usefixtures("without_native")
def test_only_auto_falls_back(monkeypatch):
    assert backend.choose(CPU) == "reference"
    found = dla_kernels.backends()
    assert list(found) == ["native", "triton", "reference"]
    assert (found["native"], found["reference"]) == ("dla_kernels._C was not built", True)
    assert not backend.can_run("native", CPU)
    with pytest.raises(RuntimeError, match=r"backend native: dla_kernels._C was not built"):
        backend.choose(CPU, "native")
    with pytest.raises(RuntimeError, match="was not built"):
        dla_kernels.build_info()


@pytest.mark.skipif(native.CUDA_ERROR is not None, reason=str(native.CUDA_ERROR))
def test_a_compiler_does_not_look_into_the_device(monkeypatch):
    monkeypatch.setattr(native, "_not_built_for", torch.compiler.disable(lambda device: None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", torch.compiler.disable(lambda device: (9, 0)))
    monkeypatch.setattr(measured, "FASTEST", {"9.0": {"light_update": "reference"}})
    gpu = torch.device("cuda", 7)

    def chosen(x):
        names = [backend.choose(gpu, op=op) for op in ("light_update", "gap_dsu")]
        return x + 1 if names == ["reference", "native"] else x

    torch._dynamo.reset()
    assert torch.compile(chosen, fullgraph=True, backend="eager")(torch.zeros(1)) == 1


@needs_native
def test_native_runs_on_cpu_and_cuda_only():
    meta = torch.device("meta")
    assert backend.choose(meta) == "reference"
    with pytest.raises(RuntimeError, match="backend native: its kernels run on cpu and cuda, not on meta"):
        backend.choose(meta, "native")


@needs_native
def test_cuda_kernels_that_do_not_load(monkeypatch, tmp_path):
    """The cause is kept, and a call on the GPU tells it; the CPU is not concerned."""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert native._load_cuda() == "this torch has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "_CUDA_LIBRARY", tmp_path / "_C_cuda.so")
    assert "was not built: there was no nvcc" in native._load_cuda()
    native._CUDA_LIBRARY.write_text("no library")
    assert native._load_cuda().startswith("dla_kernels._C_cuda does not load: ")
    monkeypatch.setattr(native, "CUDA_ERROR", "the cause")
    assert native.build_info()["cuda"] == "none: the cause"
    assert backend.choose(CPU) == "native"
    with pytest.raises(RuntimeError, match="backend native: the cause"):
        backend.choose(torch.device("cuda"), "native")


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80 90", (8, 0), True),
        ("80 90", (8, 9), True),  # of the same major version, and later
        ("86", (8, 0), False),
        ("80 90", (10, 0), False),  # no PTX to compile
        ("80 90+PTX", (12, 0), True),
        ("90a", (9, 0), True),
        ("100a+PTX", (12, 0), False),  # which its own architecture alone runs
    ],
)
def test_architectures_that_a_device_runs(architectures, capability, runs):
    assert native._runs_on(capability, architectures) == runs


@needs_native
def test_build_info():
    info = dla_kernels.build_info()
    assert info["version"] == dla_kernels.__version__
    assert info["instruction_set"] in info["instruction_sets"].split()
    assert "-O3" in info["flags"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", info["commit"])


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("None", "dla_kernels._C was not built: there was no C++ compiler when the package was installed"),
        ("Broken()", "dla_kernels._C does not load: undefined symbol"),
    ],
)
def test_imports_without_a_native_library(module, reason):
    """A missing or broken library never stops the import; the cause is kept."""
    script = f"""
import importlib.abc, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "dla_kernels._C":
            if {module == "None"}:
                raise ModuleNotFoundError("No module", name=name)
            raise ImportError("undefined symbol")
sys.meta_path.insert(0, Finder())
import torch, dla_kernels
assert dla_kernels.backends()["native"] == {reason!r}, dla_kernels.backends()
y, h, c, _ = dla_kernels.gap_dsu(*torch.zeros(3, 2, 4), [torch.zeros(1, 8), torch.zeros(12, 1), torch.zeros(12)])
assert y.shape == (2, 4)
from dla_kernels.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"no native library: {reason}" in done.stdout


@needs_native
def test_table_of_backends(capsys):
    from dla_kernels.__main__ import main

    main()
    lines = capsys.readouterr().out.splitlines()
    for op in TYPICAL:
        assert any(line.split()[:3] == [op, "cpu", "native"] for line in lines)
