"""``dla bench --model`` on networks of others."""

import sys

import pytest
import torch

import dla
from dla.benchmarks import measure, models

CPU = torch.device("cpu")

#: In a folder of a user's: a network in the structure of the authors' code, one like it, and one that is none.
NETS = """
from torch import nn
from test_dla import eager

def released():
    model = eager.Network("dla_l", channels=(32, 32))
    model.fc = nn.Linear(32, 10)
    return model

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
"""


def test_networks_of_others(monkeypatch, tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = [f"nets:{f}@8+{action}" for f, action in (("released", "fuse"), ("plain", "fuse"), ("plain", "dla_l"))]
    monkeypatch.setitem(models.SIZES, "cpu", ((0, 2, 32), (0, 2, 64)))
    assert models.batch_and_size("torchvision.models:resnet18+dla_l", CPU) == (2, 64)
    fused, nothing, no_stage = (row for row in models.rows(CPU, models=names) if row.labels[""] == "train step")
    rivals = fused.prepare(CPU).rivals
    assert list(rivals) == ["fused", "plain", "reference"]
    network, plain = models.build(names[0])
    assert [row.now for row in dla.fusion_report(network)] == ["FusedDlaLStage"] * 2
    assert not any(row.now for row in dla.fusion_report(plain))
    for row, words in (
        (nothing, "`model` has nothing that can be fused"),
        (no_stage, "`model` has no stage that takes"),
    ):
        with pytest.raises(measure.Wrong, match=words):
            row.prepare(CPU)
    monkeypatch.setattr(models, "SAME", -1)
    with pytest.raises(measure.Wrong, match="its output differs from that of its source by "):
        models.build(names[0])
