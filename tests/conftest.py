import pytest
import torch
from hypothesis import settings

settings.register_profile("fuzz", max_examples=10_000)  # make fuzz
settings.register_profile("test", max_examples=200)
settings.load_profile("test")


@pytest.fixture(autouse=True)
def _same_start():
    """Every test draws the same numbers, alone or among others, and leaves one core to its neighbour."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
