"""What does a layer interaction cost a whole network? A training step and inference, beside the plain network.

A network is one of ours, such as ``resnet20_dla_l``, or one of timm with an interaction inserted into it, such as
``resnet50d+dla_l``.
"""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import nn

import dla
from dla.benchmarks import networks
from dla.benchmarks.measure import Prepared, Row

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
#: What the time over the plain network's is to be at most.
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


def build(name: str) -> tuple[nn.Module, nn.Module]:
    """The network and the plain one."""
    if "+" not in name:
        return tuple(dla.create_model(n, num_classes=10) for n in (name, name.split("_")[0]))
    import timm

    name, interaction = name.split("+")
    plain = timm.create_model(name, num_classes=10)
    return dla.insert(plain, interaction), plain


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
    goal = GOALS[device.type].get(name, {}).get(task)
    return Prepared(
        {n: autocast(networks.TASKS[task](m, x, y), device) for n, m in models.items()},
        {} if goal is None else {"goal": goal},
    )


def autocast(function, device: torch.device):
    """On a GPU a network trains in bfloat16."""
    return torch.autocast("cuda", torch.bfloat16)(function) if device.type == "cuda" else function


def batch_and_size(name: str, device: torch.device) -> tuple[int, int]:
    """Raises ValueError where there is no such network."""
    known = MODELS[device.type]
    base, plus, interaction = name.partition("+")
    if not plus:
        if name not in known:
            raise ValueError(
                f"`model` must be one of {', '.join(known)}, or one of timm with an interaction, such as "
                f"resnet50d+dla_l, got {name!r}"
            )
        return known[name]
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"`model` {name} needs timm: pip install timm") from error
    if not timm.is_model(base):
        raise ValueError(f"`model` {name}: timm has no {base!r}; it has {', '.join(timm.list_models('*resne*'))}")
    if interaction not in dla.stage.INTERACTIONS:
        raise ValueError(f"`model` {name}: the interaction must be one of {', '.join(dla.stage.INTERACTIONS)}")
    return SIZES[device.type][1][1:]


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
            yield Row("models", labels, "plain", row)
