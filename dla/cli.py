"""The console script `dla`: info, train, train-detection, evaluate, plot, bench.

Lightning and what goes with it take seconds to import, so each command imports what it needs.
"""

import platform
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

app = typer.Typer(help="Dynamic Layer Attention: train and look into models.", no_args_is_help=True)

DATA_HELP = "digits[:SIZE], cifar10[:FOLDER], cifar100[:FOLDER] or imagenet:FOLDER."
OF_RECIPE, OF_MACHINE = "Recipe (default: the preset's)", "Machine"

# Options of several commands.
Resume = Annotated[Path | None, typer.Option(help="Checkpoint to go on from; it carries model and recipe.")]
Cell = Annotated[str | None, typer.Option(help="dsu, dia, lstm or rnn.")]
Config = Annotated[str | None, typer.Option(help="Reading of DLA: paper, official or released.")]
Reduction = Annotated[int | None, typer.Option(help="Reduction r of the cell.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Default: 0.", show_default=False)]
Epochs = Annotated[int | None, typer.Option(help="May be raised on a resume.", rich_help_panel=OF_RECIPE)]
BatchSize = Annotated[int | None, typer.Option(help="Images in a step, over all devices.", rich_help_panel=OF_RECIPE)]
RecipeFloat = Annotated[float | None, typer.Option(rich_help_panel=OF_RECIPE)]
RecipeInt = Annotated[int | None, typer.Option(rich_help_panel=OF_RECIPE)]
Milestones = Annotated[
    str | None, typer.Option(help="Epochs at which the rate falls, separated by commas.", rich_help_panel=OF_RECIPE)
]
Gamma = Annotated[float | None, typer.Option(help="Factor of the rate at each.", rich_help_panel=OF_RECIPE)]
Accelerator = Annotated[str, typer.Option(help="auto, cpu, gpu, ...", rich_help_panel=OF_MACHINE)]
Devices = Annotated[
    str, typer.Option(help="auto, a number, or indices such as 0,1; DDP if several.", rich_help_panel=OF_MACHINE)
]
NumNodes = Annotated[int, typer.Option(min=1, rich_help_panel=OF_MACHINE)]
TrainBatches = Annotated[int | None, typer.Option(min=1, help="Batches of an epoch.")]
ValBatches = Annotated[int | None, typer.Option(min=1, help="Batches of a validation.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch CIFAR if it is not there.")]
ShowProgress = Annotated[bool, typer.Option(help="Show a progress bar.")]


@contextmanager
def bad_input() -> Iterator[None]:
    """Reports what the library finds wrong with the user's input in one line, and exits with code 2.

    Only the checks before the work run under it: an error in the work itself keeps its traceback.
    """
    try:
        yield
    except (ImportError, ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"dla: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error


@app.command()
def info() -> None:
    """Versions, the backends of the kernels, and the devices."""
    import torch

    import dla_kernels

    table = Table(show_header=False, box=None)
    table.add_row("dla-kernels", dla_kernels.__version__)
    table.add_row("torch", torch.__version__)
    table.add_row("python", platform.python_version())
    for name, available in dla_kernels.backends().items():
        table.add_row(f"backend {name}", "available" if available is True else f"not available: {available}")
    table.add_row("CPU", f"{torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        table.add_row(f"cuda:{index}", torch.cuda.get_device_name(index))
    if not torch.cuda.is_available():
        table.add_row("CUDA", "no device")
    Console().print(table)


@app.command()
def train(
    model: Annotated[str | None, typer.Option(help="Such as resnet20_dla_l; an unknown name lists all.")] = None,
    data: Annotated[str | None, typer.Option(help=f"{DATA_HELP} Default: digits.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of logs and checkpoints. Default: runs/MODEL-DATA.")] = None,
    resume: Resume = None,
    cell: Cell = None,
    config: Config = None,
    reduction: Reduction = None,
    seed: Seed = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Preset: cifar, imagenet or digits. Default: the data's.", rich_help_panel=OF_RECIPE),
    ] = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: RecipeFloat = None,
    momentum: RecipeFloat = None,
    weight_decay: RecipeFloat = None,
    milestones: Milestones = None,
    gamma: Gamma = None,
    warmup_epochs: RecipeInt = None,
    drop_path_rate: RecipeFloat = None,
    download: Download = False,
    accelerator: Accelerator = "auto",
    devices: Devices = "auto",
    num_nodes: NumNodes = 1,
    precision: Annotated[str, typer.Option(help="32, bf16-mixed, 16-mixed or 64.", rich_help_panel=OF_MACHINE)] = "32",
    sync_batchnorm: Annotated[
        bool, typer.Option("--sync-batchnorm", help="BatchNorm over all devices.", rich_help_panel=OF_MACHINE)
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Deterministic kernels only.", rich_help_panel=OF_MACHINE)
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Loader processes per device. Default: 4, digits 0.", rich_help_panel=OF_MACHINE)
    ] = None,
    limit_train_batches: TrainBatches = None,
    limit_val_batches: ValBatches = None,
    progress: ShowProgress = True,
) -> None:
    """Train a model. OUT gets last.ckpt after every epoch, best.ckpt, and version_N/metrics.csv."""
    from dla import keep_memory, training
    from dla.data import ImageData, open_sets

    training.quiet_lightning()
    with bad_input():
        fields = {
            "batch_size": batch_size,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "milestones": _epochs(milestones),
            "gamma": gamma,
            "warmup_epochs": warmup_epochs,
            "drop_path_rate": drop_path_rate,
        }
        if resume is not None:
            fixed = {"model": model, "cell": cell, "config": config, "reduction": reduction, "seed": seed}
            _refuse_with_resume(fixed | {"recipe": recipe} | fields)
            classifier = training.load_classifier(resume, epochs)
            classifier.hparams.data = data = data or classifier.hparams.data
            sets = open_sets(data, download)
            _check_fit(classifier, sets)
            out = out or resume.parent
        else:
            data = data or "digits"
            if model is None:
                raise ValueError("--model is required, such as resnet20_dla_l; or --resume with a checkpoint")
            sets = open_sets(data, download)
            chosen = replace(training.recipe_for(data, recipe), **_given(fields | {"epochs": epochs}))
            model_args = _given({"cell": cell, "config": config, "reduction": reduction})
            model_args |= {"num_classes": sets.num_classes, "in_chans": sets.in_chans}
            classifier = training.Classifier(model, chosen, model_args, data, seed or 0)
            out = out or Path("runs") / f"{model}-{data.partition(':')[0]}"
            _refuse_old_run(out)
        trainer = training.make_trainer(
            classifier.recipe.epochs,
            out,
            progress=progress,
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,
            sync_batchnorm=sync_batchnorm,
            deterministic=deterministic,
            **_given({"limit_train_batches": limit_train_batches, "limit_val_batches": limit_val_batches}),
        )
        batch_size, seed = classifier.recipe.batch_size, classifier.hparams.seed
        images = ImageData(sets, batch_size, trainer.world_size, _workers(workers, data), seed)
    keep_memory()
    trainer.fit(classifier, images, ckpt_path=resume, weights_only=True)
    if trainer.is_global_zero:
        _report(trainer.callback_metrics)
        typer.echo(f"written to {out}: last.ckpt, best.ckpt, {Path(trainer.logger.log_dir).name}/metrics.csv")


@app.command()
def train_detection(
    model: Annotated[
        str | None,
        typer.Option(help="Such as fasterrcnn_resnet50_dla_l_fpn, maskrcnn_...; an unknown name lists all."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of annotations/instances_{train,val}2017.json, train2017/ and val2017/."),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Classifier to start from: checkpoint of `dla train`, or save_pretrained's folder."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of logs and checkpoints. Default: runs/MODEL.")] = None,
    resume: Resume = None,
    cell: Cell = None,
    config: Config = None,
    reduction: Reduction = None,
    trainable_layers: Annotated[
        int | None, typer.Option(help="Trained layers of the backbone. Default: all but two, without --weights all.")
    ] = None,
    fpn_channels: Annotated[int | None, typer.Option(help="Channels of the pyramid. Default: 256.")] = None,
    seed: Seed = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: RecipeFloat = None,
    momentum: RecipeFloat = None,
    weight_decay: RecipeFloat = None,
    milestones: Milestones = None,
    gamma: Gamma = None,
    warmup_steps: RecipeInt = None,
    drop_path_rate: RecipeFloat = None,
    short_side: Annotated[
        int | None, typer.Option(help="Pixels that images are scaled to.", rich_help_panel=OF_RECIPE)
    ] = None,
    accelerator: Accelerator = "auto",
    devices: Devices = "auto",
    num_nodes: NumNodes = 1,
    precision: Annotated[str, typer.Option(help="32, bf16-mixed or 16-mixed.", rich_help_panel=OF_MACHINE)] = "32",
    workers: Annotated[int, typer.Option(help="Loader processes per device.", rich_help_panel=OF_MACHINE)] = 4,
    limit_train_batches: TrainBatches = None,
    limit_val_batches: ValBatches = None,
    progress: ShowProgress = True,
) -> None:
    """Train a detector on COCO or data laid out like it, by default as the paper does. OUT is as of `train`."""
    with bad_input():
        from dla import keep_memory, training
        from dla.detection.data import CocoData, open_coco
        from dla.detection.training import COCO, Detector, load_detector

        training.quiet_lightning()
        fields = {
            "batch_size": batch_size,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "milestones": _epochs(milestones),
            "gamma": gamma,
            "warmup_steps": warmup_steps,
            "drop_path_rate": drop_path_rate,
            "short_side": short_side,
        }
        model_args = {
            "weights": weights,
            "cell": cell,
            "config": config,
            "reduction": reduction,
            "trainable_layers": trainable_layers,
            "fpn_channels": fpn_channels,
        }
        if resume is not None:
            _refuse_with_resume({"model": model, "seed": seed} | model_args | fields)
            detector = load_detector(resume, epochs)
            data = data or Path(detector.hparams.data)
            detector.hparams.data = str(data)
            out = out or resume.parent
        elif model is None or data is None:
            raise ValueError("--model and --data are required, or --resume with a checkpoint")
        else:
            recipe = replace(COCO, **_given(fields | {"epochs": epochs}))
            out = out or Path("runs") / model
            _refuse_old_run(out)
        sets = open_coco(data, (model or detector.hparams.model).startswith("maskrcnn"))
        if resume is None:
            detector = Detector(model, recipe, sets.train.categories, _given(model_args), str(data), seed or 0)
        elif sets.train.categories != detector.hparams.categories:
            known, given = (", ".join(names) for names in (detector.hparams.categories, sets.train.categories))
            raise ValueError(f"the model knows {known}, the data {given}")
        trainer = training.make_trainer(
            detector.recipe.epochs,
            out,
            progress=progress,
            monitor="val_ap",
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,
            **_given({"limit_train_batches": limit_train_batches, "limit_val_batches": limit_val_batches}),
        )
        images = CocoData(sets, detector.recipe.batch_size, trainer.world_size, workers, detector.hparams.seed)
    keep_memory()
    trainer.fit(detector, images, ckpt_path=resume, weights_only=True)
    if trainer.is_global_zero:
        _report(trainer.callback_metrics, [f"{name}{end}" for name in detector.scores.values() for end in ("", "50")])
        typer.echo(f"written to {out}: last.ckpt, best.ckpt, {Path(trainer.logger.log_dir).name}/metrics.csv")


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of `dla train`.")],
    data: Annotated[str | None, typer.Option(help=f"{DATA_HELP} Default: those of the training.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    workers: Annotated[int | None, typer.Option(help="Loader processes. Default: 4, digits 0.")] = None,
    accelerator: Annotated[str, typer.Option(help="auto, cpu, gpu, ...")] = "auto",
    precision: Annotated[str, typer.Option(help="32, bf16-mixed, 16-mixed or 64.")] = "32",
    limit_val_batches: Annotated[int | None, typer.Option(min=1, help="Batches to evaluate.")] = None,
    download: Download = False,
    progress: ShowProgress = True,
) -> None:
    """Accuracy of a checkpoint on the held-out images, each counted once (one device)."""
    from dla import training
    from dla.data import ImageData, open_sets

    training.quiet_lightning()
    with bad_input():
        classifier = training.load_classifier(checkpoint)
        data = data or classifier.hparams.data
        sets = open_sets(data, download)
        _check_fit(classifier, sets)
        trainer = training.make_trainer(
            1,
            progress=progress,
            accelerator=accelerator,
            devices=1,
            precision=precision,
            **_given({"limit_val_batches": limit_val_batches}),
        )
        images = ImageData(sets, min(batch_size, len(sets.train)), workers=_workers(workers, data))
    (metrics,) = trainer.validate(classifier, images, verbose=False)
    typer.echo(f"{classifier.hparams.model} on {data}")
    _report(metrics)


@app.command()
def plot(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of a model *_mrla_b or *_dla_b.")],
    out: Annotated[Path, typer.Option(help="File to write; its ending is the format.")] = Path("layer_attention.png"),
    data: Annotated[str | None, typer.Option(help=f"{DATA_HELP} Default: those of the training.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Held-out images to average over, at most.")] = 256,
    download: Download = False,
) -> None:
    """Draw a model's attention over the layers of each stage, averaged over images and heads."""
    import torch
    from torch.utils.data import DataLoader, Subset

    from dla import plots, training
    from dla.data import open_sets

    with bad_input():
        classifier = training.load_classifier(checkpoint)
        sets = open_sets(data or classifier.hparams.data, download)
        _check_fit(classifier, sets)
        training.writable_folder(out.parent)
        # Spread over the set: folders of images come class by class.
        indices = torch.linspace(0, len(sets.test) - 1, min(images, len(sets.test))).long().tolist()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        batches = (x.to(device) for x, _ in DataLoader(Subset(sets.test, indices), batch_size=32))
        maps = plots.mean_layer_attention(classifier.net.to(device), batches)
        figure = plots.layer_attention_heatmaps({classifier.hparams.model: maps})
        figure.savefig(out, dpi=300)
    typer.echo(f"written to {out}")


@app.command()
def bench(
    questions: Annotated[
        list[str] | None, typer.Argument(help="Some of ops, blocks, models, depth, launches, floors. Default: all.")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only these ops; an unknown one lists all.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Only these models; an unknown one lists all.")] = None,
    only: Annotated[str, typer.Option(help="Only rows in whose name this stands, such as 256x256x56x56.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    full: Annotated[bool, typer.Option("--full", help="Every size, dtype, layout and model; hours on a CPU.")] = False,
    out: Annotated[Path, typer.Option(help="A folder named after the device is made in it.")] = Path("bench"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that OUT holds.")] = False,
    keep_memory: Annotated[
        bool, typer.Option(help="Keep freed memory of the CPU in the process, as `dla train` does.")
    ] = True,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Show what changed between two runs; exit status 1 past the threshold.", show_default=False),
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, help="Change that counts, with --compare.")] = 0.1,
) -> None:
    """Measure the kernels, blocks and models on this machine: tables, pictures and bench.json in OUT/DEVICE."""
    with bad_input():
        from dla.benchmarks import report, run
        from dla.memory import keep_memory as keep
        from dla.training import writable_folder

        if compare is not None:
            raise typer.Exit(_compare(*compare, threshold))
        where = run.find_device(device)
        rows = run.rows_of(questions or [], where, full, op or [], model or [], only)
        folder = writable_folder(out / run.slug(where))
        chosen = [
            *(questions or []),
            *(w for o in op or [] for w in ("--op", o)),
            *(w for m in model or [] for w in ("--model", m)),
            *(["--only", only] if only else []),
            *(["--device", device] if device != "auto" else []),
            *(["--full"] if full else []),
            *(["--no-keep-memory"] if not keep_memory else []),
        ]
        kept = keep_memory and keep()
        session = run.Run(folder / "bench.json", where, resume, shlex.join(["dla", "bench", *chosen]), kept)
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("limits of this machine", total=len(rows) + 1)
            session.measure(
                rows,
                run.FULL_BUDGET_S if full else run.BUDGET_S,
                lambda done, name: progress.update(task, completed=1 + done, description=name),
            )
    except KeyboardInterrupt:
        measured = f"{session.path} keeps what was measured, --resume goes on"
        typer.echo(f"stopped; {measured if session.results['rows'] else 'nothing was measured yet'}", err=True)
        raise typer.Exit(130) from None
    console.print(report.limits_line(session.results), highlight=False)
    console.print(*report.tables(session.results))
    for note in report.notes(session.results):
        console.print(note, markup=False, highlight=False)
    paths = report.write(session.results, folder)
    typer.echo(f"written to {folder}: {', '.join(path.name for path in (session.path, *paths))}")
    if session.previous.exists():
        typer.echo(
            f"what changed: {shlex.join(['dla', 'bench', '--compare', *map(str, (session.previous, session.path))])}"
        )
    if any("error" in row for row in session.results["rows"]):
        raise typer.Exit(1)


def _compare(before: Path, after: Path, threshold: float) -> int:
    from dla.benchmarks import report, run

    runs = [run.load(path) for path in (before, after)]
    changes, common = report.compare(*runs, threshold)
    console = Console(soft_wrap=True)
    for name, results in zip(("before", "after"), runs, strict=True):
        console.print(f"{name}: {report.limits_line(results)}", markup=False, highlight=False)
    if changes:
        table = Table("", "", "before", "after", "change", "copies", title=f"What changed by more than {threshold:.0%}")
        for change in sorted(changes, key=lambda c: (bool(c.copies), not c.worse)):
            table.add_row(*change[:-1], style="red" if change.worse else "dim" if change.copies else "green")
        Console().print(table)
    typer.echo(f"{common - len({c.name for c in changes})} of {common} rows within {threshold:.0%}")
    if elsewhere := len({c.name for c in changes if c.copies}):
        typer.echo(
            f"{elsewhere} of the others met another machine: copies of memory, measured beside each row, took so much "
            f"more or less time"
        )
    for name, one, other in zip(("before", "after"), runs, reversed(runs), strict=True):
        if alone := len({r["name"] for r in one["rows"]} - {r["name"] for r in other["rows"]}):
            typer.echo(f"{alone} rows {name} only")
    return int(any(change.worse for change in changes))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _workers(given: int | None, data: str) -> int:
    """The digits lie in memory; images in files are worth some processes."""
    return given if given is not None else 0 if data.startswith("digits") else 4


def _epochs(text: str | None) -> tuple[int, ...] | None:
    """`100,150` -> (100, 150)."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"--milestones {text}: expected epochs such as 100,150") from error


def _refuse_with_resume(options: dict[str, Any]) -> None:
    if given := ", ".join("--" + name.replace("_", "-") for name in _given(options)):
        raise ValueError(f"{given}: not with --resume, the checkpoint carries it; only --epochs may change")


def _refuse_old_run(out: Path) -> None:
    if (out / "last.ckpt").exists():
        raise ValueError(f"--out {out} holds a run already: --resume {out / 'last.ckpt'}, or another --out")


def _check_fit(classifier, sets) -> None:
    args = classifier.hparams.model_args
    for name in ("num_classes", "in_chans"):
        if args[name] != getattr(sets, name):
            raise ValueError(f"the model has {name} {args[name]}, the data {getattr(sets, name)}")


def _report(metrics: dict[str, Any], names: Sequence[str] = ("val_accuracy", "val_top5", "val_loss")) -> None:
    for name in names:
        typer.echo(f"  {name.removeprefix('val_'):<9} {float(metrics[name]):.4f}")


if __name__ == "__main__":
    app()
