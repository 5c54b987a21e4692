"""Prints the ratios of a run as one table."""

import pytest
import torch
from rich.console import Console
from rich.table import Table

ROWS = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[ROWS] = []


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)
    torch.manual_seed(0)


@pytest.fixture
def record(request):
    """Adds a row to the table at the end: ``record(question, name, plain, ours)``, medians in seconds."""
    return lambda *row: request.config.stash[ROWS].append(row)


def pytest_terminal_summary(config):
    if not config.stash[ROWS]:
        return
    table = Table("", "", "plain, ms", "ours, ms", "ratio", title="Medians of interleaved runs, two threads, float32")
    for question, name, plain, ours in config.stash[ROWS]:
        table.add_row(question, name, f"{plain * 1e3:.1f}", f"{ours * 1e3:.1f}", f"{ours / plain:.2f}")
    Console().print(table)
