"""The code blocks of the documentation, each run as it stands."""

import itertools
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_dla import eager
from torch import nn

import dla

DOCS = Path(__file__).parents[1] / "docs"
BLOCKS = re.findall(r"^## (.*?)$|^```python\n(.*?)^```$", (DOCS / "swapping.md").read_text(), re.M | re.S)


def blocks():
    heading = ""
    for title, code in BLOCKS:
        heading = title or heading
        if code:
            yield pytest.param(code, id=heading)


class Cifar(nn.Module):
    """In the structure of the authors' network, whose code the tests do not have."""

    def __init__(self, depth, num_classes, block_name):
        super().__init__()
        n = (depth - 2) // 9
        assert block_name == "bottleneck"
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        stages = []
        for before, channels in itertools.pairwise((16, 64, 128, 256)):
            blocks = [eager.DlaLBlock(before, channels, 2 if stages else 1)]
            blocks += [eager.DlaLBlock(channels, channels) for _ in range(n - 1)]
            stages.append(eager.DlaLStage(blocks, channels))
        self.stages = nn.ModuleList(stages)
        self.fc = nn.Linear(256, num_classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("code", list(blocks()))
def test_code_block(code, tmp_path, monkeypatch):
    theirs = ModuleType("models.cifar.dla_l")
    theirs.dla_l = Cifar
    for name, module in (("models", ModuleType("models")), ("models.cifar", ModuleType("models.cifar"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, theirs.__name__, theirs)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "swapping.md", "exec"), {"__name__": "swapping"})


def test_every_way_in_is_shown():
    text = "".join(code for _, code in BLOCKS)
    for name in (
        "create_model",
        "create_stage",
        "insert",
        "remove",
        "fuse",
        "fusion_report",
        "unfuse",
        "load_released",
    ):
        assert f"dla.{name}(" in text
        assert hasattr(dla, name)
