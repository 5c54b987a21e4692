import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start():
    """Every test draws the same numbers, alone or among others, and leaves one core to its neighbour."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
