import csv
import io
import os
import pickle
import signal
import socket
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from test_dla import training_job
from torch.nn import functional as F

import dla
from dla.data import ImageData
from dla.training import (
    CIFAR,
    DIGITS,
    IMAGENET,
    Classifier,
    Recipe,
    count_parameters,
    load_classifier,
    make_trainer,
    recipe_for,
    writable_folder,
)

TINY = {"in_chans": 1}


def rates(recipe: Recipe) -> list[float]:
    """The learning rate in each epoch."""
    optimizers = Classifier("resnet20", recipe).configure_optimizers()
    optimizer, schedule, values = optimizers["optimizer"], optimizers["lr_scheduler"], []
    for _ in range(recipe.epochs):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


def test_cifar_recipe_is_the_papers():
    assert asdict(CIFAR) == {
        "epochs": 180, "batch_size": 128, "milestones": (100, 150), "lr": 0.1, "gamma": 0.1,
        "momentum": 0.9, "weight_decay": 1e-4, "warmup_epochs": 0, "drop_path_rate": 0.2,
    }  # fmt: skip
    assert rates(CIFAR) == pytest.approx([0.1] * 100 + [0.01] * 50 + [0.001] * 30)


def test_imagenet_recipe_is_the_papers():
    assert (IMAGENET.epochs, IMAGENET.batch_size, IMAGENET.drop_path_rate) == (100, 256, 0.2)
    warm_up = [0.025, 0.05, 0.075]
    assert rates(IMAGENET) == pytest.approx(warm_up + [0.1] * 27 + [0.01] * 30 + [0.001] * 30 + [0.0001] * 10)


def test_momentum_and_weight_decay_reach_the_optimizer():
    recipe = replace(CIFAR, momentum=0.8, weight_decay=3e-4)
    optimizer = Classifier("resnet20", recipe).configure_optimizers()["optimizer"]
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.8, 3e-4, False)
    assert sum(p.numel() for p in group["params"]) == count_parameters(dla.create_model("resnet20"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("batch_size", 0), ("milestones", (5, 5)), ("milestones", (0,)), ("milestones", (7, 5)),
        ("lr", 0.0), ("gamma", 1.5),
        ("momentum", 1.0), ("weight_decay", -1.0), ("warmup_epochs", -1), ("drop_path_rate", 1.0),
    ],
)  # fmt: skip
def test_bad_recipe_fields_are_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be .*, got {value}".replace("(", r"\(").replace(")", r"\)")):
        replace(DIGITS, **{field: value})


def test_recipes_are_frozen():
    with pytest.raises(FrozenInstanceError):
        DIGITS.lr = 1.0


@pytest.mark.parametrize(
    ("data", "name", "recipe"),
    [
        ("cifar10:x", None, CIFAR), ("cifar100", None, CIFAR), ("imagenet:x", None, IMAGENET),
        ("digits:8", None, DIGITS), ("digits", "cifar", CIFAR),
    ],
)  # fmt: skip
def test_recipe_follows_the_data_unless_named(data, name, recipe):
    assert recipe_for(data, name) is recipe


def test_unknown_recipe_lists_the_known():
    with pytest.raises(ValueError, match="`recipe` must be one of cifar, imagenet, digits, got 'mnist'"):
        recipe_for("digits", "mnist")


def test_seed_makes_the_weights_and_touches_nothing_else():
    before = torch.random.get_rng_state()
    a, b, c = (Classifier("resnet20_dla_l", DIGITS, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["net.fc.weight"], c["net.fc.weight"])


def test_arguments_reach_the_model():
    args = {"cell": "lstm", "config": "official", "num_classes": 7, "in_chans": 1}
    net = Classifier("resnet20_dla_l", replace(DIGITS, drop_path_rate=0.3), args).net
    expected = dla.create_model("resnet20_dla_l", **args | {"config": dla.OFFICIAL}, drop_path_rate=0.3)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}
    assert [m.drop_path for m in net.modules() if hasattr(m, "lambda_")] == [0.3] * 6
    assert net.layer1.config == dla.OFFICIAL


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"must be one of resnet20, .*, got 'resnet21'"):
        Classifier("resnet21", DIGITS)
    with pytest.raises(ValueError, match="`config` must be one of paper, official, released, got 'mine'"):
        Classifier("resnet20_dla_l", DIGITS, {"config": "mine"})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    return training_job.fit(out), out


def metrics_of(log: Path) -> list[dict[str, str]]:
    with log.open() as file:
        return list(csv.DictReader(file))


def test_logged_metrics_are_those_of_the_weights(unbroken):
    classifier, out = unbroken
    last = [row for row in metrics_of(out / "version_0" / "metrics.csv") if row["val_loss"]][-1]
    images, labels = zip(*training_job.few_digits().test, strict=True)
    with torch.no_grad():
        logits = classifier.eval()(torch.stack(images))
    labels = torch.tensor(labels)
    assert float(last["val_loss"]) == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert float(last["val_accuracy"]) == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    in_top5 = (logits.topk(5).indices == labels[:, None]).any(1)
    assert float(last["val_top5"]) == pytest.approx(in_top5.float().mean().item())


def test_training_step_is_cross_entropy(unbroken):
    classifier = Classifier("resnet20", DIGITS, TINY).eval()
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
    classifier.log = lambda *_, **__: None
    expected = -classifier(images).log_softmax(1)[torch.arange(4), labels].mean()
    assert_close(classifier.training_step((images, labels), 0), expected, 1e-6)


def test_checkpoint_names_its_model(unbroken):
    classifier, out = unbroken
    state = torch.load(out / "last.ckpt", weights_only=True)
    assert state["hyper_parameters"] == {
        "model": "resnet20_dla_l",
        "recipe": asdict(training_job.RECIPE) | {"milestones": [1]},
        "model_args": TINY,
        "data": "digits:8",
        "seed": 3,
    }
    loaded = load_classifier(out / "last.ckpt").eval()
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded(images), classifier.eval()(images))
    assert loaded.recipe == training_job.RECIPE
    assert load_classifier(out / "last.ckpt", epochs=9).recipe == replace(training_job.RECIPE, epochs=9)


def test_best_checkpoint_has_the_highest_accuracy(unbroken):
    _, out = unbroken
    accuracies = [float(r["val_accuracy"]) for r in metrics_of(out / "version_0/metrics.csv") if r["val_accuracy"]]
    assert len(accuracies) == 2
    best = torch.load(out / "best.ckpt", weights_only=True)
    assert accuracies[best["epoch"]] == max(accuracies)


class Foreign:
    """Unpickling one would print."""

    def __reduce__(self):
        return print, ("code in a checkpoint was run",)


def damaged(kind: str, good: Path, path: Path) -> None:
    whole = good.read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "code":
        path.write_bytes(pickle.dumps({"state_dict": Foreign()}))
    elif kind == "foreign":
        torch.save({"state_dict": {"fc.weight": torch.ones(2)}}, path)
    elif kind == "tensor":
        torch.save(torch.ones(2), path)
    elif kind == "other weights":
        state = torch.load(good, weights_only=True)
        state["hyper_parameters"]["model"] = "resnet29_dla_l"
        torch.save(state, path)


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "code", "foreign", "tensor", "other weights"])
def test_bad_checkpoints_are_refused(unbroken, tmp_path, capsys, kind):
    path = tmp_path / "bad.ckpt"
    damaged(kind, unbroken[1] / "last.ckpt", path)
    with pytest.raises(ValueError, match=str(path)):
        load_classifier(path)
    assert capsys.readouterr().out == ""


def test_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        load_classifier(tmp_path / "none.ckpt")


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"`out` must be a folder that can be written, got {out}"):
            writable_folder(out)
        with pytest.raises(ValueError, match="`out` must be a folder"):
            make_trainer(1, out)
    assert writable_folder(tmp_path / "new" / "folder").is_dir()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_missing_device_is_refused():
    with pytest.raises(ValueError, match=r"(?i)cuda|gpu"):
        make_trainer(1, accelerator="gpu")


def assert_same(a, b, name: str) -> None:
    """Bitwise, through nested dicts and lists."""
    assert type(a) is type(b), name
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_same(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{name}.{i}")
    else:
        assert a == b, name


def assert_same_run(a: Path, b: Path) -> None:
    a, b = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (a, b))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "hyper_parameters"):
        assert_same(a[part], b[part], part)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run whose process was killed in the midst of its second epoch."""
    out = tmp_path_factory.mktemp("killed")
    job = subprocess.run([sys.executable, training_job.__file__, "kill", out], capture_output=True, text=True)
    assert job.returncode == -signal.SIGKILL, job.stderr
    state = torch.load(out / "last.ckpt", weights_only=True)
    assert (state["epoch"], state["global_step"]) == (0, 3)
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_run_equals_an_unbroken_one(unbroken, killed, tmp_path, workers):
    training_job.fit(tmp_path, workers, resume=killed / "last.ckpt")
    assert_same_run(tmp_path, unbroken[1])
    second_epoch = [row for row in metrics_of(unbroken[1] / "version_0/metrics.csv") if row["epoch"] == "1"]
    resumed = [row for row in metrics_of(tmp_path / "version_0/metrics.csv") if row["epoch"] == "1"]
    assert resumed == second_epoch


def test_resuming_a_finished_run_changes_nothing(unbroken, tmp_path):
    resumed = training_job.fit(tmp_path, resume=unbroken[1] / "last.ckpt")
    assert_same(resumed.state_dict(), unbroken[0].state_dict(), "weights")


def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    jobs = [
        subprocess.Popen(
            [sys.executable, training_job.__file__, "ddp", tmp_path],
            env=os.environ | {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    alone = {model: training_job.fit_shared(model, devices=1) for model in training_job.DDP_MODELS}
    for job in jobs:
        _, errors = job.communicate(timeout=300)
        assert job.returncode == 0, errors
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for model, classifier in alone.items():
        assert_same(ranks[0][model], ranks[1][model], model)
        start = Classifier(model, DIGITS, TINY).double().state_dict()
        for name, parameter in classifier.named_parameters():
            # What was learnt, not the weights: they hardly move in two steps.
            change, expected = ranks[0][model][name] - start[name], parameter - start[name]
            assert expected.any(), f"{model} {name} did not move"
            assert_close(change, expected, 1e-9, f"{model} {name}")


def test_batch_of_one_process_is_checked_early():
    with pytest.raises(ValueError, match="`batch_size` must be a multiple of the 3 processes, got 32"):
        ImageData(training_job.few_digits(), 32, processes=3)


def test_low_precision_trains(tmp_path):
    trainer = make_trainer(
        1, tmp_path, progress=False, accelerator="cpu", precision="bf16-mixed", limit_train_batches=2
    )
    classifier = Classifier("resnet20_dla_b", replace(DIGITS, batch_size=32), TINY)
    before = {k: v.clone() for k, v in classifier.named_parameters()}
    trainer.fit(classifier, ImageData(training_job.few_digits(), 32))
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    assert all(v.isfinite().all() and not torch.equal(v, before[k]) for k, v in classifier.named_parameters())


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training_job.fit_shared("resnet20", devices=1)
    assert list(tmp_path.iterdir()) == []


def test_progress_bar_shows_the_accuracy(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    trainer = make_trainer(1, accelerator="cpu", limit_train_batches=1, limit_val_batches=1)
    trainer.fit(Classifier("resnet20", DIGITS, TINY), ImageData(training_job.few_digits(), 32))
    assert "val_accuracy" in screen.getvalue()
