"""Training in processes of its own: `python training_job.py kill OUT` and `python training_job.py ddp OUT`."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import Subset

from dla.data import ImageData, ImageSets, open_sets
from dla.training import DIGITS, Classifier, make_trainer

RECIPE = replace(DIGITS, epochs=2, batch_size=32, milestones=(1,), drop_path_rate=0.3)
DDP_MODELS = ("resnet20", "resnet20_dla_l", "resnet20_dla_b")


def few_digits() -> ImageSets:
    sets = open_sets("digits:8")
    return replace(sets, train=Subset(sets.train, range(100)), test=Subset(sets.test, range(50)))


def fit(out: Path, workers: int = 0, resume: Path | None = None, callbacks=()) -> Classifier:
    """Two epochs of three steps, with drop path, warm-up and augmentation; or what `resume` lacks of them."""
    classifier = Classifier("resnet20_dla_l", RECIPE, {"in_chans": 1}, "digits:8", seed=3)
    trainer = make_trainer(RECIPE.epochs, out, callbacks, progress=False, accelerator="cpu")
    images = ImageData(few_digits(), RECIPE.batch_size, workers=workers, seed=3)
    trainer.fit(classifier, images, ckpt_path=resume, weights_only=True)
    return classifier


class KillInSecondEpoch(Callback):
    """As a power cut would: no exception handler, no `finally`, no exit hook runs."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class FrozenNorms(Callback):
    """BatchNorm by fixed statistics: those of a batch would depend on how many processes share it."""

    def on_train_epoch_start(self, trainer, module):
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()


def fit_shared(model: str, devices: int) -> Classifier:
    """Two steps of whole batches of 32, in float64 and without drop path, by `devices` processes."""
    recipe = replace(RECIPE, epochs=1, lr=1e-3, drop_path_rate=0.0)
    classifier = Classifier(model, recipe, {"in_chans": 1})
    trainer = make_trainer(
        1, callbacks=[FrozenNorms()], progress=False, accelerator="cpu", devices=devices,
        precision="64-true", limit_train_batches=2, limit_val_batches=1,
    )  # fmt: skip
    trainer.fit(classifier, ImageData(few_digits(), recipe.batch_size, processes=trainer.world_size))
    return classifier


def main(job: str, out: str) -> None:
    torch.set_num_threads(1)
    if job == "kill":
        fit(Path(out), callbacks=[KillInSecondEpoch()])
    elif job == "ddp":
        weights = {model: fit_shared(model, devices=2).state_dict() for model in DDP_MODELS}
        torch.save(weights, f"{out}/rank{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
