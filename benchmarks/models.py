"""What does a layer interaction cost a whole network? A training step and inference, beside the plain network."""

import functools
from collections.abc import Iterator, Sequence

import torch

import dla
from dla.benchmarks import networks
from dla.benchmarks.measure import Prepared, Row

INTERACTIONS = ("mrla_l", "dla_l", "mrla_b", "dla_b")
#: Depths, batch and image size, by device.
SIZES = {
    "cpu": (((20, 56, 110), 32, 32), ((50, 101), 4, 224)),
    "cuda": (((20, 56, 110), 128, 32), ((50, 101), 256, 224)),
}
SHORT = ("resnet20_mrla_l", "resnet20_dla_l", "resnet20_dla_b", "resnet110_dla_l", "resnet110_dla_b", "resnet50_dla_l")
MODELS = {
    device: {
        f"resnet{depth}_{interaction}": (batch, size)
        for depths, batch, size in sizes
        for depth in depths
        for interaction in INTERACTIONS
    }
    for device, sizes in SIZES.items()
}


def prepare(name, batch, size, task, full, device) -> Prepared:
    torch.manual_seed(0)
    models = {
        "fused": dla.create_model(name, num_classes=10),
        "plain": dla.create_model(name.split("_")[0], num_classes=10),
    }
    networks.check(models["fused"], torch.randn(2, 3, min(size, 64), min(size, 64)))
    x, y = torch.randn(batch, 3, size, size, device=device), torch.randint(10, (batch,), device=device)
    if full:
        models["literal"] = networks.literal_form(models["fused"])
        models["reference"] = networks.On(models["fused"], "reference")
    if device.type == "cuda":
        x = x.contiguous(memory_format=torch.channels_last)
        models = {n: m.to(device, memory_format=torch.channels_last) for n, m in models.items()}
    if full:
        torch._dynamo.reset()
        models |= {f"compiled {n}": torch.compile(models[n]) for n in ("plain", "reference")}
    return Prepared({n: autocast(networks.TASKS[task](m, x, y), device) for n, m in models.items()})


def autocast(function, device: torch.device):
    """On a GPU a network trains in bfloat16."""
    return torch.autocast("cuda", torch.bfloat16)(function) if device.type == "cuda" else function


def rows(device: torch.device, full: bool = False, models: Sequence[str] = ()) -> Iterator[Row]:
    """Models by name, of all of them or of a short run's by default.

    Raises:
        ValueError: an unknown model.
    """
    known = MODELS[device.type]
    for name in models:
        if name not in known:
            raise ValueError(f"`model` must be one of {', '.join(known)}, got {name!r}")
    for name in models or (known if full else SHORT):
        batch, size = known[name]
        for task in networks.TASKS:
            labels = {"model": name, "batch": batch, "image": size, "": task}
            yield Row("models", labels, "plain", functools.partial(prepare, name, batch, size, task, full))
