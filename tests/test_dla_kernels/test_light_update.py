import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, require_grad
from test_dla_kernels.cases import BACKENDS

from dla_kernels import BatchNorm, light_update
from dla_kernels.common import accumulate_dtype

ORDER = ("x", "y", "query_weight", "key_weight", "value_weight", "carried", "carry_scale", "gate", "carry_weight")


def arguments(batch, channels, height, width, left_out=(), dtype=torch.float64):
    shape = (batch, channels, height, width)
    x, carried = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    y, gate = torch.randn(2, batch, channels, dtype=torch.float64)
    query_weight, key_weight = torch.randn(2, 1, 1, 3, dtype=torch.float64)
    value_weight, carry_weight = torch.randn(2, channels, 1, 3, 3, dtype=torch.float64)
    scale = torch.randn(channels, dtype=torch.float64)
    given = (x, y, query_weight, key_weight, value_weight, carried, scale, gate, carry_weight)
    return {name: t for name, t in zip(ORDER, given, strict=True) if name not in left_out}


def batch_norm(channels, **kwargs):
    weight, bias = torch.randn(2, channels, dtype=torch.float64)
    return BatchNorm(weight, bias, **kwargs)


def stencil(x, weight):
    """A depthwise 3x3 convolution as nine shifted products."""
    padded = F.pad(x, (1, 1, 1, 1))
    height, width = x.shape[2:]
    return sum(
        weight[:, 0, i, j, None, None] * padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)
    )


def slid(y, weight):
    """A filter of three slid along the channels, as three shifted products."""
    padded = F.pad(y, (1, 1))
    return sum(weight[0, 0, i] * padded[:, i : i + y.shape[1]] for i in range(3))


def written_out(args, head_dim):
    """Equation 3 head by head."""
    q, k = slid(args["y"], args["query_weight"]), slid(args["y"], args["key_weight"])
    o = stencil(args["x"], args["value_weight"])
    for start in range(0, q.shape[1], head_dim):
        head = slice(start, start + head_dim)
        score = (q[:, head] * k[:, head]).sum(1) / head_dim**0.5
        o[:, head] *= score.sigmoid()[:, None, None, None]
    if "carried" in args:
        gate = args.get("gate")
        refreshed = args["carried"].clone() if gate is None else args["carried"] * gate[:, :, None, None]
        if "carry_weight" in args:
            refreshed += stencil(args["carried"], args["carry_weight"])
        o += args["carry_scale"][:, None, None] * refreshed
    return o


@pytest.mark.parametrize(
    ("shape", "head_dim"),
    [
        pytest.param((2, 64, 5, 7), 32, id="two heads, odd map"),
        pytest.param((1, 32, 1, 1), 32, id="one pixel: the stencils' borders are all padding"),
        pytest.param((2, 6, 1, 9), 3, id="one row"),
        pytest.param((2, 6, 9, 1), 2, id="one column"),
        pytest.param((3, 37, 11, 13), 37, id="primes"),
    ],
)
@pytest.mark.parametrize(
    "left_out",
    [
        pytest.param((), id="OFFICIAL: gate and 3x3 term"),
        pytest.param(("carry_weight",), id="PAPER"),
        pytest.param(("gate", "carry_weight"), id="MRLA"),
        pytest.param(("gate",), id="3x3 term alone"),
        pytest.param(("carried", "carry_scale", "gate", "carry_weight"), id="first layer"),
    ],
)
def test_equation(shape, head_dim, left_out):
    args = arguments(*shape, left_out)
    mean, var = torch.randn(shape[1], dtype=torch.float64), torch.rand(shape[1], dtype=torch.float64) + 0.5
    expected = written_out(args, head_dim)
    training = batch_norm(shape[1])
    for norm in (training, training._replace(running_mean=mean, running_var=var, training=False)):
        if norm.training and shape[0] * shape[2] * shape[3] == 1:
            continue
        out, out_mean, o, o_mean = light_update(**args, norm=norm, head_dim=head_dim)
        assert_close(o, expected, 1e-14, "o")
        assert_close(o_mean, expected.mean((2, 3)), 1e-12, "GAP of o")
        normed = F.batch_norm(expected, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training)
        assert_close(out, args["x"] + normed, 1e-12, "out")
        assert_close(out_mean, (args["x"] + normed).mean((2, 3)), 1e-12, "GAP of out")


@pytest.mark.parametrize("left_out", [(), ("carry_weight",), ("carried", "carry_scale", "gate", "carry_weight")])
def test_gradcheck_of_the_reference(left_out):
    args = arguments(2, 4, 3, 2, left_out)
    norm = batch_norm(4)
    given = (*args.values(), norm.weight, norm.bias)
    require_grad(*given)

    def op(*tensors):
        *tensors, weight, bias = tensors
        named = dict(zip(args, tensors, strict=True))
        return light_update(**named, norm=BatchNorm(weight, bias), head_dim=2, backend="reference")

    assert torch.autograd.gradcheck(op, given)
    assert torch.autograd.gradgradcheck(op, given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_low_precision_maps_accumulate_in_float32(backend, dtype, layout):
    args = arguments(2, 32, 9, 9, dtype=dtype)
    expected = written_out({name: t.double() for name, t in args.items()}, 32)
    args = {n: t.to(memory_format=layout) if n in ("x", "carried") else t.float() for n, t in args.items()}
    norm = batch_norm(32)
    out, out_mean, o, o_mean = light_update(**args, norm=norm, backend=backend)
    assert (out.dtype, out_mean.dtype, o.dtype, o_mean.dtype) == (dtype, torch.float32, dtype, torch.float32)
    assert_close(o, expected, 2 * torch.finfo(dtype).eps, "o")  # one rounding, at the end
    assert_close(o_mean, expected.mean((2, 3)), 1e-5, "GAP of o")


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_sample_and_channel(backend):
    args = arguments(2, 32, 5, 5)
    args["x"][0, 3, 2, 2] = torch.nan
    out, _, o, o_mean = light_update(**args, norm=batch_norm(32), backend=backend)
    expected = torch.zeros_like(o, dtype=torch.bool)
    expected[0, 3, 1:4, 1:4] = True
    assert torch.equal(o.isnan(), expected)
    assert o_mean.isnan().nonzero().tolist() == [[0, 3]]
    assert out.isnan().any((0, 2, 3)).nonzero().tolist() == [[3]]  # BatchNorm takes the whole channel


@pytest.mark.parametrize("backend", BACKENDS)
def test_o_is_left_out_where_it_is_not_needed(backend):
    args = arguments(2, 32, 5, 5)
    norm = batch_norm(32, running_mean=torch.zeros(32), running_var=torch.ones(32), training=False)
    with torch.no_grad():
        out, _, o, o_mean = light_update(**args, norm=norm, need_o=False, backend=backend)
        expected = light_update(**args, norm=norm, backend=backend)
    assert o is None
    assert_close(out, expected[0], 1e-15)
    assert_close(o_mean, expected[3], 1e-15)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
# A single pixel, then in vectors: one, two, four, and others.
@pytest.mark.parametrize("size", [(1, 1), *((6, width) for width in (1, 7, 8, 14, 16, 28, 32, 56, 64, 75))])
@pytest.mark.parametrize("left_out", [(), ("carry_weight",), ORDER[5:]], ids=["filtered", "scaled", "no carry"])
def test_in_place_gives_the_same_bits(left_out, size, dtype):
    args = {
        name: t if name in ("x", "carried") else t.to(accumulate_dtype(torch.empty(0, dtype=dtype)))
        for name, t in arguments(2, 5, *size, left_out, dtype).items()
    }
    norm = batch_norm(5, running_mean=torch.rand(5).double(), running_var=torch.rand(5).double(), training=False)
    given = args | {name: args[name].clone() for name in ("x", "carried") if name in args}
    with torch.no_grad():
        expected = light_update(**args, norm=norm, head_dim=5)
        results = light_update(**given, norm=norm, head_dim=5, inplace=True)
    for actual, wanted in zip(results, expected, strict=True):
        assert torch.equal(actual, wanted)
    out, _, o, _ = results
    assert out is given["x"]
    assert out._version == 1
    if "carried" in given:
        scaled = "carry_weight" in left_out
        assert (o is given["carried"]) == scaled
        assert given["carried"]._version == scaled
        assert scaled or torch.equal(given["carried"], args["carried"])


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("left_out", [(), ("carry_weight",)], ids=["filtered", "scaled"])
def test_in_place_without_o_leaves_what_is_carried(left_out):
    args = arguments(2, 5, 6, 7, left_out)
    norm = batch_norm(5, running_mean=torch.rand(5).double(), running_var=torch.rand(5).double(), training=False)
    carried = args["carried"].clone()
    with torch.no_grad():
        out, _, o, _ = light_update(**args, norm=norm, head_dim=5, need_o=False, inplace=True)
    assert out is args["x"]
    assert o is None
    assert torch.equal(args["carried"], carried)


@pytest.mark.usefixtures("on_cpu")
def test_in_place_leaves_what_others_need():
    args = arguments(2, 5, 6, 7, ("carry_weight",))
    norm = batch_norm(5, running_mean=torch.rand(5).double(), running_var=torch.rand(5).double(), training=False)
    x, carried = args.pop("x"), args["carried"]
    kept = x.clone(), carried.clone()
    assert light_update(x, **args, norm=norm, head_dim=5, inplace=True)[0] is not x  # gradients may be taken
    with torch.no_grad():
        rows = x.contiguous(memory_format=torch.channels_last)
        for given, prior in ((rows, carried), (x[:, :, ::2], carried[:, :, ::2]), (x, rows), (x, x), (x, x.view_as(x))):
            out, _, o, _ = light_update(given, **{**args, "carried": prior}, norm=norm, head_dim=5, inplace=True)
            assert out is not given
            assert o is not prior
        assert light_update(x, **args, norm=batch_norm(5), head_dim=5, inplace=True)[0] is not x  # own statistics
    for actual, wanted in zip((x, rows, carried), (kept[0], *kept), strict=True):
        assert torch.equal(actual, wanted)
