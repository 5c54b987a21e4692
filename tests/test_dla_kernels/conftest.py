import os

import pytest
import torch

# Before any kernel is imported: Triton decides then whether to interpret it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _new_memory_holds_nan():
    """An element of an output that a kernel forgets is NaN, not what happened to lie there."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
