"""What does a block with a layer interaction cost beside a plain one? Time of a stage of four."""

import functools
from collections.abc import Iterator

import torch

from dla.benchmarks import networks
from dla.benchmarks.measure import Prepared, Row
from dla.resnet import Bottleneck
from dla.stage import INTERACTIONS, create_stage

BLOCKS = 4
#: B, channels, image: the stages of CIFAR's and of ImageNet's ResNets, by device; those of a short run first.
SHAPES = {
    "cpu": ([(32, 64, 32)], [(32, 256, 8), (4, 256, 56)]),
    "cuda": ([(256, 256, 56)], [(128, 64, 32), (256, 1024, 14)]),
}


def build(channels: int, interaction: str | None, blocks: int = BLOCKS) -> torch.nn.Module:
    width = channels // Bottleneck.expansion
    return create_stage([Bottleneck(channels, width) for _ in range(blocks)], channels, interaction)


def prepare(batch, channels, size, interaction, task, full, device) -> Prepared:
    torch.manual_seed(0)
    stage, plain = (build(channels, name).to(device) for name in (interaction, None))
    x = torch.randn(batch, channels, size, size, device=device)
    has_literal = interaction != "lii"
    networks.check(stage, x[:2], task, ("literal",) if has_literal else ())
    forms = {"fused": stage, "plain": plain, "reference": networks.On(stage, "reference")}
    if has_literal:
        forms["literal"] = networks.literal_form(stage)
    if full:
        torch._dynamo.reset()
        forms |= {f"compiled {name}": torch.compile(form) for name, form in forms.items()}
    if device.type == "cuda":
        x = x.to(torch.bfloat16, memory_format=torch.channels_last)
        forms = {name: form.to(memory_format=torch.channels_last, dtype=torch.bfloat16) for name, form in forms.items()}
    return Prepared({name: networks.TASKS[task](form, x) for name, form in forms.items()})


def rows(device: torch.device, full: bool = False) -> Iterator[Row]:
    short, more = SHAPES[device.type]
    for batch, channels, size in short + more if full else short:
        for interaction in INTERACTIONS:
            for task in networks.TASKS:
                labels = {"stage": f"{batch}x{channels}x{size}x{size}", "interaction": interaction, "": task}
                row = functools.partial(prepare, batch, channels, size, interaction, task, full)
                yield Row("blocks", labels, "plain", row, processes=1)
