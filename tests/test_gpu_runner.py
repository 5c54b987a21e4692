"""benchmarks/gpu.py, as far as it goes without a GPU."""

import json
import sys

import pytest
import torch

from dla.benchmarks import gpu

ENVIRONMENT = {"device": "A GPU", "commit": "abc", "date": "today", "torch": "2", "driver": "1"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_what_it_cannot_run(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 0
    words = capsys.readouterr().out
    assert words.startswith("Nothing was run: torch finds no GPU here. Not run:")
    for piece in ("tests", "networks", "large_maps", "bench_ops", "bench_models"):
        assert f"  {piece}: " in words


def test_goes_on_where_it_stopped(tmp_path):
    count = "import pathlib; p = pathlib.Path('{}'); p.write_text(p.read_text() + 'x'); {}"
    (tmp_path / "good").write_text("")
    (tmp_path / "bad").write_text("")
    asked = {
        "good": [sys.executable, "-c", count.format(tmp_path / "good", "")],
        "bad": [sys.executable, "-c", count.format(tmp_path / "bad", "raise SystemExit('planted')")],
    }
    for _ in range(2):
        assert not gpu.run(asked, tmp_path / "results", ENVIRONMENT)
    assert [(tmp_path / name).read_text() for name in asked] == ["x", "xx"]
    assert "planted" in json.loads((tmp_path / "results" / "checks.json").read_text())["bad"]["output"]
    text = (tmp_path / "results" / "checks.md").read_text()
    assert text.startswith("# A GPU\n")
    assert "- good: passed in 0 s, today, commit abc, torch 2, driver 1\n" in text
    assert "- bad: FAILED" in text
    gpu.run(asked, tmp_path / "results", ENVIRONMENT | {"commit": "later"})
    assert (tmp_path / "good").read_text() == "xx"


def test_pieces_run_the_installed_package():
    """`python -m pytest` would put the source tree first."""
    assert all("-m" not in command[:3] for command in gpu.pieces().values())
