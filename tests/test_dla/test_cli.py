import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from typer.testing import CliRunner

import dla
import dla_kernels
from dla import plots
from dla.cli import app
from dla.data import open_sets
from dla.training import load_classifier

TINY = ["--accelerator", "cpu", "--no-progress", "--limit-train-batches", "2", "--limit-val-batches", "1"]


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def succeed(*args) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def refuse(*args) -> str:
    """The one line that a refused command says."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("dla: ")
    return line


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder of a short training of DLA-B-20 on small digits."""
    out = tmp_path_factory.mktemp("runs") / "dla_b"
    succeed("train", "--model", "resnet20_dla_b", "--data", "digits:8", "--epochs", 1, "--out", out, *TINY)
    return out


def test_start_is_light():
    heavy = "lightning", "sklearn", "matplotlib"
    code = f"import sys, dla.cli; print([m for m in {heavy!r} if m in sys.modules])"
    job = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert job.stdout.strip() == "[]"


def test_info():
    text = succeed("info")
    for version in (dla_kernels.__version__, torch.__version__, sys.version.split()[0]):
        assert version in text
    for name, available in dla_kernels.backends().items():
        (line,) = [line for line in text.splitlines() if f"backend {name} " in line]
        assert ("not available" in line) is (available is not True)


def test_info_says_why_a_backend_is_missing(monkeypatch):
    monkeypatch.setattr(dla_kernels, "backends", lambda: {"reference": True, "native": "built without a compiler"})
    lines = succeed("info").splitlines()
    assert any("backend native" in line and "not available: built without a compiler" in line for line in lines)


def test_train_writes_checkpoints_and_metrics(trained):
    assert {path.name for path in trained.iterdir()} == {"last.ckpt", "best.ckpt", "version_0"}
    with (trained / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr-SGD"} <= rows[0].keys()
    state = torch.load(trained / "last.ckpt", weights_only=True)
    assert (state["epoch"], state["global_step"]) == (0, 2)


def test_recipe_and_model_options_arrive(tmp_path):
    succeed(
        "train", "--model", "resnet20_dla_l", "--data", "digits:8", "--out", tmp_path, *TINY, "--recipe", "cifar",
        "--epochs", 1, "--batch-size", 16, "--lr", 0.02, "--momentum", 0.5, "--weight-decay", 0.001,
        "--milestones", "3,7", "--gamma", 0.5, "--warmup-epochs", 2, "--drop-path-rate", 0.4,
        "--cell", "dia", "--config", "official", "--reduction", 8, "--seed", 5, "--precision", "bf16-mixed",
    )  # fmt: skip
    hparams = load_classifier(tmp_path / "last.ckpt").hparams
    assert hparams.recipe == {
        "epochs": 1, "batch_size": 16, "lr": 0.02, "momentum": 0.5, "weight_decay": 0.001, "milestones": [3, 7],
        "gamma": 0.5, "warmup_epochs": 2, "drop_path_rate": 0.4,
    }  # fmt: skip
    assert hparams.model_args == {
        "cell": "dia", "config": "official", "reduction": 8, "num_classes": 10, "in_chans": 1,
    }  # fmt: skip
    assert (hparams.model, hparams.data, hparams.seed) == ("resnet20_dla_l", "digits:8", 5)


def test_same_seed_same_weights(tmp_path):
    command = ["train", "--model", "resnet20_dla_l", "--data", "digits:8", "--epochs", 1, *TINY]
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        succeed(*command, "--seed", seed, "--out", tmp_path / name)
    a, b, c = (torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["net.fc.weight"], c["net.fc.weight"])


def test_resume_goes_on_where_it_stopped(trained, tmp_path):
    whole = tmp_path / "whole"
    succeed("train", "--model", "resnet20_dla_b", "--data", "digits:8", "--epochs", 2, "--out", whole, *TINY)
    text = succeed("train", "--resume", trained / "last.ckpt", "--epochs", 2, "--out", tmp_path / "resumed", *TINY)
    assert f"written to {tmp_path / 'resumed'}" in text
    assert load_classifier(tmp_path / "resumed" / "last.ckpt").hparams == load_classifier(whole / "last.ckpt").hparams
    a, b = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "resumed"))
    assert (b["epoch"], b["global_step"]) == (1, 4)
    assert all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"])


def test_resume_on_other_data_notes_them(trained, tmp_path):
    succeed(
        "train", "--resume", trained / "last.ckpt", "--epochs", 2, "--data", "digits:12", "--out", tmp_path, *TINY
    )  # fmt: skip
    assert load_classifier(tmp_path / "last.ckpt").hparams.data == "digits:12"


def test_finished_run_resumes_in_its_own_folder(trained, tmp_path):
    """Without --out: the same folder, a new log beside the old one."""
    shutil.copytree(trained, tmp_path / "run")
    log = (tmp_path / "run" / "version_0" / "metrics.csv").read_text()
    succeed("train", "--resume", tmp_path / "run" / "last.ckpt", "--epochs", 2, *TINY)
    assert (tmp_path / "run" / "version_0" / "metrics.csv").read_text() == log
    assert (tmp_path / "run" / "version_1" / "metrics.csv").exists()
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["epoch"] == 1


def test_evaluate_counts_every_held_out_image(trained):
    text = succeed("evaluate", trained / "last.ckpt", "--accelerator", "cpu", "--no-progress", "--batch-size", 200)
    images, labels = zip(*open_sets("digits:8").test, strict=True)
    classifier = load_classifier(trained / "last.ckpt").eval()
    with torch.no_grad():
        hits = classifier(torch.stack(images)).argmax(1) == torch.tensor(labels)
    assert text.splitlines()[0] == "resnet20_dla_b on digits:8"
    assert f"accuracy  {hits.float().mean():.4f}" in text


def test_evaluate_on_other_data(trained):
    text = succeed("evaluate", trained / "last.ckpt", "--data", "digits:12", "--accelerator", "cpu", "--no-progress")
    assert text.startswith("resnet20_dla_b on digits:12")


def test_plot_draws_the_attention(trained, tmp_path, monkeypatch):
    drawn = {}
    real = plots.layer_attention_heatmaps
    monkeypatch.setattr(plots, "layer_attention_heatmaps", lambda models: drawn.update(models) or real(models))
    out = tmp_path / "new" / "attention.png"
    assert str(out) in succeed("plot", trained / "last.ckpt", "--out", out, "--images", 450)
    images = torch.stack([image for image, _ in open_sets("digits:8").test])
    model = load_classifier(trained / "last.ckpt").net.eval()
    expected = [maps.mean((0, 1)) for maps in dla.layer_attention_maps(model, images)]
    for actual, mean in zip(drawn["resnet20_dla_b"], expected, strict=True):
        assert torch.allclose(actual.cpu(), mean, atol=1e-5)
    pixels = imread(out)[..., :3]
    assert 0.3 < (pixels.min(-1) > 0.99).mean() < 0.95  # neither blank nor full


def test_plot_needs_a_softmax_over_layers(tmp_path):
    succeed("train", "--model", "resnet20_mrla_l", "--data", "digits:8", "--epochs", 1, "--out", tmp_path, *TINY)
    line = refuse("plot", tmp_path / "last.ckpt", "--out", tmp_path / "a.png")
    assert "no softmax over layers: build it with interaction mrla_b or dla_b" in line
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--model is required"),
        (["--model", "resnet21"], "must be one of resnet20, resnet20_lii, "),
        (["--model", "resnet20_dla_l", "--data", "mnist"], "expected one of digits, cifar10, cifar100, imagenet"),
        (["--model", "resnet20_dla_l", "--data", "imagenet:/nowhere"], "no folder /nowhere/train"),
        (["--model", "resnet20_dla_l", "--data", "cifar10:/nowhere"], "--download"),
        (["--model", "resnet20_dla_l", "--cell", "gru"], "'gru'"),
        (["--model", "resnet20_dla_l", "--config", "mine"], "one of paper, official, released, got 'mine'"),
        (["--model", "resnet20_dla_l", "--reduction", "1000"], "1000"),
        (["--model", "resnet20_dla_l", "--recipe", "mine"], "one of cifar, imagenet, digits, got 'mine'"),
        (["--model", "resnet20_dla_l", "--lr", "-1"], "`lr` must be above 0, got -1.0"),
        (["--model", "resnet20_dla_l", "--milestones", "ten"], "--milestones ten: expected epochs such as 100,150"),
        (["--model", "resnet20_dla_l", "--batch-size", "2000"], "`batch_size` must be 1 to 1347"),
        (["--model", "resnet20_dla_l", "--workers", "-1"], "`workers` must be 0 or more"),
        (["--model", "resnet20_dla_l", "--precision", "8"], "8"),
        (["--model", "resnet20_dla_l", "--accelerator", "abacus"], "abacus"),
        (["--model", "resnet20_dla_l", "--resume", "none.ckpt"], "--model: not with --resume"),
        (["--resume", "none.ckpt"], "none.ckpt"),
        (["--resume", "none.ckpt", "--lr", "1", "--batch-size", "4"], "--batch-size, --lr: not with --resume"),
    ],
)
def test_train_refuses(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refuse("train", *options)
    assert not list(tmp_path.glob("**/*.ckpt"))


def test_train_refuses_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    line = refuse("train", "--model", "resnet20", "--out", tmp_path / "file")
    assert f"`out` must be a folder that can be written, got {tmp_path / 'file'}" in line


def test_train_refuses_to_overwrite_a_run(trained):
    before = (trained / "last.ckpt").read_bytes()
    line = refuse("train", "--model", "resnet20", "--out", trained)
    assert f"--resume {trained / 'last.ckpt'}, or another --out" in line
    assert (trained / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("command", ["evaluate", "plot"])
def test_bad_checkpoints_are_refused(command, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "none.ckpt" in refuse(command, "none.ckpt")
    Path("half.ckpt").write_bytes((trained / "last.ckpt").read_bytes()[:100_000])
    assert "half.ckpt" in refuse(command, "half.ckpt")
    torch.save({"state_dict": {}}, "foreign.ckpt")
    assert "foreign.ckpt is no checkpoint of `dla train`" in refuse(command, "foreign.ckpt")


def test_data_must_fit_the_model(trained, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "red").mkdir(parents=True)
        Image.new("RGB", (300, 300), "red").save(tmp_path / split / "red" / "0.png")
    line = refuse("evaluate", trained / "last.ckpt", "--data", f"imagenet:{tmp_path}")
    assert "the model has num_classes 10, the data 1" in line


def test_errors_of_the_work_keep_their_traceback(tmp_path, monkeypatch):
    def broken(self, batch, batch_idx):
        raise ValueError("a bug")

    monkeypatch.setattr("dla.training.Classifier.training_step", broken)
    result = run("train", "--model", "resnet20", "--data", "digits:8", "--out", tmp_path, *TINY)
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)


@pytest.mark.slow
@pytest.mark.parametrize("interaction", ["lii", "mrla_b", "mrla_l", "dla_b", "dla_l"])
def test_two_processes_from_the_command_line(tmp_path, interaction):
    command = ["-m", "dla.cli", "train", "--model", f"resnet20_{interaction}", "--data", "digits:8", "--epochs", "1"]
    job = subprocess.run(
        [sys.executable, *command, "--devices", "2", "--out", tmp_path, *TINY], capture_output=True, text=True
    )
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("written to") == 1
    assert load_classifier(tmp_path / "last.ckpt").hparams.model == f"resnet20_{interaction}"
