"""What does a layer interaction cost a whole network? A training step and inference, beside the plain network.

A network is one of ours, such as ``resnet20_dla_l``, or one of others and what is done to it: SOURCE+INTERACTION
inserts an interaction, SOURCE+fuse fuses what there is, and the plain network is then the source itself. SOURCE is a
model of timm, such as ``resnet50d``, or ``module:function``, which is called to build one of at least ten classes, such
as ``torchvision.models:resnet50``; ``@32`` behind it asks for images of that size.
"""

import copy
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

import dla
from dla.benchmarks import networks
from dla.benchmarks.measure import Prepared, Row, Wrong
from dla.probe import relative_difference

INTERACTIONS = ("mrla_l", "dla_l", "mrla_b", "dla_b")
#: Depths, batch and image size of the networks for CIFAR and for ImageNet, by device.
SIZES = {
    "cpu": (((20, 56, 110), 32, 32), ((50, 101), 4, 224)),
    "cuda": (((20, 56, 110), 128, 32), ((50, 101), 256, 224)),
}
#: A short run's. It measures the eager forms of those of depth 20 alone, the literal DLA-B-110 takes seconds a step.
SHORT = (
    *(f"resnet20_{interaction}" for interaction in INTERACTIONS),
    "resnet110_dla_l",
    "resnet110_dla_b",
    "resnet50_dla_l",
)
#: What the time over the plain network's is to be at most; what is judged is measured in two processes.
GOALS = {
    "cpu": {
        "resnet20_dla_l": {"train step": 1.35, "inference": 1.30},
        "resnet110_dla_l": {"train step": 1.40, "inference": 1.30},
        "resnet20_dla_b": {"train step": 1.35, "inference": 1.45},
        "resnet110_dla_b": {"train step": 1.60, "inference": 1.70},
        "resnet50_dla_l": {"train step": 1.15, "inference": 1.12},
    },
    "cuda": {"resnet50_dla_l": {"train step": 1.15}},
}
MODELS = {
    device: {
        f"resnet{depth}_{interaction}": (batch, size)
        for depths, batch, size in sizes
        for depth in depths
        for interaction in INTERACTIONS
    }
    for device, sizes in SIZES.items()
}


#: The largest relative difference in float32 of a fused network's output from that of its source.
SAME = 1e-3


def build(name: str) -> tuple[nn.Module, nn.Module]:
    """The network and the plain one."""
    if "+" not in name:
        return tuple(dla.create_model(n, num_classes=10) for n in (name, name.split("_")[0]))
    source, action = name.split("+")
    try:
        plain = _builder(source.partition("@")[0])()
        if action == "fuse":
            return _fused(plain, batch_and_size(name, torch.device("cpu"))[1]), plain
        return dla.insert(plain, action), plain
    except ValueError as error:
        raise Wrong(str(error)) from error


def _builder(source: str) -> Callable[[], nn.Module]:
    """Raises ValueError where there is no such model or function."""
    module, colon, function = source.partition(":")
    if colon:
        if str(Path.cwd()) not in sys.path:  # to programs such as `dla` Python does not add it
            sys.path.append(str(Path.cwd()))
        try:
            return getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"`model` {source}: {error}") from error
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"`model` {source} needs timm: pip install timm") from error
    if not timm.is_model(source):
        raise ValueError(f"`model` {source}: timm has no {source!r}; it has {', '.join(timm.list_models('*resne*'))}")
    return functools.partial(timm.create_model, source, num_classes=10)


def _fused(plain: nn.Module, size: int) -> nn.Module:
    """Raises :class:`Wrong` where the source cannot run here, or does not compute what its fused form computes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fused = dla.fuse(copy.deepcopy(plain).to(device), inplace=True)
    x = torch.randn(2, 3, size, size, device=device)
    try:
        expected = copy.deepcopy(plain).to(device).train()(x)
    except (AssertionError, RuntimeError) as error:
        raise Wrong(f"as it is it fails on {device}: {error}") from error
    difference = relative_difference(copy.deepcopy(fused).train()(x), expected)
    if not difference <= SAME:
        raise Wrong(f"its output differs from that of its source by {difference:.1e}")
    return fused.to("cpu")


def prepare(name, batch, size, task, eager, compiled, device) -> Prepared:
    torch.manual_seed(0)
    network, plain = (n.to(device) for n in build(name))
    models = {"fused": network, "plain": plain}
    has_literal = "+" not in name  # a literal form looks into the blocks
    small = torch.randn(2, 3, min(size, 64), min(size, 64), device=device)
    networks.check(network, small, task, ("literal",) if has_literal else ())
    x, y = torch.randn(batch, 3, size, size, device=device), torch.randint(10, (batch,), device=device)
    if eager:
        models["reference"] = networks.On(network, "reference")
        if has_literal:
            models["literal"] = networks.literal_form(network)
    if device.type == "cuda":
        x = x.contiguous(memory_format=torch.channels_last)
        models = {n: m.to(memory_format=torch.channels_last) for n, m in models.items()}
    if compiled:
        torch._dynamo.reset()
        models |= {f"compiled {n}": torch.compile(m) for n, m in models.items()}
    most = goal(name, task, device)
    return Prepared(
        {n: autocast(networks.TASKS[task](m, x, y), device) for n, m in models.items()},
        {} if most is None else {"goal": most},
    )


def goal(name: str, task: str, device: torch.device) -> float | None:
    return GOALS[device.type].get(name, {}).get(task)


def autocast(function, device: torch.device):
    """On a GPU a network trains in bfloat16."""
    return torch.autocast("cuda", torch.bfloat16)(function) if device.type == "cuda" else function


def batch_and_size(name: str, device: torch.device) -> tuple[int, int]:
    """Raises ValueError where there is no such network."""
    known = MODELS[device.type]
    source, plus, action = name.partition("+")
    if not plus:
        if name not in known:
            raise ValueError(
                f"`model` must be one of {', '.join(known)}, or one of others and what is done to it, such as "
                f"resnet50d+dla_l, torchvision.models:resnet50+dla_l or module:function+fuse, got {name!r}"
            )
        return known[name]
    source, at, size = source.partition("@")
    if at and not (size.isdecimal() and int(size)):
        raise ValueError(f"`model` {name}: the size of the images, behind @, must be a number, got {size!r}")
    if action not in (*dla.stage.INTERACTIONS, "fuse"):
        raise ValueError(f"`model` {name}: behind + must be one of {', '.join(dla.stage.INTERACTIONS)} or fuse")
    _builder(source)
    small, (_, batch, large) = SIZES[device.type]
    return (small[1], int(size)) if at and int(size) <= 2 * small[2] else (batch, int(size or large))


def rows(device: torch.device, full: bool = False, models: Sequence[str] = ()) -> Iterator[Row]:
    """Networks by name, which are then measured in their eager forms too; by default those of a short run, or all.

    Raises:
        ValueError: an unknown network.
    """
    for name in models or (MODELS[device.type] if full else SHORT):
        batch, size = batch_and_size(name, device)
        for task in networks.TASKS:
            labels = {"model": name, "batch": batch, "image": size, "": task}
            eager = full or bool(models) or name.startswith("resnet20_")
            row = functools.partial(prepare, name, batch, size, task, eager, full)
            yield Row("models", labels, "plain", row, processes=1 if goal(name, task, device) is None else 2)
