import csv
import time
from dataclasses import replace

import pytest
import torch
import typer
from torch.utils.data import Subset
from typer.testing import CliRunner

import dla
from dla import demo, plots
from dla.data import open_sets
from dla.training import count_parameters, load_classifier

FILES = {"results.md", "results.csv", "accuracy.png", "layer_attention.png", "resnet20_dla_l.ckpt"}


def run(*args):
    app = typer.Typer()
    app.command()(demo.main)
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def drawn(monkeypatch):
    """What the demo gave the two plots."""
    given = {}
    for name in ("accuracy_curves", "layer_attention_heatmaps"):
        real = getattr(plots, name)
        monkeypatch.setattr(
            plots, name, lambda data, *args, name=name, real=real: given.update({name: data}) or real(data, *args)
        )
    return given


@pytest.fixture
def short(monkeypatch):
    """The demo on few digits, its deep models shallow."""
    sets = open_sets("digits:8")
    few = replace(sets, train=Subset(sets.train, range(160)), test=Subset(sets.test, range(90)))
    monkeypatch.setattr(demo, "open_sets", lambda data: few)
    monkeypatch.setattr(demo, "ATTENTIVE", {"static": "resnet29_mrla_b", "dynamic": "resnet20_dla_b"})
    yield few
    torch.use_deterministic_algorithms(False)


def table(out):
    with (out / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_demo_writes_what_it_measured(short, drawn, tmp_path):
    result = run("--out", tmp_path / "demo", "--epochs", 2, "--attention-epochs", 1)
    assert result.exit_code == 0, result.output
    out = tmp_path / "demo"
    assert {path.name for path in out.iterdir()} == FILES

    rows = table(out)
    assert [row["model"] for row in rows] == ["ResNet-20", "MRLA-L-20", "DLA-L-20"]
    for row, model in zip(rows, ("resnet20", "resnet20_mrla_l", "resnet20_dla_l"), strict=True):
        assert row["parameters"] == f"{count_parameters(dla.create_model(model, in_chans=1)):,}"
        assert 0 < float(row["ms per step"]) < 60_000

    curves = drawn["accuracy_curves"]
    assert list(curves) == [row["model"] for row in rows]
    assert all(len(curve) == 2 for curve in curves.values())
    assert [f"{curve[-1]:.2%}" for curve in curves.values()] == [row["test accuracy"] for row in rows]

    maps = drawn["layer_attention_heatmaps"]
    assert [len(maps["static"]), len(maps["dynamic"])] == [3, 3]
    assert all(torch.allclose(w.sum(1), torch.ones(len(w)), atol=1e-5) for w in maps["static"] + maps["dynamic"])

    # The checkpoint is the model of the table's last row.
    classifier = load_classifier(out / "resnet20_dla_l.ckpt").eval()
    images, labels = zip(*short.test, strict=True)
    with torch.no_grad():
        hits = classifier(torch.stack(images)).argmax(1) == torch.tensor(labels)
    assert rows[-1]["test accuracy"] == f"{hits.float().mean():.2%}"

    lines = (out / "results.md").read_text().splitlines()
    assert lines[0] == "| model | test accuracy | parameters | ms per step |"
    assert lines[2:5] == [f"| {' | '.join(row.values())} |" for row in rows]
    assert "90 held-out digits of 16 x 16 pixels, after 2 epochs, seed 0" in lines[6]
    for row in rows:
        assert row["test accuracy"] in result.stdout
    for name in FILES:
        assert f"written: {out / name}" in result.stdout.replace("\n", "")


def test_same_seed_same_accuracy_weights_and_attention(short, drawn, tmp_path):
    outcomes = []
    for name in ("a", "b"):
        result = run("--out", tmp_path / name, "--epochs", 1, "--attention-epochs", 1, "--seed", 7)
        assert result.exit_code == 0, result.output
        weights = load_classifier(tmp_path / name / "resnet20_dla_l.ckpt").state_dict()
        outcomes.append((drawn["accuracy_curves"], weights, drawn["layer_attention_heatmaps"]))
    (curves_a, weights_a, maps_a), (curves_b, weights_b, maps_b) = outcomes
    assert curves_a == curves_b
    assert all(torch.equal(weights_a[key], weights_b[key]) for key in weights_a)
    assert all(torch.equal(x, y) for name in maps_a for x, y in zip(maps_a[name], maps_b[name], strict=True))


def test_folder_that_cannot_be_written_is_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "open_sets", lambda data: pytest.fail("work began"))
    (tmp_path / "file").touch()
    result = run("--out", tmp_path / "file")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert f"`out` must be a folder that can be written, got {tmp_path / 'file'}" in line


@pytest.mark.slow
def test_whole_demo(drawn, tmp_path):
    began = time.monotonic()
    result = run("--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert time.monotonic() - began < 600
    accuracies = {row["model"]: float(row["test accuracy"].rstrip("%")) for row in table(tmp_path)}
    assert accuracies["DLA-L-20"] >= 97
    maps = drawn["layer_attention_heatmaps"]
    assert all(w.shape == (6, 6) for stages in maps.values() for w in stages)
