"""benchmarks/gpu.py, as far as it goes without a GPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_dla_kernels.cases import ROWS

from dla.benchmarks import gpu, report
from dla.benchmarks.gpu import Piece

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"device": "A GPU", "commit": "abc", "date": "today", "torch": "2", "cuda": "13", "driver": "1"}


def python(code: str, **variables: str) -> Piece:
    return Piece([sys.executable, "-c", code], variables)


@pytest.fixture
def with_sanitizer(monkeypatch):
    which = gpu.shutil.which
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/cs" if name == "compute-sanitizer" else which(name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_what_it_cannot_run(capsys, monkeypatch, with_sanitizer):
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 0
    words = capsys.readouterr().out
    assert words.startswith("Nothing was run: torch finds no GPU here. Not run:")
    for piece in gpu.pieces():
        assert f"  {piece}: " in words
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    gpu.main()
    assert "  racecheck: no compute-sanitizer" in capsys.readouterr().out


def test_pieces_are_chosen_by_their_start(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu.py", "models", "bench_floors"])
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main()
    chosen = [line.split(":")[0].strip() for line in capsys.readouterr().out.split("\n") if " -m " in line]
    assert chosen == [*(f"models_{name}" for name in gpu.MODEL_TESTS), "bench_floors"]
    monkeypatch.setattr("sys.argv", ["gpu.py", "model_"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "PIECE must be, or be the start of, one of graphs_streams_devices," in capsys.readouterr().err


def test_goes_on_where_it_stopped(tmp_path):
    count = "import pathlib; p = pathlib.Path('{}'); p.write_text(p.read_text() + 'x'); {}"
    (tmp_path / "good").write_text("")
    (tmp_path / "bad").write_text("")
    asked = {
        "good": python(count.format(tmp_path / "good", "import os; assert os.environ['PLANTED'] == '1'"), PLANTED="1"),
        "bad": python(count.format(tmp_path / "bad", "raise SystemExit('planted')")),
    }
    for _ in range(2):
        assert not gpu.run(asked, tmp_path / "results", ENVIRONMENT)
    assert [(tmp_path / name).read_text() for name in asked] == ["x", "xx"]
    assert "planted" in json.loads((tmp_path / "results" / "checks.json").read_text())["bad"]["output"]
    text = (tmp_path / "results" / "checks.md").read_text()
    assert text.startswith("# A GPU\n")
    assert "- good: passed in 0 s, today, commit abc, torch 2, CUDA 13, driver 1\n" in text
    assert "- bad: FAILED" in text
    gpu.run(asked, tmp_path / "results", ENVIRONMENT | {"commit": "later"})
    assert (tmp_path / "good").read_text() == "xx"


def test_ends_in_time_with_all_that_it_started(tmp_path, capfd):
    """A piece that is stopped is neither passed nor forgotten, and its own children do not go on."""
    child = "import time, pathlib; time.sleep(2); pathlib.Path(r'{}').write_text('alive')".format(tmp_path / "child")
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    asked = {"long": python(parent), "after": python("")}
    assert not gpu.run(asked, tmp_path, ENVIRONMENT, until=time.monotonic() + 1.2)
    assert "long: STOPPED after 1 s" in capfd.readouterr().out
    text = (tmp_path / "checks.md").read_text()
    assert "- long: STOPPED after 1 s" in text
    assert "Not run at this commit: after." in text
    assert not gpu.run(asked, tmp_path, ENVIRONMENT, until=time.monotonic())
    assert "long: not run, the time is over" in capfd.readouterr().out
    time.sleep(1.5)
    assert not (tmp_path / "child").exists()


def test_summary_holds_what_was_asked_of_the_gpu():
    facts = {"asked": 0.9, "unit": "of copy", "is_most": False, "reads": 1, "writes": 1, "map_bytes": 50}
    times = {"native": {"p20": 1, "p50": 1, "p80": 1}}
    labels = {"what": "light_update", "": "forward", "at": "256x256x56x56"}
    rows = [
        {
            "question": "floors",
            "labels": labels,
            "base": "copy",
            "seconds": times,
            "facts": facts,
            "over_ours": {"native": 1, "copy": of_copy},
        }
        for of_copy in (0.91, 0.89)
    ]
    result = {"passed": True, "stopped": False, "seconds": 1, "environment": ENVIRONMENT, "output": ""}
    text = gpu.summary({"bench_floors": result}, [], {"rows": rows})
    assert "| light_update | forward | 256x256x56x56 | 1000 ±0% | 0.91 of copy | ≥ 0.9 | yes |" in text
    assert "| 0.89 of copy | ≥ 0.9 | no |" in text


def test_pieces_run_the_installed_package(tmp_path):
    """`python -m` would put the source tree first, from which nothing native can be imported."""
    code = "import dla_kernels, os; assert os.getcwd() not in dla_kernels.__file__.removeprefix(os.getcwd() + '/.venv')"
    (tmp_path / "where.py").write_text(code)
    command = [sys.executable, "-c", f"{gpu.RUN_MODULE}('where', run_name='__main__', alter_sys=True)", "where"]
    done = subprocess.run(command, cwd=ROOT, env=gpu.os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["graphs_streams_devices", "ops_norm_residual", "models_cells", "large_maps"])
def test_test_pieces_are_commands_of_pytest(name):
    """As they are run, on the CPU, up to the tests' names."""
    command = [word if word != "cuda" else "cpu" for word in gpu.pieces()[name].command]
    done = subprocess.run([*command, "--collect-only"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "::test_" in done.stdout


def test_every_test_file_is_a_piece(with_sanitizer):
    pieces = gpu.pieces()
    files = {word for piece in pieces.values() for word in piece.command if word.endswith(".py")}
    assert len(files) == 3 + len(gpu.OPS_TESTS) + len(gpu.MODEL_TESTS)
    assert [file for file in files if not (ROOT / file).exists()] == []
    for tool in gpu.SANITIZERS:
        assert [name for name in pieces if name.startswith(tool)] == [f"{tool}_planted", *(f"{tool}_{o}" for o in OPS)]
    assert {name for name in pieces if name.startswith("bench_")} == {f"bench_{q}" for q in report.TITLES}


OPS = gpu.dla_kernels.ops.__all__


def test_what_the_sanitizers_run():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "sanitized.py"), "cpu", "refresh_gates"], capture_output=True, text=True
    )
    rows = sum(row.id.startswith("refresh_gates-") for row in ROWS)
    assert done.stdout == f"refresh_gates: {rows} rows ran\n" != "refresh_gates: 0 rows ran\n", done.stderr
