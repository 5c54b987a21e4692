"""The Triton backend against the reference: on a GPU where there is one, else in Triton's interpreter."""

import importlib
import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from helpers import assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_dla_kernels.cases import MAKE, ROWS, TYPICAL, Call, in_layout
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
    layouts = st.sampled_from(("planes", "rows", "planes sliced", "rows sliced", "transposed", "every second column"))
    options = {"layout": data.draw(layouts), "other": data.draw(layouts)}
    if op in ("norm_residual", "light_update", "layer_attention"):
        options |= {"keep": data.draw(st.booleans()), "statistics": data.draw(st.sampled_from(("own", "running")))}
    if op == "norm_residual":
        options["relu"] = data.draw(st.sampled_from((None, "branch", "sum")))
        options["shortcut"] = data.draw(st.booleans())
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
        options["gate"] = data.draw(st.sampled_from(("context", "hidden")))
    if op == "gap_dsu":
        options |= {"carried": data.draw(st.booleans()), "pooled": data.draw(st.booleans())}
    sizes = st.integers(1, 12)
    # A channel of one value has no variance to speak of: two samples at least.
    shape = data.draw(st.integers(2, 3)), data.draw(st.integers(1, 40)), data.draw(sizes), data.draw(sizes)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    return MAKE[op](*shape, torch.float64, **options)


FIXTURES_ARE_FINE = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def in_small_parts(monkeypatch, elements: int = 64) -> None:
    """Parts a map's pixels among programs where it would be too small for that."""
    monkeypatch.setattr(importlib.import_module("dla_kernels.triton.maps"), "PART", elements)


@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=FIXTURES_ARE_FINE)
@given(data=st.data())
@pytest.mark.parametrize("op", MAKE)
def test_any_shape_and_layout(op, data, monkeypatch):
    in_small_parts(monkeypatch, data.draw(st.sampled_from((64, 10**6))))
    check(any_call(op, data), 1e-9)  # a sum that nearly cancels has fewer digits left


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURES_ARE_FINE)
@given(data=st.data())
@pytest.mark.parametrize("op", MAKE)
def test_any_shape_and_layout_at_length(op, data, monkeypatch):
    in_small_parts(monkeypatch, data.draw(st.sampled_from((64, 10**6))))
    check(any_call(op, data), 1e-9)


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("op", ["gap_dsu", "layer_attention", "light_update", "norm_residual"])
def test_a_sample_among_several_programs(op, layout, monkeypatch):
    """Every sum over its pixels is then one over parts: in rows and in columns where a filter looks at neighbours."""
    maps = importlib.import_module("dla_kernels.triton.maps")
    in_small_parts(monkeypatch)
    x = in_layout(torch.empty(2, 8, 17, 19), layout)
    whole, in_rows = maps.area_of(x), maps.area_of(x, block=8)
    if DEVICE.type == "cpu":  # a GPU has another tile
        assert (whole.parts, in_rows.parts) == ({"planes": 7, "rows": 21}[layout], 4)
    assert whole.parts > 1
    assert in_rows.rows < in_rows.height
    assert in_rows.columns < in_rows.width
    options = {"light_update": {"carry": "gate filter"}, "norm_residual": {"keep": True, "relu": "branch"}}
    options["layer_attention"] = {"T": 2}
    check(MAKE[op](*x.shape, torch.float32, layout, **options.get(op, {})), LIMITS[torch.float32])
    if op in ("light_update", "layer_attention"):
        check_inference(MAKE[op](*x.shape, torch.float32, layout, statistics="running", **options[op]))


def test_parts_fill_a_gpu_and_are_no_more():
    maps = importlib.import_module("dla_kernels.triton.maps")

    def parts(*shape, block=None):
        x = torch.empty(shape, device="meta").to(memory_format=torch.channels_last)
        area = maps.area_of(x, block)
        programs = shape[0] * -(-shape[1] // min(64, shape[1])) * area.parts
        assert area.parts == 1 or programs <= 2 * maps.FILL
        return area.parts

    assert parts(256, 256, 56, 56) == parts(64, 2048, 7, 7) == 1  # the samples alone are enough
    assert parts(128, 64, 32, 32) == 8
    assert parts(128, 64, 32, 32, block=64) == 8
    assert parts(1, 256, 128, 128) == 128  # no less than PART elements each
    assert parts(1, 256, 128, 128, block=64) == 128
    assert parts(1, 16, 8, 8) == parts(1, 16, 8, 8, block=16) == 1


def test_knows_which_maps_are_read_in_vectors():
    """By what Triton knows of their strides: that they are multiples of 16, or not."""
    in_vectors = importlib.import_module("dla_kernels.triton.maps").in_vectors
    maps = (2, 64, 8, 8), (2, 64, 7, 7), (2, 40, 8, 8)
    assert [in_vectors(torch.empty(shape)) for shape in maps] == [True, False, True]
    assert [in_vectors(in_layout(torch.empty(shape), "rows")) for shape in maps] == [True, True, False]


def far_apart(shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """A map whose elements lie further apart than 32 bits count; of its memory only what is touched is there."""
    size = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    assert size > 2**31
    memory = torch.from_numpy(np.empty(2 * size, dtype=np.uint8)).view(torch.bfloat16)
    return memory.as_strided(shape, stride).copy_(torch.randn(shape))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU all of the memory is there")
@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        pytest.param((2, 3, 4, 4), (2**31 + 16, 16, 4, 1), id="samples"),
        pytest.param((1, 3, 4, 4), (16, 2**30 + 16, 4, 1), id="planes"),
        pytest.param((1, 3, 4, 4), (3, 1, 4 * (2**28 + 16), 2**28 + 16), id="pixels"),
    ],
)
def test_strides_beyond_32_bits(shape, stride):
    layout = "rows" if stride[1] == 1 else "planes"
    for op in ("norm_residual", "light_update", "layer_attention"):
        call = MAKE[op](*shape, torch.bfloat16, layout, **({"T": 1} if op == "layer_attention" else {}))
        name = "maps.0" if op == "layer_attention" else "x"
        with torch.no_grad():
            near = call("triton")
            call.tensors[name] = far_apart(shape, stride).copy_(call.tensors[name])
            for i, (far, expected) in enumerate(zip(call("triton"), near, strict=True)):
                assert torch.equal(far, expected), f"{op}, output {i}"


def check_inference(call: Call) -> None:
    """Without gradients and with running statistics another kernel runs: one pass."""
    with torch.no_grad():
        actual, expected = on_device(call)("triton"), call.to_double()("reference")
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a.cpu(), e, LIMITS[call.tensors["norm.weight"].dtype], f"output {i}")


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("carry", ["none", "plain", "gate", "gate filter"])
def test_inference_of_light_update_folds_the_norm(carry, layout):
    check_inference(MAKE["light_update"](2, 12, 5, 7, torch.float32, layout, carry=carry, statistics="running"))


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("T", [1, 3])
def test_inference_of_layer_attention_folds_the_norm(T, layout, monkeypatch):
    monkeypatch.setattr(importlib.import_module("dla_kernels.ops.layer_attention.triton"), "LAYERS", 2)
    check_inference(MAKE["layer_attention"](2, 12, 5, 7, torch.float32, layout, T=T, statistics="running"))


#: As plain as a call of every op can be: for tests that make it many times.
SMALL = {
    "gap_dsu": partial(MAKE["gap_dsu"], 2, 4, 2, 3, torch.float64, carried=True),
    "layer_attention": partial(MAKE["layer_attention"], 2, 4, 2, 3, torch.float64, T=2),
    "light_update": partial(MAKE["light_update"], 2, 4, 2, 3, torch.float64, carry="gate filter"),
    "norm_residual": partial(MAKE["norm_residual"], 2, 4, 2, 3, torch.float64, keep=True),
    "refresh_gates": partial(MAKE["refresh_gates"], 2, 4, 1, 1, torch.float64, T=2),
}


@pytest.mark.parametrize("op", SMALL)
def test_only_the_gradients_asked_for(op):
    """Each tensor alone: the others' gradients are not needed, and its own is the same."""
    call = on_device(SMALL[op]()).require_grad()
    everything = call.run("triton")
    for name, tensor in call.tensors.items():
        for other in call.tensors.values():
            other.requires_grad_(other is tensor)
        outputs = call("triton")
        reached = [(o, d) for o, d in zip(outputs, call.directions(outputs), strict=True) if o.requires_grad]
        outputs, directions = zip(*reached, strict=True)
        (grad,) = torch.autograd.grad(outputs, [tensor], directions)
        assert_close(grad, everything[f"gradient of {name}"], 1e-13, name)


@pytest.mark.parametrize("op", SMALL)
def test_each_output_alone(op):
    """A loss may see one output only; the others' gradients then never come."""
    call = on_device(SMALL[op]()).require_grad()
    for i in range(len(call("reference"))):
        grads = [
            torch.autograd.grad(c(b)[i].square().sum(), list(c.tensors.values()), allow_unused=True)
            for c, b in ((call, "triton"), (call.to_double(), "reference"))
        ]
        for name, actual, expected in zip(call.tensors, *grads, strict=True):
            zero = torch.zeros_like(call.tensors[name])
            actual, expected = (zero if grad is None else grad for grad in (actual, expected))
            assert_close(actual, expected, 1e-12, f"output {i}, gradient of {name}")


@pytest.mark.parametrize("op", SMALL)
def test_nan_passes(op):
    """A bad sample shows where it does in the reference: in its own outputs, and nowhere else."""
    for name in SMALL[op]().tensors:
        call = on_device(SMALL[op]())
        with torch.no_grad():
            call.tensors[name].view(-1)[1] = torch.nan
            for i, (actual, expected) in enumerate(zip(call("triton"), call("reference"), strict=True)):
                if name.startswith(("value_weight", "carry_weight")) and actual.dim() == 4:
                    continue  # at the border the kernels multiply the padding's zero by the tap
                assert torch.equal(actual.isfinite(), expected.isfinite()), f"{name}, output {i}"


#: Launches of a call, forward and backward: what docs/kernels.md says.
LAUNCHES = [
    ("gap_dsu", {}, (3, 5)),
    ("gap_dsu", {"carried": True}, (5, 11)),
    ("refresh_gates", {}, (2, 5)),
    ("layer_attention", {"T": 1}, (6, 9)),
    ("light_update", {}, (3, 5)),
    ("norm_residual", {}, (3, 3)),
]


@pytest.mark.parametrize(("op", "options", "launches"), LAUNCHES)
def test_launches(op, options, launches, monkeypatch):
    """Beside them only what torch launches for a few vectors. Only the first axis of a grid has room for many."""
    from triton.runtime.jit import KernelInterface

    monkeypatch.setenv("DLA_KERNELS_AUTOTUNE", "0")
    grids, get = [], KernelInterface.__getitem__
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda self, grid: grids.append(grid) or get(self, grid))
    call = on_device(MAKE[op](2, 8, 4, 4, torch.float32, **options))
    outputs = call.require_grad()("triton")
    forward = len(grids)
    torch.autograd.grad(outputs, [*call.differentiable.values()], [torch.ones_like(o) for o in outputs])
    assert (forward, len(grids) - forward) == launches
    assert all(rest <= 8 for _, *rests in grids for rest in rests)


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
    # A running mean is rounded by 1/300 of a deviation here, as the values are, and a GPU's smaller tile leaves more
    # values to each. Sums of squares would be off by hundreds of variances.
    assert_close(var.cpu(), expected[0], 1e-4 if DEVICE.type == "cpu" else 1e-3, "variance")
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


@pytest.mark.parametrize("op", TYPICAL)
def test_exports_and_runs_again(op, tmp_path):
    call = on_device(TYPICAL[op](dtype=torch.float32))

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call.function(*tensors, backend="triton")

    tensors = tuple(t.detach() for t in call.tensors.values())
    program = torch.export.export(Module(), tensors)
    assert f"dla_kernels_triton.{op}_forward" in str(program.graph)
    torch.export.save(program, tmp_path / "op.pt2")
    outputs = torch.export.load(tmp_path / "op.pt2").module()(*tensors)
    for i, (actual, expected) in enumerate(zip(outputs, call("triton"), strict=True)):
        assert torch.equal(actual, expected), f"output {i}"


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


needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")


@needs_gpu
@pytest.mark.parametrize("op", TYPICAL)
def test_graph(op, monkeypatch, tmp_path):
    """Captured with its gradient before anything was timed, which it is not then, and replayed on other values."""
    tuning = importlib.import_module("dla_kernels.triton.tuning")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    call = on_device(TYPICAL[op](dtype=torch.float32)).require_grad()
    directions = [d.to(DEVICE) for d in call.directions([o.cpu() for o in call("triton")])]
    monkeypatch.setenv("DLA_KERNELS_AUTOTUNE", "0")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call.run("triton", directions)  # compiles
    torch.cuda.synchronize()
    monkeypatch.delenv("DLA_KERNELS_AUTOTUNE")
    tuning._fastest.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.run("triton", directions)
    assert not tuning._fastest()
    with torch.no_grad():
        for tensor in call.differentiable.values():
            tensor.mul_(0.5)
    graph.replay()
    monkeypatch.setenv("DLA_KERNELS_AUTOTUNE", "0")
    for name, value in call.run("triton", directions).items():
        assert torch.equal(captured[name], value), name
    tuning._fastest.cache_clear()


@needs_gpu
@pytest.mark.parametrize("op", ["norm_residual", "light_update", "layer_attention"])
def test_tuned_on_the_gpu(op, monkeypatch, tmp_path):
    """Whatever tile is the fastest, the result is right, and the choice is kept."""
    tuning = importlib.import_module("dla_kernels.triton.tuning")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DLA_KERNELS_AUTOTUNE", raising=False)
    tuning._fastest.cache_clear()
    for layout in ("planes", "rows"):
        check(MAKE[op](8, 64, 32, 32, torch.float32, layout), LIMITS[torch.float32])
    assert len(json.loads((tmp_path / "dla_kernels" / "triton-tiles.json").read_text())) >= 4
    tuning._fastest.cache_clear()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")
@pytest.mark.parametrize("op", TYPICAL)
def test_second_device(op):
    """While the first one is current."""
    call = TYPICAL[op](dtype=torch.float32)
    expected = call.to_double()("reference")
    moved = Call(call.op, {n: t.detach().to("cuda:1") for n, t in call.tensors.items()}, call.options, call.training)
    for i, (actual, wanted) in enumerate(zip(moved("triton"), expected, strict=True)):
        assert actual.device == torch.device("cuda:1")
        assert_close(actual.cpu(), wanted, LIMITS[torch.float32], f"output {i}")
