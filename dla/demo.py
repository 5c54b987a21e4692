"""The demo, `dla-demo --out demo`: DLA learns handwritten digits beside its rivals, in minutes on a CPU.

It trains ResNet-20 plain, with MRLA-L and with DLA-L, for the table and the curves, then ResNet-56 with MRLA-B and
DLA-B, whose stages of six blocks show the attention over layers: MRLA's layers stay as they were, DLA's are refreshed.
"""

import csv
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from dla import plots
from dla.data import ImageData, ImageSets, open_sets
from dla.training import DIGITS, Classifier, Recipe, count_parameters, make_trainer, quiet_lightning, writable_folder

RIVALS = {"ResNet-20": "resnet20", "MRLA-L-20": "resnet20_mrla_l", "DLA-L-20": "resnet20_dla_l"}
ATTENTIVE = {"MRLA-B-56 (static)": "resnet56_mrla_b", "DLA-B-56 (dynamic)": "resnet56_dla_b"}
COLUMNS = ("model", "test accuracy", "parameters", "ms per step")

# Eighteen blocks under layer attention start to learn within few epochs only with small steps.
ATTENTIVE_RECIPE = replace(
    DIGITS, epochs=5, batch_size=32, milestones=(4,), lr=0.005, warmup_epochs=0, drop_path_rate=0.0
)


class Recorder(Callback):
    """Keeps the held-out accuracy after each epoch and the seconds of each training step, and moves a progress bar."""

    def __init__(self, progress: Progress, name: str):
        self.accuracies: list[float] = []
        self.step_seconds: list[float] = []
        self.progress, self.task = progress, progress.add_task(name, accuracy="")

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.progress.update(self.task, total=trainer.estimated_stepping_batches)

    def on_train_batch_start(self, *_) -> None:
        self.started = _now()

    def on_train_batch_end(self, *_) -> None:
        self.step_seconds.append(_now() - self.started)
        self.progress.advance(self.task)

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.accuracies.append(trainer.callback_metrics["val_accuracy"].item())
        self.progress.update(self.task, accuracy=f"test {self.accuracies[-1]:.1%}")


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _fit(model: str, recipe: Recipe, sets: ImageSets, data: str, seed: int, recorder: Recorder) -> Trainer:
    trainer = make_trainer(recipe.epochs, callbacks=[recorder], progress=False, devices=1, deterministic="warn")
    args = {"num_classes": sets.num_classes, "in_chans": sets.in_chans}
    trainer.fit(Classifier(model, recipe, args, data, seed), ImageData(sets, recipe.batch_size, seed=seed))
    return trainer


def _write_table(rows: Sequence[Sequence[str]], note: str, out: Path) -> None:
    with (out / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    rule = ("---", *["---:"] * (len(COLUMNS) - 1))
    lines = [f"| {' | '.join(row)} |" for row in (COLUMNS, rule, *rows)]
    (out / "results.md").write_text("\n".join(lines) + f"\n\n{note}\n")


def main(
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each model of the table.")] = DIGITS.epochs,
    attention_epochs: Annotated[
        int, typer.Option(min=1, help="Epochs of the two models of the heat maps.")
    ] = ATTENTIVE_RECIPE.epochs,
    image_size: Annotated[int, typer.Option(min=8, help="Pixels that the 8 x 8 scans are upsampled to.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and augmentation.")] = 0,
) -> None:
    """Train DLA and its rivals on handwritten digits; write a table, two figures and a checkpoint."""
    console = Console()
    try:
        writable_folder(out)
    except ValueError as error:
        Console(stderr=True, soft_wrap=True).print(f"dla.demo: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error
    quiet_lightning()
    data = f"digits:{image_size}"
    sets = open_sets(data)
    curves, rows, maps = {}, [], {}
    columns = [TextColumn("{task.description:<18}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("{task.fields[accuracy]}"), console=console) as progress:
        for name, model in RIVALS.items():
            recorder = Recorder(progress, name)
            trainer = _fit(model, replace(DIGITS, epochs=epochs), sets, data, seed, recorder)
            curves[name] = recorder.accuracies
            rows.append(
                (
                    name,
                    f"{recorder.accuracies[-1]:.2%}",
                    f"{count_parameters(trainer.lightning_module):,}",
                    f"{1000 * median(recorder.step_seconds):.1f}",
                )
            )
            if model == "resnet20_dla_l":
                trainer.save_checkpoint(out / "resnet20_dla_l.ckpt")
        for name, model in ATTENTIVE.items():
            recipe = replace(ATTENTIVE_RECIPE, epochs=attention_epochs)
            trainer = _fit(model, recipe, sets, data, seed, Recorder(progress, name))
            batches = (images for images, _ in trainer.datamodule.val_dataloader())
            maps[name] = plots.mean_layer_attention(trainer.lightning_module.net.cpu(), batches)

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    note = (
        f"{len(sets.test)} held-out digits of {image_size} x {image_size} pixels, after {epochs} epochs, seed {seed}. "
        f"Time: median training step of {DIGITS.batch_size} images; {device}, PyTorch {torch.__version__}."
    )
    _write_table(rows, note, out)
    plots.accuracy_curves(curves, "Handwritten digits").savefig(out / "accuracy.png", dpi=300)
    plots.layer_attention_heatmaps(maps).savefig(out / "layer_attention.png", dpi=300)

    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row)
    console.print(table, note, sep="\n", highlight=False)
    for file in ("results.md", "results.csv", "accuracy.png", "layer_attention.png", "resnet20_dla_l.ckpt"):
        console.print(f"written: {out / file}", highlight=False, soft_wrap=True)


def run() -> None:
    """The console script `dla-demo`."""
    typer.run(main)


if __name__ == "__main__":
    run()
