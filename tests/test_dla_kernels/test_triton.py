"""The Triton backend against the reference: on a GPU where there is one, else in Triton's interpreter."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from helpers import assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_dla_kernels.cases import MAKE, ROWS, TYPICAL, Call
from test_dla_kernels.test_fused import LIMITS, slack_of
from torch._subclasses.fake_tensor import FakeTensorMode

from dla_kernels import backend, native, triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = triton.why_not(DEVICE)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def on_device(call: Call) -> Call:
    """The same call there, every tensor with its strides."""

    def moved(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage().to(device=DEVICE)
        there = torch.empty(0, dtype=t.dtype, device=DEVICE).set_(storage, t.storage_offset(), t.size(), t.stride())
        return there.requires_grad_(t.requires_grad)

    return Call(call.op, {n: moved(t.detach()) for n, t in call.tensors.items()}, call.options, call.training)


def check(call: Call, limit: float) -> None:
    low = limit in (LIMITS[torch.bfloat16], LIMITS[torch.float16])  # compared with itself, as in test_fused.py
    expected_call = call if low else call.to_double()
    call = on_device(call).require_grad()
    outputs = call("triton")
    directions = [d.to(DEVICE) for d in call.directions([o.cpu() for o in outputs])]
    grads = torch.autograd.grad(outputs, list(call.differentiable.values()), directions)
    expected = expected_call.run("reference", [d.cpu() if low else d.cpu().double() for d in directions])
    for (name, wanted), actual in zip(expected.items(), (*outputs, *grads), strict=True):
        assert_close(actual.cpu(), wanted, slack_of(call.op, name, low) * limit, name)


# Minutes in the interpreter.
LONG = {f"{op}-{row}" for op in ("light_update", "layer_attention") for row in ("several runs of rows", "deep stage")}


@pytest.mark.parametrize(
    "make", [pytest.param(*row.values, id=row.id, marks=pytest.mark.slow if row.id in LONG else ()) for row in ROWS]
)
def test_matches_the_reference(make):
    check(make(dtype=torch.float32), LIMITS[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", TYPICAL)
def test_matches_in_every_dtype(op, dtype):
    check(TYPICAL[op](dtype=dtype), LIMITS[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", ROWS)
def test_matches_the_reference_in_every_dtype(make, dtype):
    check(make(dtype=dtype), LIMITS[dtype])


def any_call(op: str, data: st.DataObject) -> Call:
    layouts = st.sampled_from(("planes", "rows", "planes sliced", "rows sliced", "transposed"))
    options = {"layout": data.draw(layouts), "other": data.draw(layouts)}
    if op in ("norm_residual", "light_update", "layer_attention"):
        options |= {"keep": data.draw(st.booleans()), "statistics": data.draw(st.sampled_from(("own", "running")))}
    if op == "norm_residual":
        options["relu"] = data.draw(st.sampled_from((None, "branch", "sum")))
    if op == "light_update":
        options["carry"] = data.draw(st.sampled_from(("none", "plain", "gate", "filter", "gate filter")))
        options["K"] = data.draw(st.sampled_from((1, 3, 5)))
    if op in ("layer_attention", "refresh_gates"):
        options["T"] = data.draw(st.integers(1, 3))
    if op == "layer_attention":
        options |= {"K": data.draw(st.sampled_from((1, 3, 5))), "keys": data.draw(st.booleans())}
    if op in ("gap_dsu", "refresh_gates"):
        options["form"] = data.draw(st.sampled_from(("joint", "split")))
        options["activation"] = data.draw(st.sampled_from(("identity", "tanh", "sigmoid")))
    sizes = st.integers(1, 12)
    # A channel of one value has no variance to speak of: two samples at least.
    shape = data.draw(st.integers(2, 3)), data.draw(st.integers(1, 40)), data.draw(sizes), data.draw(sizes)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    return MAKE[op](*shape, torch.float64, **options)


FIXTURES_ARE_FINE = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=FIXTURES_ARE_FINE)
@given(data=st.data())
@pytest.mark.parametrize("op", MAKE)
def test_any_shape_and_layout(op, data):
    check(any_call(op, data), 1e-9)  # a sum that nearly cancels has fewer digits left


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURES_ARE_FINE)
@given(data=st.data())
@pytest.mark.parametrize("op", MAKE)
def test_any_shape_and_layout_at_length(op, data):
    check(any_call(op, data), 1e-9)


def test_more_layers_than_a_launch_takes(monkeypatch):
    """The sum goes on from launch to launch, forward and backward, for prior layers and for later ones."""
    module = importlib.import_module("dla_kernels.ops.layer_attention.triton")
    monkeypatch.setattr(module, "LAYERS", 2)
    check(TYPICAL["layer_attention"](dtype=torch.bfloat16, T=4), LIMITS[torch.bfloat16])


def test_variance_survives_a_mean_far_from_zero():
    ops = importlib.import_module("dla_kernels.ops.norm_residual.triton")
    o = torch.randn(2, 3, 40, 40, dtype=torch.float64) * 1e-2 + 1e3
    mean, var = ops.moments(o.float().to(DEVICE))
    expected = torch.var_mean(o.float().double(), (2, 3), correction=0)
    assert_close(var.cpu(), expected[0], 1e-4, "variance")
    assert_close(mean.cpu(), expected[1], 1e-6, "mean")


@pytest.mark.parametrize("op", TYPICAL)
def test_same_bits_at_every_run(op):
    call = on_device(TYPICAL[op](dtype=torch.float32)).require_grad()
    runs = [torch.autograd.grad(sum(o.square().sum() for o in call("triton")), [*call.differentiable.values()])
            for _ in range(2)]  # fmt: skip
    for name, *values in zip(call.differentiable, *runs, strict=True):
        assert torch.equal(*values), name


def recorded_calls(op: str, monkeypatch) -> list[tuple]:
    """The library ops that a call of ``op`` reaches, forward and backward, with their arguments."""
    calls = []

    def recording(library_op):
        def run(*args):
            calls.append((library_op, args))
            return library_op(*args)

        return run

    for name in {op, "norm_residual"}:
        ops = importlib.import_module(f"dla_kernels.ops.{name}.function").BACKENDS["triton"]
        for kind, library_op in vars(ops).items():
            if isinstance(library_op, torch._ops.OpOverload):
                monkeypatch.setattr(ops, kind, recording(library_op))
    call = on_device(TYPICAL[op](dtype=torch.float32)).require_grad()
    outputs = call("triton")
    torch.autograd.grad(outputs, [*call.differentiable.values()], [torch.ones_like(o) for o in outputs])
    return calls


@pytest.mark.parametrize("op", TYPICAL)
def test_opcheck(op, monkeypatch):
    def detached(a):
        if isinstance(a, (list, tuple)):
            return [detached(i) for i in a]
        return a.detach() if isinstance(a, torch.Tensor) else a

    calls = {library_op.name(): (library_op, args) for library_op, args in recorded_calls(op, monkeypatch)}
    assert {f"dla_kernels_triton::{op}_{kind}" for kind in ("forward", "backward")} <= set(calls)  # and no other ran
    for library_op, args in calls.values():
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(library_op, tuple(detached(a) for a in args), test_utils=checks)


@pytest.mark.parametrize("op", TYPICAL)
def test_compiles_to_one_graph(op):
    call = on_device(TYPICAL[op](dtype=torch.float64)).require_grad()
    tensors = [*call.differentiable.values()]
    torch._dynamo.reset()
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, call.function):
        outputs = function(*call.tensors.values(), backend="triton")
        results.append((*outputs, *torch.autograd.grad(outputs, tensors, [torch.ones_like(o) for o in outputs])))
    for i, (actual, wanted) in enumerate(zip(*results, strict=True)):
        assert_close(actual, wanted, 1e-13, f"tensor {i}")


@pytest.mark.parametrize("layout", ["planes", "rows", "rows sliced", "transposed"])
@pytest.mark.parametrize("op", ["norm_residual", "light_update", "layer_attention"])
def test_fake_tensors_have_the_same_strides(op, layout):
    call = on_device(TYPICAL[op](dtype=torch.float32, layout=layout))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = call.function(*(mode.from_tensor(t) for t in call.tensors.values()), backend="triton")
    for i, (fake, real) in enumerate(zip(fakes, call("triton"), strict=True)):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype), f"output {i}"


@pytest.mark.skipif(native.ERROR is not None, reason=str(native.ERROR))
def test_schemas_are_those_of_the_native_ops():
    def signature(library_op):
        schema = library_op._schema
        return [(a.name, str(a.type)) for a in schema.arguments], [str(r.type) for r in schema.returns]

    for op in TYPICAL:
        ops = importlib.import_module(f"dla_kernels.ops.{op}.function").BACKENDS
        for kind, library_op in vars(ops["triton"]).items():
            if isinstance(library_op, torch._ops.OpOverload):
                assert signature(library_op) == signature(getattr(ops["native"], kind)), f"{op}_{kind}"


def test_auto_never_interprets(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(native, "ERROR", "not built")
    for device in ("cpu", "cuda"):
        assert backend.can_run("triton", torch.device(device))
        assert backend.choose(torch.device(device)) == "reference"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert backend.choose(torch.device("cuda")) == "triton"
    assert backend.choose(torch.device("cpu")) == "reference"
    with pytest.raises(RuntimeError, match=r"backend triton: its kernels run on cuda, and on cpu in Triton's interp"):
        backend.choose(torch.device("cpu"), "triton")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ('ModuleNotFoundError("No module", name="triton")', "Triton is not installed"),
        ('ImportError("undefined symbol")', "Triton does not load: undefined symbol"),
    ],
)
def test_imports_without_triton(tmp_path, error, reason):
    """It is looked for when it is asked for, not before; the cause is kept."""
    (tmp_path / "triton.py").write_text(f"raise {error}\n")
    script = f"""
import sys, torch, dla_kernels
assert "triton" not in sys.modules
assert dla_kernels.backends()["triton"] == {reason!r}, dla_kernels.backends()
"""
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_import_does_not_load_triton():
    script = "import sys, dla_kernels; assert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
