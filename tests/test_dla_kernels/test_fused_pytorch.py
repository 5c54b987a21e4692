"""What PyTorch expects of an op: opcheck, full-graph compilation, export, functional calls, one derivative."""

import importlib

import pytest
import torch
from helpers import assert_close
from test_dla_kernels.cases import MAKE, TYPICAL
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from dla_kernels import native

pytestmark = pytest.mark.skipif(native.ERROR is not None, reason=str(native.ERROR))


def recorded_calls(run, monkeypatch):
    """The library ops that ``run`` reaches, in order, each with its arguments."""
    calls = []

    def record(library_op):
        def call(*args):
            calls.append((library_op, args))
            return library_op(*args)

        return call

    for op in MAKE:
        ops = importlib.import_module(f"dla_kernels.ops.{op}.function").BACKENDS["native"]
        for name, library_op in vars(ops).items():
            monkeypatch.setattr(ops, name, record(library_op))
    run()
    monkeypatch.undo()
    return calls


def detached(a):
    """An argument of a library op, out of the graph."""
    if isinstance(a, torch.Tensor):
        return a.detach().clone()
    return [detached(i) for i in a] if isinstance(a, (list, tuple)) else a


LIBRARY_OPS = {
    "gap_dsu": ["gap_dsu_forward", "gap_dsu_backward"],
    "refresh_gates": ["refresh_gates_forward", "refresh_gates_backward"],
    "norm_residual": [
        "norm_residual_moments", "norm_residual_forward", "norm_residual_update_running_stats",
        "norm_residual_sums", "norm_residual_backward",
    ],
    "light_update": ["light_update_forward", "norm_residual_forward", "norm_residual_sums", "light_update_backward"],
    "layer_attention": [
        *["layer_attention_forward", "norm_residual_forward"] * 3,
        *["norm_residual_sums", "layer_attention_backward"] * 3,
    ],
}  # fmt: skip


@pytest.mark.parametrize("op", TYPICAL)
def test_opcheck(op, monkeypatch):
    call = TYPICAL[op](dtype=torch.float32)
    if op == "norm_residual":
        books = {"running_mean": torch.zeros(16), "running_var": torch.ones(16), "num_batches_tracked": torch.tensor(0)}
        call.tensors |= {f"norm.{name}": tensor for name, tensor in books.items()}
    calls = recorded_calls(lambda: call.run("native"), monkeypatch)
    assert [library_op.__name__.removesuffix(".default") for library_op, _ in calls] == LIBRARY_OPS[op]

    for library_op, args in calls:
        torch.library.opcheck(library_op, tuple(detached(a) for a in args))


@pytest.mark.parametrize("op", ["light_update", "layer_attention"])
def test_opcheck_of_inference(op, monkeypatch):
    call = TYPICAL[op](dtype=torch.float32, statistics="running", keep=False)
    with torch.no_grad():
        calls = recorded_calls(lambda: call("native"), monkeypatch)
    assert calls[-1][0].__name__ == f"{op}_folded.default"
    torch.library.opcheck(*calls[-1])


@pytest.mark.parametrize(
    ("op", "library_op"),
    [("norm_residual", "forward_"), ("light_update", "folded_"), ("layer_attention", "folded_")],
)
@pytest.mark.usefixtures("on_cpu")
def test_opcheck_in_place(op, library_op, monkeypatch):
    call = TYPICAL[op](dtype=torch.float32, statistics="running", keep=False)
    call.options["inplace"] = True
    with torch.no_grad():
        found, args = recorded_calls(lambda: call("native"), monkeypatch)[-1]
    assert found.__name__ == f"{op}_{library_op}.default"
    torch.library.opcheck(found, tuple(detached(a) for a in args))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("op", TYPICAL)
def test_compiles_to_one_graph(op, backend):
    call = TYPICAL[op](dtype=torch.float64)
    tensors = list(call.tensors.values())
    torch._dynamo.reset()
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager")
    directions = call.directions(call(backend))
    outputs = compiled(*tensors, backend=backend)
    grads = torch.autograd.grad(outputs, tensors, directions)
    expected = list(call.run(backend, directions).values())
    for i, (actual, wanted) in enumerate(zip((*outputs, *grads), expected, strict=True)):
        assert_close(actual, wanted, 1e-13, f"tensor {i}")


@pytest.mark.parametrize("op", TYPICAL)
def test_batch_size_recompiles_once(op):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = None
    for batch in (4, 6, 9, 7, 12):
        make = TYPICAL[op]
        call = make.func(batch, *make.args[1:], dtype=torch.float32, **make.keywords)
        compiled = compiled or torch.compile(call.function, fullgraph=True, backend=counter)
        outputs = compiled(*call.tensors.values(), backend="native")
        torch.autograd.grad(outputs, list(call.tensors.values()), call.directions(outputs))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("op", TYPICAL)
def test_exports_and_runs_again(op, tmp_path):
    call = TYPICAL[op](dtype=torch.float32)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call.function(*tensors)

    tensors = tuple(t.detach() for t in call.tensors.values())
    torch.export.save(torch.export.export(Module(), tensors), tmp_path / "op.pt2")
    outputs = torch.export.load(tmp_path / "op.pt2").module()(*tensors)
    for i, (actual, expected) in enumerate(zip(outputs, call("native"), strict=True)):
        assert torch.equal(actual, expected), f"output {i}"


@pytest.mark.parametrize("layout", ["planes", "rows", "rows sliced", "transposed"])
@pytest.mark.parametrize("op", TYPICAL)
def test_fake_tensors_have_the_same_strides(op, layout):
    call = TYPICAL[op](dtype=torch.float32, layout=layout)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = call.function(*(mode.from_tensor(t) for t in call.tensors.values()), backend="native")
    for i, (fake, real) in enumerate(zip(fakes, call("native"), strict=True)):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype), f"output {i}"


@pytest.mark.parametrize("op", TYPICAL)
def test_double_backward_names_the_reference(op):
    call = TYPICAL[op](dtype=torch.float64)
    tensors = list(call.tensors.values())
    sum_of_squares = sum(o.square().sum() for o in call("native"))
    grads = torch.autograd.grad(sum_of_squares, tensors, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: a fused op has no double backward; take backend='reference'"):
        torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)


@pytest.mark.parametrize("op", TYPICAL)
def test_functional_gradients(op):
    call = TYPICAL[op](dtype=torch.float64)
    tensors = tuple(t.detach() for t in call.tensors.values())

    def loss(backend):
        return lambda *tensors: sum(o.square().sum() for o in call.function(*tensors, backend=backend))

    positions = tuple(range(len(tensors)))
    actual, expected = (torch.func.grad(loss(b), positions)(*tensors) for b in ("native", "reference"))
    for name, a, e in zip(call.tensors, actual, expected, strict=True):
        assert_close(a, e, 1e-12, f"gradient of {name}")


@pytest.mark.parametrize("op", TYPICAL)
def test_autocast_leaves_the_state_alone(op):
    call = TYPICAL[op](dtype=torch.bfloat16)
    outside = call("native")
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        inside = call("native")
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_weights_may_be_of_another_precision():
    call = TYPICAL["light_update"](dtype=torch.bfloat16)
    weight = call.tensors["value_weight"].detach().bfloat16().requires_grad_()
    call.tensors["value_weight"] = weight
    outputs = call("native")
    (grad,) = torch.autograd.grad(outputs, [weight], call.directions(outputs))
    assert grad.dtype == torch.bfloat16
