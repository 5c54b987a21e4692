import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, gradients, require_grad
from test_dla_kernels.cases import BACKENDS, MANY_CALLS

from dla_kernels import BatchNorm, native, norm_residual
from dla_kernels.common import accumulate_dtype

RELU = [None, "branch", "sum"]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPES = [
    pytest.param((3, 8, 5, 7), id="odd map"),
    pytest.param((3, 5, 1, 1), id="one pixel"),
    pytest.param((3, 1, 11, 13), id="one channel"),
    pytest.param((2, 37, 16, 17), id="primes, more than one vector"),
]


def arguments(batch, channels, height, width, dtype=torch.float64):
    x, o = (torch.randn(batch, channels, height, width, dtype=torch.float64).to(dtype) for _ in range(2))
    weight, bias = torch.randn(2, channels, dtype=torch.float64)
    return x, o, weight, bias


def with_torch(x, o, weight, bias, keep, relu):
    """What torch's own modules compute in training."""
    branch = F.batch_norm(o, None, None, weight, bias, training=True, eps=1e-5)
    branch = branch.relu() if relu == "branch" else branch
    out = x + (branch if keep is None else branch * keep[:, None, None, None])
    out = out.relu() if relu == "sum" else out
    return out, out.mean((2, 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relu", RELU)
@pytest.mark.parametrize("keep", [None, (0.0, 1.25, 1.25)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_batch_norm_of_torch(backend, shape, keep, relu, layout):
    x, o, weight, bias = arguments(*shape)
    x, o = (t.to(memory_format=layout) for t in (x, o))
    keep = None if keep is None else torch.tensor(keep[: shape[0]], dtype=torch.float64)
    inputs = (x, o, weight, bias)
    require_grad(*inputs)
    out, y = norm_residual(x, o, BatchNorm(weight, bias), keep, relu, backend)
    expected = with_torch(x, o, weight, bias, keep, relu)
    assert_close(out, expected[0], 1e-13, "out")
    assert_close(y, expected[1], 1e-13, "y")
    for outputs in (slice(0, 2), slice(0, 1), slice(1, 2)):  # both, out alone, y alone
        got, wanted = gradients((out, y)[outputs], inputs), gradients(expected[outputs], inputs)
        for name, a, b in zip(("x", "o", "weight", "bias"), got, wanted, strict=True):
            if name == "o" and outputs == slice(1, 2) and relu is None and keep is None:
                # GAP of what a BatchNorm has centred: the gradients of a channel cancel but for rounding
                assert_close(a + 1, b + 1, 1e-13, "gradient of o, nearly zero")
            else:
                assert_close(a, b, 1e-12, f"gradient of {name}")
        out, y = norm_residual(x, o, BatchNorm(weight, bias), keep, relu, backend)
        expected = with_torch(x, o, weight, bias, keep, relu)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relu", RELU)
def test_eval_takes_the_running_statistics(backend, relu):
    x, o, weight, bias = arguments(2, 8, 5, 7)
    mean, var = torch.randn(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64) + 0.5
    norm = BatchNorm(weight, bias, mean.clone(), var.clone(), training=False)
    out, y = norm_residual(x, o, norm, relu=relu, backend=backend)
    branch = F.batch_norm(o, mean, var, weight, bias)
    expected = {None: x + branch, "branch": x + branch.relu(), "sum": (x + branch).relu()}[relu]
    assert_close(out, expected, 1e-14)
    assert_close(y, expected.mean((2, 3)), 1e-13)
    assert torch.equal(norm.running_mean, mean)
    assert torch.equal(norm.running_var, var)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_keeps_the_books_of_torch(backend, momentum, dtype):
    module, other = (torch.nn.BatchNorm2d(8, momentum=momentum).to(dtype) for _ in range(2))
    for _ in range(3):
        o = (torch.randn(4, 8, 5, 7) + 1).to(dtype)
        norm_residual(torch.zeros_like(o), o, BatchNorm.of(module), backend=backend)
        F.batch_norm(
            o, other.running_mean, other.running_var, None, None, True,
            momentum if momentum is not None else 1 / (1 + other.num_batches_tracked.item()),
        )  # fmt: skip
        other.num_batches_tracked += 1
    assert module.num_batches_tracked == 3
    assert_close(module.running_mean, other.running_mean, 4 * torch.finfo(dtype).eps)
    assert_close(module.running_var, other.running_var, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_books_are_kept_where_there_are_none(backend):
    module = torch.nn.BatchNorm2d(8, track_running_stats=False).eval()
    x, o, *_ = arguments(4, 8, 5, 7, torch.float32)
    out, _ = norm_residual(x, o, BatchNorm.of(module), backend=backend)
    assert_close(out, x + module(o), 1e-6)


@pytest.mark.parametrize("backend", MANY_CALLS)
@pytest.mark.parametrize("relu", RELU)
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(backend, relu, training):
    x, o, weight, bias = arguments(2, 3, 3, 2)
    running = {} if training else {"running_mean": o.mean((0, 2, 3)), "running_var": o.var((0, 2, 3))}
    keep = torch.tensor([1.25, 0.5], dtype=torch.float64)
    inputs = (x, o, weight, bias, keep)
    require_grad(*inputs)

    def op(x, o, weight, bias, keep):
        norm = BatchNorm(weight, bias, **running, training=training)
        return norm_residual(x, o, norm, keep, relu, backend)

    # In Triton's interpreter along a random direction, not for every element.
    assert torch.autograd.gradcheck(op, inputs, fast_mode=backend == "triton")
    if backend == "reference":
        assert torch.autograd.gradgradcheck(op, inputs)
    else:
        with pytest.raises(RuntimeError, match="norm_residual: a fused op has no double backward"):
            torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_survive_a_mean_far_from_zero(backend, layout):
    """A variance from sums of squares would lose every digit in float32 here."""
    o = (1e4 + torch.randn(4, 8, 16, 16, dtype=torch.float64)).float().to(memory_format=layout)
    x, weight, bias = torch.zeros_like(o), torch.ones(8), torch.zeros(8)
    expected = F.batch_norm(o.double(), None, None, training=True)
    out, _ = norm_residual(x, o, BatchNorm(weight, bias), backend=backend)
    assert_close(out, expected, 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", RELU)
def test_maps_keep_their_dtype(backend, dtype, layout, relu):
    x, o, weight, bias = arguments(2, 24, 9, 9, dtype)
    x, o = (t.to(memory_format=layout) for t in (x, o))
    leaves = (x, o, weight.float(), bias.float())
    require_grad(*leaves)
    out, y = norm_residual(*leaves[:2], BatchNorm(*leaves[2:]), relu=relu, backend=backend)
    assert (out.dtype, y.dtype) == (dtype, torch.float32)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = with_torch(*doubles, None, relu)
    assert_close(out, expected[0], torch.finfo(dtype).eps, "out")  # one rounding, at the end
    assert_close(y, expected[1], 1e-5, "y")
    for name, a, b in zip(
        ("x", "o", "weight", "bias"), gradients((out,), leaves), gradients(expected[:1], doubles), strict=True
    ):
        # A gradient is taken at the rounded output's side of the ReLU, and reaches it rounded.
        assert_close(a, b, 4 * torch.finfo(dtype).eps, f"gradient of {name}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_passes_through_the_relu(backend):
    x, o, weight, bias = arguments(2, 8, 4, 4)
    x[1, 2, 0, 3] = torch.nan
    norm = BatchNorm(weight, bias)
    for relu in RELU:
        out, y = norm_residual(x, o, norm, relu=relu, backend=backend)
        assert out.isnan().nonzero().tolist() == [[1, 2, 0, 3]]
        assert y.isnan().nonzero().tolist() == [[1, 2]]


def in_place(x, o, **settings):
    """Both forms of the op on the same input: (out, y) of each, and the copy of o that the second may write over."""
    channels = o.shape[1]
    norm = BatchNorm(*torch.rand(4, channels, dtype=torch.float64), training=False)
    again = o.clone() if o.is_contiguous() or o.is_contiguous(memory_format=torch.channels_last) else o
    expected = norm_residual(x, o, norm, **settings)
    return expected, norm_residual(x, again, norm, inplace=True, **settings), again


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.skipif(native.ERROR is not None, reason=str(native.ERROR))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shortcut", [None, *LAYOUTS])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, pytest.param((0, 5, 3, 3), id="no sample")])
def test_in_place_gives_the_same_bits(shape, layout, shortcut, dtype):
    x, o, _, _ = arguments(*shape, dtype)
    x, o = None if shortcut is None else x.to(memory_format=shortcut), o.to(memory_format=layout)
    with torch.no_grad():
        expected, (out, y), given = in_place(x, o, keep=torch.rand(shape[0]).to(accumulate_dtype(o)), relu="sum")
    assert out is given
    assert given._version == 1
    assert torch.equal(out, expected[0])
    assert_close(y, expected[1], 1e-6, "y")  # the layout of x, which the other form takes, says in which order it sums


@pytest.mark.usefixtures("on_cpu")
def test_in_place_writes_only_over_what_nothing_else_needs():
    x, o, _, _ = arguments(3, 8, 5, 7)
    with torch.no_grad():
        for other in (o[:1].expand(3, -1, -1, -1), o[..., ::2, :]):  # one sample thrice, every other row
            expected, (out, _), given = in_place(None, other)
            assert out.data_ptr() != given.data_ptr()
            assert torch.equal(out, expected[0])
        batch = BatchNorm(*torch.rand(2, 8, dtype=torch.float64))
        out, _ = norm_residual(x, o, batch, inplace=True)  # statistics of o itself
        assert out.data_ptr() != o.data_ptr()
        _, (out, _), given = in_place(x, o, backend="reference")
        assert out.data_ptr() != given.data_ptr()
    _, (out, _), given = in_place(x, o)  # gradients may be taken
    assert out.data_ptr() != given.data_ptr()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.skipif(native.ERROR is not None, reason=str(native.ERROR))
def test_autograd_sees_what_was_written_over():
    o = torch.randn(2, 4, 3, 3, requires_grad=True)
    kept = o * 2
    square = kept * kept
    with torch.no_grad():
        norm_residual(None, kept, BatchNorm(*torch.rand(4, 4), training=False), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.skipif(native.ERROR is not None, reason=str(native.ERROR))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_in_inference_mode(layout):
    with torch.inference_mode():
        _, o, _, _ = arguments(3, 8, 5, 7, torch.float32)
        expected, (out, _), given = in_place(None, o.to(memory_format=layout), relu="branch")
        assert out is given
        assert torch.equal(out, expected[0])
