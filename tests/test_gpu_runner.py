"""benchmarks/gpu.py, as far as it goes without a GPU."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch


@pytest.fixture
def gpu():
    path = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_what_it_cannot_run(gpu, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 0
    words = capsys.readouterr().out
    assert words.startswith("Nothing was run: torch finds no GPU here. Not run:")
    for piece in ("tests", "networks", "large_maps", *(f"ops_{op}" for op in gpu.OPS)):
        assert f"  {piece}: " in words


def result(piece, commit, passed=True, rows=()):
    environment = {"device": "A GPU", "commit": commit, "date": "today", "torch": "2", "driver": "1"}
    return {"piece": piece, "passed": passed, "seconds": 3.2, "environment": environment, "rows": list(rows)}


def test_summary_and_resumption(gpu, tmp_path, monkeypatch):
    row = {
        "op": "gap_dsu", "shape": [2, 3, 4, 5], "dtype": "float32", "layout": "NCHW", "kind": "forward",
        "backend": "native", "p50": 1e-3, "bytes_per_s": 5e11, "of_copy": 0.25,
    }  # fmt: skip
    for r in (result("ops_gap_dsu", "abc", rows=[row]), result("tests", "abc", passed=False)):
        (tmp_path / f"{r['piece']}.json").write_text(json.dumps(r))
    text = gpu.summary(tmp_path)
    assert text.startswith("# A GPU\n")
    assert "- tests: FAILED in 3 s, today, commit abc, torch 2, driver 1\n" in text
    assert "| gap_dsu | 2x3x4x5 | float32 | NCHW | forward | native | 1.000 | 500 | 25% |\n" in text
    monkeypatch.setattr(gpu, "environment", lambda: {"commit": "abc"})
    done = {piece: gpu.done_before(tmp_path / f"{piece}.json") for piece in ("ops_gap_dsu", "tests", "networks")}
    assert done == {"ops_gap_dsu": True, "tests": False, "networks": False}
    monkeypatch.setattr(gpu, "environment", lambda: {"commit": "later"})
    assert not gpu.done_before(tmp_path / "ops_gap_dsu.json")


def test_pieces_run_the_installed_package(gpu):
    """`python -m pytest` would put the source tree first."""
    assert all(option != "-m" for option in gpu.pieces()["tests"][:3])
