"""What does a layer interaction cost? A training step and inference, against the plain network of the same depth."""

from statistics import median
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F

import dla

#: name, batch, image size
NETWORKS = [
    ("resnet20_mrla_l", 32, 32),
    ("resnet20_dla_l", 32, 32),
    ("resnet20_dla_b", 32, 32),
    ("resnet110_dla_l", 32, 32),
    ("resnet110_dla_b", 32, 32),
    ("resnet50_dla_l", 4, 224),
]


def train_step(model, x, y):
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()


@torch.no_grad()
def inference(model, x, y):
    model(x)


@pytest.mark.parametrize("run", [train_step, inference])
@pytest.mark.parametrize(("name", "batch", "size"), NETWORKS, ids=[row[0] for row in NETWORKS])
def test_against_plain(benchmark, record, name, batch, size, run):
    x, y = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    models = [dla.create_model(n, num_classes=10).train(run is train_step) for n in (name.split("_")[0], name)]
    plain = []

    def run_plain():
        """Between any two measured runs, so that a machine that drifts does so for both."""
        start = perf_counter()
        run(models[0], x, y)
        plain.append(perf_counter() - start)

    benchmark.pedantic(run, args=(models[1], x, y), setup=run_plain, rounds=10, warmup_rounds=2)
    ours = median(benchmark.stats.stats.data)
    del plain[:2]  # the warm-up's
    benchmark.extra_info["ratio to the plain network"] = ours / median(plain)
    record(run.__name__.replace("_", " "), name, median(plain), ours)
