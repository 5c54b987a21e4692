"""Training on Lightning: recipes, the module, its checkpoints and its trainer.

A training in three lines:

    classifier = Classifier("resnet20_dla_l", DIGITS, {"in_chans": 1}, data="digits")
    trainer = make_trainer(DIGITS.epochs, out="runs/digits")
    trainer.fit(classifier, ImageData(open_sets("digits"), DIGITS.batch_size))
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from inspect import signature
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, MultiStepLR
from torchmetrics.classification import MulticlassAccuracy

import dla
from dla.checkpoints import load_checkpoint
from dla.data import mix_seed


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with momentum, whose rate is multiplied by `gamma` at each of `milestones` (epochs).

    `batch_size` counts the images of one optimiser step over all devices. Over `warmup_epochs` the rate rises in equal
    steps, from lr / (warmup_epochs + 1). `drop_path_rate` is the models' probability of dropping a layer attention.
    """

    epochs: int
    batch_size: int
    milestones: tuple[int, ...]
    lr: float = 0.1
    gamma: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_epochs: int = 0
    drop_path_rate: float = 0.2

    def __post_init__(self):
        object.__setattr__(self, "milestones", tuple(self.milestones))
        bounds = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "milestones": (
                all(a < b for a, b in pairwise((0, *self.milestones))),
                "increasing epochs, at least 1",
            ),
            "lr": (self.lr > 0, "above 0"),
            "gamma": (0 < self.gamma <= 1, "in (0, 1]"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "warmup_epochs": (self.warmup_epochs >= 0, "at least 0"),
            "drop_path_rate": (0 <= self.drop_path_rate < 1, "in [0, 1)"),
        }
        for name, (holds, allowed) in bounds.items():
            if not holds:
                raise ValueError(f"`{name}` must be {allowed}, got {getattr(self, name)}")

    def as_dict(self) -> dict[str, Any]:
        """The fields as values that JSON and YAML know."""
        return asdict(self) | {"milestones": list(self.milestones)}


CIFAR = Recipe(epochs=180, batch_size=128, milestones=(100, 150))
IMAGENET = Recipe(epochs=100, batch_size=256, milestones=(30, 60, 90), warmup_epochs=3)
DIGITS = Recipe(epochs=12, batch_size=64, milestones=(8, 11), lr=0.05, warmup_epochs=1, drop_path_rate=0.1)

RECIPES = {"cifar": CIFAR, "imagenet": IMAGENET, "digits": DIGITS}


def recipe_for(data: str, name: str | None = None) -> Recipe:
    """The preset `name`, by default the one for the images that `data` names. Raises ValueError for an unknown one."""
    if name is None:
        kind = data.partition(":")[0]
        name = "cifar" if kind.startswith("cifar") else kind
    if name not in RECIPES:
        raise ValueError(f"`recipe` must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


class Module(LightningModule):
    """What classifiers and detectors share: seeds and the optimiser of their `recipe`. They keep a model in `net`."""

    recipe: Recipe

    def on_train_epoch_start(self) -> None:
        # Chance then depends on the epoch, not on what came before: a resumed run repeats an unbroken one.
        torch.manual_seed(mix_seed(self.hparams.seed, self.current_epoch, self.global_rank))

    def configure_optimizers(self) -> dict:
        recipe = self.recipe
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = SGD(parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
        schedules = [MultiStepLR(optimizer, recipe.milestones, recipe.gamma)]
        if recipe.warmup_epochs:
            start = 1 / (recipe.warmup_epochs + 1)
            schedules.append(LinearLR(optimizer, start_factor=start, total_iters=recipe.warmup_epochs))
        return {"optimizer": optimizer, "lr_scheduler": ChainedScheduler(schedules, optimizer)}


class Classifier(Module):
    """A model of `dla.create_model` with its training and evaluation.

    All arguments are plain values and travel in every checkpoint, so that `load_classifier` needs the file alone.

    Args:
        model: one of `dla.list_models()`.
        recipe: a Recipe, or its fields as a dict.
        model_args: arguments of `dla.create_model`; `config` as `named_config` takes it.
        data: the image sets it is for, as `dla.data.open_sets` reads them.
        seed: of the weights, and of drop path.

    Raises:
        ValueError: an unknown model, an unknown or unfit argument.
    """

    def __init__(
        self, model: str, recipe: Recipe | dict, model_args: dict[str, Any] | None = None, data: str = "", seed: int = 0
    ):
        super().__init__()
        recipe = recipe if isinstance(recipe, Recipe) else Recipe(**recipe)
        model_args = dict(model_args or {})
        plain = {"model": model, "recipe": recipe.as_dict(), "model_args": dict(model_args), "data": data, "seed": seed}
        self.save_hyperparameters(plain)
        self.recipe = recipe
        if "config" in model_args:
            model_args["config"] = named_config(model_args["config"])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.net = dla.create_model(model, drop_path_rate=recipe.drop_path_rate, **model_args)
        num_classes = model_args.get("num_classes", 10)
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.train_accuracy(logits, labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.val_top5(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)
        self.log("val_top5", self.val_top5)


M = TypeVar("M", bound=Module)


def named_config(config: str | dict[str, Any]) -> dla.Config:
    """The reading by its name in `dla.CONFIGS`, or by its fields. Raises ValueError for an unknown name."""
    if isinstance(config, dict):
        return dla.Config(**config)
    if config not in dla.CONFIGS:
        raise ValueError(f"`config` must be one of {', '.join(dla.CONFIGS)}, got {config!r}")
    return dla.CONFIGS[config]


def load_classifier(checkpoint: str | Path, epochs: int | None = None) -> Classifier:
    """Rebuilds the classifier of a checkpoint, weights included; `epochs`, if given, replaces its recipe's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or was not written by a trainer of a Classifier.
    """
    return load_module(Classifier, "dla train", checkpoint, epochs)


def load_module(kind: type[M], command: str, checkpoint: str | Path, epochs: int | None = None) -> M:
    """`load_classifier` for any Module whose arguments are its hyperparameters; `command` is what writes it."""
    state = load_checkpoint(checkpoint)
    arguments = state.get("hyper_parameters")
    if not isinstance(arguments, dict) or arguments.keys() != signature(kind).parameters.keys():
        raise ValueError(f"{checkpoint} is no checkpoint of `{command}`: it does not name its model")
    if epochs is not None:
        arguments["recipe"]["epochs"] = epochs
    module = kind(**arguments)
    try:
        module.load_state_dict(state["state_dict"])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{checkpoint} holds weights that do not fit its model {arguments['model']}") from error
    return module


def writable_folder(out: str | Path) -> Path:
    """Creates the folder `out` where it is missing. Raises ValueError if files cannot be written into it."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"`out` must be a folder that can be written, got {out} ({error.strerror})") from error
    return Path(out)


def quiet_lightning() -> None:
    """Silences Lightning's hints on every start; its warnings about a run stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for hint in ("does not have many workers", "exists and is not empty", "treespec, LeafSpec", "in eval mode at the"):
        warnings.filterwarnings("ignore", f".*{hint}.*")


def make_trainer(
    epochs: int,
    out: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    monitor: str = "val_accuracy",
    **options: Any,
) -> Trainer:
    """A Lightning trainer for `epochs` epochs.

    Args:
        epochs: how many, counted from the run's beginning also when it resumes.
        out: folder that gets `last.ckpt` after every epoch, `best.ckpt` (highest `monitor`) and
            `version_N/metrics.csv`; None writes nothing.
        callbacks: more callbacks.
        progress: whether to show a progress bar.
        monitor: the logged measure by which an epoch is the best.
        options: of `lightning.pytorch.Trainer`, e.g. `accelerator`, `devices`, `precision`.

    Raises:
        ValueError: `out` cannot be written, or Lightning refuses an option.
    """
    callbacks = list(callbacks)
    if progress:
        callbacks.append(RichProgressBar())
    if out is not None:
        out = writable_folder(out)
        # Saved at the end of the training epoch, after validation: a resume then begins with the next epoch.
        checkpoint = {"dirpath": out, "enable_version_counter": False, "save_on_train_epoch_end": True}
        callbacks += [
            LearningRateMonitor(),
            ModelCheckpoint(filename="best", monitor=monitor, mode="max", **checkpoint),
            ModelCheckpoint(filename="last", **checkpoint),
        ]
    try:
        return Trainer(
            max_epochs=epochs,
            callbacks=callbacks,
            logger=CSVLogger(out, name="") if out is not None else False,
            log_every_n_steps=1,
            enable_checkpointing=out is not None,
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **options,
        )
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters of `model`."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
