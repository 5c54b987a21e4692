from pathlib import Path

import pytest
import torch
from test_dla.shapes import write_shapes
from test_dla.test_cli import refuse, succeed

import dla
from dla.detection.training import load_detector

NAME = "fasterrcnn_resnet20_dla_l_fpn"
TINY = [
    "--accelerator", "cpu", "--no-progress", "--workers", 0, "--batch-size", 2, "--short-side", 32,
    "--fpn-channels", 8, "--warmup-steps", 3, "--limit-val-batches", 1,
]  # fmt: skip
ON_RESUME = TINY[:5] + TINY[-2:]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("coco") / "shapes", train=6, val=4, short_side=32)


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    text = succeed("train-detection", "--model", NAME, "--data", shapes, "--epochs", 1, "--out", out, *TINY)
    assert "ap50" in text
    assert f"written to {out}: last.ckpt, best.ckpt, version_0/metrics.csv" in text
    return out


def test_writes_checkpoints_and_metrics(trained):
    assert {path.name for path in trained.iterdir()} == {"last.ckpt", "best.ckpt", "version_0"}
    header = (trained / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train_loss", "train_loss_box_reg", "train_loss_objectness", "val_ap", "val_ap50", "val_ap_small"} <= set(
        header
    )


def test_resume_goes_on_where_it_stopped(trained, shapes, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    succeed("train-detection", "--model", NAME, "--data", shapes, "--epochs", 2, "--out", whole, *TINY)
    succeed("train-detection", "--resume", trained / "last.ckpt", "--epochs", 2, "--out", resumed, *ON_RESUME)
    a, b = (torch.load(path / "last.ckpt", weights_only=True) for path in (whole, resumed))
    assert (b["epoch"], b["global_step"]) == (1, 6)
    assert all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"])
    assert a["hyper_parameters"] == b["hyper_parameters"]
    assert a["optimizer_states"][0]["param_groups"][0]["lr"] == b["optimizer_states"][0]["param_groups"][0]["lr"]


def test_options_arrive(shapes, tmp_path):
    dla.create_model("resnet20_dla_b", reduction=8).save_pretrained(tmp_path / "weights")
    succeed(
        "train-detection", "--model", "maskrcnn_resnet20_dla_b_fpn", "--data", shapes, "--out", tmp_path / "out", *TINY,
        "--weights", tmp_path / "weights", "--trainable-layers", 1, "--seed", 3, "--epochs", 1, "--lr", 0.001,
        "--momentum", 0.5, "--weight-decay", 0.01, "--milestones", "1,2", "--gamma", 0.5, "--drop-path-rate", 0.1,
        "--limit-train-batches", 1,
    )  # fmt: skip
    hparams = load_detector(tmp_path / "out" / "last.ckpt").hparams
    assert hparams.recipe == {
        "epochs": 1, "batch_size": 2, "lr": 0.001, "momentum": 0.5, "weight_decay": 0.01, "milestones": [1, 2],
        "gamma": 0.5, "warmup_epochs": 0, "drop_path_rate": 0.1, "short_side": 32, "warmup_steps": 3,
    }  # fmt: skip
    assert (hparams.seed, hparams.data, hparams.categories) == (3, str(shapes), ["square", "disc", "triangle"])
    chosen = {"reduction": 8, "trainable_layers": 1, "frozen_norm": True, "fpn_channels": 8}
    assert hparams.model_args.items() >= chosen.items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--model and --data are required, or --resume with a checkpoint"),
        (["--model", NAME, "--data", "/nowhere"], "there is no /nowhere/annotations/instances_train2017.json"),
        (["--model", NAME, "--data", "/nowhere", "--lr", "0"], "`lr` must be above 0"),
        (["--model", NAME, "--data", "/nowhere", "--short-side", "0"], "`short_side` must be at least 1, got 0"),
        (["--model", "resnet20", "--data", "SHAPES"], "`name` must be fasterrcnn or maskrcnn, then _MODEL_fpn"),
        (["--model", NAME, "--data", "SHAPES", "--config", "mine"], "one of paper, official, released, got 'mine'"),
        (["--model", NAME, "--data", "SHAPES", "--weights", "none.ckpt"], "none.ckpt"),
        (["--model", NAME, "--data", "SHAPES", "--batch-size", "7"], "`batch_size` must be 1 to 6"),
        (["--resume", "none.ckpt"], "none.ckpt"),
        (["--resume", "none.ckpt", "--weights", "a", "--lr", "1"], "--weights, --lr: not with --resume"),
    ],
)
def test_refuses(options, message, shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refuse("train-detection", *(shapes if option == "SHAPES" else option for option in options))
    assert not list(tmp_path.glob("**/*.ckpt"))


def test_refuses_other_runs_and_other_categories(trained, shapes, tmp_path):
    line = refuse("train-detection", "--model", NAME, "--data", shapes, "--out", trained)
    assert f"--resume {trained / 'last.ckpt'}, or another --out" in line
    other = write_shapes(tmp_path / "other", 2, 2, 32)
    for file in (other / "annotations").iterdir():
        file.write_text(file.read_text().replace('"disc"', '"circle"'))
    line = refuse("train-detection", "--resume", trained / "last.ckpt", "--data", other)
    assert "the model knows square, disc, triangle, the data square, circle, triangle" in line
    assert "no checkpoint of `dla train`" in refuse("evaluate", trained / "last.ckpt")
