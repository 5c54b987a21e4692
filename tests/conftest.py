import pytest
import torch
from hypothesis import settings

settings.register_profile("fuzz", max_examples=10_000)  # make fuzz
settings.register_profile("test", max_examples=200)
settings.load_profile("test")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the tests make their tensors: cpu, cuda or cuda:N")


def pytest_runtest_setup():
    """Comes before all fixtures: what those of a module compute hangs on no test before."""
    torch.set_num_threads(1)  # one core is the neighbour's
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_start(request):
    """Every test draws the same numbers, whichever fixtures have drawn some before."""
    torch.manual_seed(0)
    device = request.config.getoption("--device")
    if device == "cpu":
        yield
        return
    # TF32 has a thousandth of the precision that results are compared to.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@pytest.fixture
def on_cpu():
    """For what only the CPU's kernels do, whatever --device says."""
    with torch.device("cpu"):
        yield
