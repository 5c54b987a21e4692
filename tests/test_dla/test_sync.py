"""SyncBatchNorm: processes with uneven shares of a batch compute what one process computes of the whole."""

import subprocess
import sys

import pytest
import torch
from helpers import assert_close
from test_dla import sync_job


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sync")
    world = len(sync_job.SHARES)
    processes = [
        subprocess.Popen(
            [sys.executable, sync_job.__file__, str(rank), str(world), str(folder)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize("interaction", ["dla_l", "dla_b"])
def test_equals_one_process(folder, interaction):
    expected = sync_job.run(*sync_job.build(interaction))
    parts = [torch.load(folder / f"{interaction}-{rank}.pt") for rank in range(len(sync_job.SHARES))]
    assert_close(torch.cat([part["out"] for part in parts]), expected["out"], 1e-12, "out")
    assert_close(torch.cat([part["x"] for part in parts]), expected["x"], 1e-9, "gradient of x")
    for i, grad in enumerate(expected["parameters"]):
        assert_close(sum(part["parameters"][i] for part in parts), grad, 1e-9, f"gradient of parameter {i}")
    for part in parts:
        for actual, wanted in zip(part["buffers"], expected["buffers"], strict=True):
            assert_close(actual, wanted, 1e-12, "buffer")
