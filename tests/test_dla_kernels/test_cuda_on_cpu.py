"""The CUDA kernels, compiled for the CPU from the same source: values and gradients, races, bounds, alignment.

See tests/cuda_on_cpu/ for how. What only a GPU shows (speed, the memory model between blocks) is not tested here.
"""

import ctypes
import subprocess
import sys

import pytest
import torch
from cuda_on_cpu import backend, build
from helpers import assert_close
from test_dla_kernels.cases import MAKE, ROWS, TYPICAL
from test_dla_kernels.test_fused import LIMITS, check
from test_dla_kernels.test_layer_attention import check_infinite_gradient

import dla_kernels
from dla_kernels import native

pytestmark = [
    pytest.mark.skipif(build.COMPILER is None, reason="no g++ to compile the CUDA kernels for the CPU"),
    pytest.mark.skipif(native.ERROR is not None, reason=str(native.ERROR)),  # whose schemas the ops have
]
# In the order of planted.cu.
RIGHT, NO_GRID_BARRIER, NOT_TOGETHER, LEAVES_EARLY = range(4)
NONE, NO_BARRIER, NO_BARRIER_BEFORE_REUSE, UNINITIALISED, BEYOND_SHARED, BEYOND_MAP, MISALIGNED, DIVERGENT = range(8)

rows_on_cuda = [row for row in ROWS if row.id.partition("-")[0] in build.OPS]


@pytest.fixture(scope="session")
def folder(tmp_path_factory, worker_id):
    """The same for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    return (base if worker_id == "master" else base.parent) / "cuda_on_cpu"


@pytest.fixture(scope="session")
def library(folder):
    return build.build_once(folder / "ops", build.SOURCES)


@pytest.fixture
def order(library, monkeypatch):
    backend.load(library)
    backend.register(monkeypatch)
    with backend.Order(library) as order:
        yield order


@pytest.mark.parametrize("make", rows_on_cuda)
def test_matches_the_reference(make, order):
    """Whichever thread comes first; the bits of a result do not depend on it."""
    for dtype in LIMITS:
        torch.manual_seed(0)
        check(make(dtype=dtype), LIMITS[dtype], backend.NAME)
    call = make(dtype=torch.float32)
    first = call.run(backend.NAME)
    order.reverse()
    for name, value in call.run(backend.NAME).items():
        assert torch.equal(value, first[name]), name


def test_several_samples_in_a_block(order):
    """Where the planes are more than the blocks that a launch makes."""
    check(MAKE["norm_residual"](9, 2112, 1, 1, torch.float32, keep=True), LIMITS[torch.float32], backend.NAME)


@pytest.mark.parametrize("make", [row for row in rows_on_cuda if row.id.startswith(("gap_dsu", "refresh_gates"))])
def test_where_blocks_are_not_launched_together(make, order):
    """A launch for each phase gives the same bits."""
    call = make(dtype=torch.float32)
    first = call.run(backend.NAME)
    order.alone()
    for name, value in call.run(backend.NAME).items():
        assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("op", [op for op in TYPICAL if op in build.OPS])
def test_nan_and_infinity_pass(op, value, order):
    for name in TYPICAL[op](dtype=torch.float32).tensors:
        torch.manual_seed(0)
        call = TYPICAL[op](dtype=torch.float32)
        with torch.no_grad():
            call.tensors[name].view(-1)[2] = value
        for i, (actual, expected) in enumerate(zip(call(backend.NAME), call("reference"), strict=True)):
            if name.startswith(("value_weight", "carry_weight")) and actual.dim() == 4:
                # At the border the kernels multiply the padding's zero by the tap, which the reference leaves out.
                actual, expected = actual[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1]
            assert torch.equal(actual.isfinite(), expected.isfinite()), f"{name}, output {i}"


@pytest.mark.skipif("layer_attention" not in build.OPS, reason="of layer_attention")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_infinite_gradient(memory_format, order):
    check_infinite_gradient(backend.NAME, memory_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics(order, momentum, dtype):
    updated = []
    for name in (backend.NAME, "reference"):
        torch.manual_seed(0)
        x, o = torch.randn(2, 3, 5, 4, 4)
        mean, var = torch.randn(5).to(dtype), torch.rand(5).to(dtype)
        batches = torch.tensor(2)
        norm = dla_kernels.BatchNorm(torch.ones(5), torch.zeros(5), mean, var, batches, momentum=momentum)
        dla_kernels.norm_residual(x, o, norm, backend=name)
        updated.append((mean, var, batches))
    for actual, expected in zip(*updated, strict=True):
        assert_close(actual, expected, {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-6))


@pytest.mark.skipif("light_update" not in build.OPS, reason="the whole network needs every op")
@pytest.mark.parametrize("name", ["resnet20_dla_l", "resnet20_dla_b"])
@pytest.mark.slow
def test_network(name, order):
    import dla

    grads = []
    for chosen in (backend.NAME, "reference"):
        torch.manual_seed(0)
        model = dla.create_model(name, num_classes=3).double()
        with dla_kernels.use_backend(chosen):
            model(torch.randn(2, 3, 16, 16, dtype=torch.float64)).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    # What the next stage's BatchNorms take out again has a gradient of zero, of which rounding alone is left.
    largest = max(g.norm() for g in grads[1].values())
    for parameter, expected in grads[1].items():
        error = (grads[0][parameter] - expected).norm()
        assert error <= 1e-9 * max(expected.norm(), 1e-3 * largest), parameter


@pytest.fixture(scope="session")
def sanitized(folder):
    return build.build_once(folder / "sanitized", build.SOURCES, build.SANITIZE)


def run_sanitized(*arguments):
    command = [sys.executable, str(build.HERE / "sanitized.py"), *map(str, arguments)]
    return subprocess.run(command, env=build.sanitizer_environment(), capture_output=True, text=True)


def test_no_access_out_of_bounds(sanitized):
    done = run_sanitized(sanitized)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split("\n")[-2] == f"{len(rows_on_cuda)} rows ran"


@pytest.fixture(scope="session")
def planted(folder):
    return build.build_once(folder / "planted", [build.HERE / "planted.cu"])


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("mistake", [NONE, NO_BARRIER, NO_BARRIER_BEFORE_REUSE, UNINITIALISED])
def test_races_and_unwritten_memory_show(planted, mistake, last_first):
    values = torch.randn(3, 128)
    out = torch.empty_like(values)
    with backend.Order(planted) as order:
        order.reverse(last_first)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (values, out))
        assert ctypes.CDLL(str(planted)).run_mirror(mistake, 3, *pointers)
    right = torch.allclose(out, values + values.sum(1, keepdim=True), atol=1e-5)
    assert right == (mistake == NONE)


@pytest.mark.parametrize("mistake", [BEYOND_SHARED, DIVERGENT])
def test_launches_that_fail(planted, mistake):
    """Shared memory written beyond its end, and a warp of which a part waits for the rest for ever."""
    run = ctypes.CDLL(str(planted)).run_mirror
    run.restype = ctypes.c_bool
    values, out = torch.randn(2, 128)
    assert not run(mistake, 1, ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()))


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("mistake", [RIGHT, NO_GRID_BARRIER, NOT_TOGETHER, LEAVES_EARLY])
def test_barriers_of_the_grid(planted, mistake, last_first):
    """A missing one shows in the values; one that not all blocks reach, or that were not launched together, fails."""
    values, places = torch.arange(4.0), torch.full((2, 4), torch.nan)
    with backend.Order(planted) as order:
        order.reverse(last_first)
        run = ctypes.CDLL(str(planted)).run_across
        run.restype = ctypes.c_bool
        ran = run(mistake, 4, *(ctypes.c_void_p(t.data_ptr()) for t in (values, places)))
        assert ran == (mistake in (RIGHT, NO_GRID_BARRIER))
        assert torch.equal(values, torch.arange(4.0) + 2) == (mistake == RIGHT)
        assert not run(RIGHT, 7, ctypes.c_void_p(0), ctypes.c_void_p(0))  # more than run together
        order.alone()
        assert not run(RIGHT, 4, ctypes.c_void_p(0), ctypes.c_void_p(0))


@pytest.mark.parametrize("mistake", [NONE, BEYOND_SHARED, BEYOND_MAP, MISALIGNED])
def test_the_sanitizer_sees(folder, mistake):
    library = build.build_once(folder / "planted sanitized", [build.HERE / "planted.cu"], build.SANITIZE)
    done = run_sanitized(library, mistake)
    assert (done.returncode == 0) == (mistake == NONE), done.stdout + done.stderr
    if mistake in (BEYOND_SHARED, BEYOND_MAP):
        assert "AddressSanitizer" in done.stderr
