"""The fused backends against the reference: outputs and all gradients, in every dtype, layout and awkward size."""

from functools import partial

import pytest
import torch
from helpers import assert_close, on_gpu, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_dla_kernels.cases import MAKE, ROWS, TYPICAL, Call

from dla_kernels import native

pytestmark = pytest.mark.skipif(native.ERROR is not None, reason=str(native.ERROR))

# Float64 differs by the order of sums alone. Float32 is compared with float64, so sums over a map count. A low
# precision is compared with itself, as both keep their maps in it: an element has one rounding, half an epsilon.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}

# The ops whose results are maps, each with a BatchNorm.
MAP_OPS = "norm_residual", "light_update", "layer_attention"

# BatchNorm takes a channel's scale out, so the gradients of what scales o are sums that all but cancel.
CANCELLING = {"light_update": 8, "layer_attention": 8}
# Those of layer_attention's filters along the channels are sums of such gradients, which cancel once more.
FILTERS = 32


def slack_of(op: str, name: str, low: bool) -> int:
    """What the limit of a result is multiplied with."""
    if low and name.startswith(("gradient of query_weights", "gradient of key_weights")):
        return FILTERS
    return CANCELLING.get(op, 1) if name.startswith("gradient") else 1


def check(call: Call, limit: float, backend: str = "native", floor: float = 0.0) -> None:
    """Compares all outputs and gradients; a gradient is taken for at least ``floor`` times the largest one."""
    low = limit in (LIMITS[torch.bfloat16], LIMITS[torch.float16])
    expected_call = call if low else call.to_double()
    outputs = call(backend)
    directions = call.directions(outputs)
    actual = call.run(backend, directions)
    expected = expected_call.run("reference", directions if low else [d.double() for d in directions])
    largest = max((g.norm().item() for name, g in expected.items() if name.startswith("gradient")), default=0.0)
    for name, value in actual.items():
        at_least = floor * largest if name.startswith("gradient") else 0.0
        assert_close(value, expected[name], slack_of(call.op, name, low) * limit, name, at_least)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("make", ROWS)
def test_matches_the_reference(make, dtype):
    check(make(dtype=dtype), LIMITS[dtype])


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instruction_set(request):
    """Has the kernels use it."""
    from dla_kernels import _C

    if on_gpu():
        pytest.skip("of the CPU's kernels")
    if request.param not in _C.instruction_sets():
        pytest.skip(f"no {request.param} here")
    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield
    _C.use_instruction_set(before)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("make", ROWS)
def test_matches_on_every_instruction_set(make):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(make(dtype=dtype), LIMITS[dtype])


def run_and_infer(call: Call) -> dict[str, torch.Tensor]:
    results = call.run("native")
    with torch.no_grad():
        return results | {f"inferred output {i}": output for i, output in enumerate(call("native"))}


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("width", [1, 7, 12, 16, 40, 72])
def test_same_bits_past_the_caches(width, layout, dtype):
    """Maps that no cache holds are stored in another way; here the caches are taken for nothing."""
    from dla_kernels import _C

    calls = []
    for statistics in ("own", "running"):
        make = {op: partial(MAKE[op], 3, 32, 5, width, dtype, layout, statistics=statistics) for op in MAP_OPS}
        calls += [make["norm_residual"](relu="sum"), make["layer_attention"]()]
        calls += [make["light_update"](carry=carry) for carry in ("none", "gate", "gate filter")]
    expected = [run_and_infer(call) for call in calls]
    before = _C.use_cache_bytes(0)
    try:
        actual = [run_and_infer(call) for call in calls]
    finally:
        _C.use_cache_bytes(before)
    for call, found, wanted in zip(calls, actual, expected, strict=True):
        for name, value in found.items():
            assert torch.equal(value, wanted[name]), f"{call.op}, {name}"


@pytest.mark.parametrize("make", ROWS)
def test_dtypes_and_shapes_are_those_of_the_reference(make):
    call = make(dtype=torch.bfloat16)
    actual, expected = call.run("native"), call.run("reference")
    for name, value in actual.items():
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape), name


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("op", MAP_OPS)
def test_maps_keep_their_layout(op, layout):
    for name, value in TYPICAL[op](dtype=torch.float32, layout=layout).run("native").items():
        if value.dim() == 4 and value.shape[1] > 1 and value.shape[-1] > 3:
            assert value.is_contiguous(memory_format=torch.channels_last) == (layout == "rows"), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("op", TYPICAL)
def test_nan_and_infinity_pass(op, value):
    """A bad sample shows where it does in the reference: in its own outputs, and nowhere else."""
    for name in TYPICAL[op](dtype=torch.float32).tensors:
        torch.manual_seed(0)
        call = TYPICAL[op](dtype=torch.float32)
        with torch.no_grad():
            call.tensors[name].view(-1)[2] = value
        for i, (actual, expected) in enumerate(zip(call("native"), call("reference"), strict=True)):
            if name.startswith(("value_weight", "carry_weight")) and actual.dim() == 4:
                # At the border the kernels multiply the padding's zero by the tap, which the reference leaves out.
                actual, expected = actual[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1]
            assert torch.equal(actual.isfinite(), expected.isfinite()), f"{name}, output {i}"


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("op", MAKE)
def test_same_bits_whatever_the_number_of_threads(op, layout):
    call = MAKE[op](3, 64, 33, 33, torch.float32, layout)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(call.run("native"))
    for name, value in runs[0].items():
        assert all(torch.equal(value, run[name]) for run in runs[1:]), name


@pytest.mark.parametrize("op", TYPICAL)
def test_only_the_gradients_asked_for(op):
    """Each tensor alone: the others' gradients are not needed, and its own is the same."""
    call = TYPICAL[op](dtype=torch.float64)
    everything = call.run("native")
    for name, tensor in call.tensors.items():
        for other in call.tensors.values():
            other.requires_grad_(other is tensor)
        outputs = call("native")
        reached = [(o, d) for o, d in zip(outputs, call.directions(outputs), strict=True) if o.requires_grad]
        outputs, directions = zip(*reached, strict=True)
        (grad,) = torch.autograd.grad(outputs, [tensor], directions)
        assert relative_error(grad, everything[f"gradient of {name}"]) < 1e-13, name


@pytest.mark.parametrize("op", TYPICAL)
def test_each_output_alone(op):
    """A loss may see one output only; the others' gradients then never come."""
    call = TYPICAL[op](dtype=torch.float64)
    for i in range(len(call("native"))):
        grads = [
            torch.autograd.grad(c(b)[i].square().sum(), list(c.tensors.values()), allow_unused=True)
            for c, b in ((call, "native"), (call.to_double(), "reference"))
        ]
        for name, actual, expected in zip(call.tensors, *grads, strict=True):
            zero = torch.zeros_like(call.tensors[name])
            actual, expected = (zero if grad is None else grad for grad in (actual, expected))
            assert_close(actual, expected, 1e-12, f"output {i}, gradient of {name}")


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("op", MAP_OPS)
def test_statistics_survive_a_mean_far_from_zero(op, layout):
    """A variance from sums of squares would lose every digit in float32."""
    call = MAKE[op](4, 8, 12, 12, torch.float32, layout)
    with torch.no_grad():
        for name, tensor in call.tensors.items():
            if tensor.dim() == 4 and tensor.shape[-1] == 12 and name != "x":
                tensor.mul_(1e-2).add_(1e2)
    for actual, expected in zip(call("native"), call.to_double()("reference"), strict=True):
        assert_close(actual, expected, 1e-2)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("make", [row for row in ROWS if row.id.startswith(("light_update", "layer_attention"))])
def test_inference_folds_the_norm(make, dtype):
    """Without gradients and with running statistics another kernel runs: one pass."""
    call = make(dtype=dtype, statistics="running", keep=False)
    with torch.no_grad():
        for i, (a, e) in enumerate(zip(call("native"), call.to_double()("reference"), strict=True)):
            assert_close(a, e, LIMITS[dtype], f"output {i}")  # where o is not stored, it is not rounded either


SIZES = st.integers(1, 40)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("op", MAKE)
def test_any_shape_layout_and_dtype(op, data):
    layouts = st.sampled_from(("planes", "rows", "planes sliced", "rows sliced", "transposed", "every second column"))
    options = {"layout": data.draw(layouts), "other": data.draw(layouts)}
    if op == "norm_residual":
        options |= {
            "relu": data.draw(st.sampled_from((None, "branch", "sum"))),
            "shortcut": data.draw(st.booleans()),
        }
    if op in MAP_OPS:
        options |= {
            "statistics": data.draw(st.sampled_from(("own", "running"))),
            "keep": data.draw(st.booleans()),
        }
    if op == "light_update":
        options["carry"] = data.draw(st.sampled_from(("none", "plain", "gate", "filter", "gate filter")))
    if op in ("layer_attention", "refresh_gates"):
        options["T"] = data.draw(st.integers(1, 6))
    if op == "layer_attention":
        options |= {"K": data.draw(st.sampled_from((1, 3, 5))), "keys": data.draw(st.booleans())}
    if op in ("gap_dsu", "refresh_gates"):
        options["form"] = data.draw(st.sampled_from(("joint", "split")))
        options["activation"] = data.draw(st.sampled_from(("identity", "tanh", "sigmoid")))
    shape = data.draw(st.integers(0, 4)), data.draw(SIZES), data.draw(SIZES), data.draw(SIZES)
    if shape[0] == 0 and "statistics" in options:
        options["statistics"] = "running"  # an empty batch has none of its own
    if options.get("statistics") == "own":
        shape = (max(shape[0], 3), *shape[1:])  # of two values the gradient is all but zero
    torch.manual_seed(data.draw(st.integers(0, 99)))
    # A sum that nearly cancels has fewer digits left, and in ten thousand there is one that has hardly any.
    check(MAKE[op](*shape, torch.float64, **options), 1e-10, floor=1e-4)
