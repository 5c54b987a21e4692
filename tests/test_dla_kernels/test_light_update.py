import pytest
import torch
from helpers import assert_close, require_grad

from dla_kernels import light_update


def arguments(batch, channels, height, width, dtype=torch.float64):
    shape = (batch, channels, height, width)
    x, carried = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    q, k, gate = torch.randn(3, batch, channels, dtype=torch.float64)
    value_weight, carry_weight = torch.randn(2, channels, 1, 3, 3, dtype=torch.float64)
    scale = torch.randn(channels, dtype=torch.float64)
    return x, q, k, value_weight, carried, scale, gate, carry_weight


def stencil(x, weight):
    """A depthwise 3x3 convolution as nine shifted products."""
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    height, width = x.shape[2:]
    return sum(
        weight[:, 0, i, j, None, None] * padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)
    )


def written_out(x, q, k, value_weight, carried, scale, gate, carry_weight, head_dim):
    """Equation 3 head by head."""
    o = stencil(x, value_weight)
    for start in range(0, q.shape[1], head_dim):
        head = slice(start, start + head_dim)
        score = (q[:, head] * k[:, head]).sum(1) / head_dim**0.5
        o[:, head] *= score.sigmoid()[:, None, None, None]
    if carried is not None:
        refreshed = carried.clone() if gate is None else carried * gate[:, :, None, None]
        if carry_weight is not None:
            refreshed += stencil(carried, carry_weight)
        o += scale[:, None, None] * refreshed
    return o


def without(args, *names):
    order = ("x", "q", "k", "value_weight", "carried", "scale", "gate", "carry_weight")
    return [None if name in names else arg for name, arg in zip(order, args, strict=True)]


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
        pytest.param(("carried", "scale", "gate", "carry_weight"), id="first layer"),
    ],
)
def test_equation(shape, head_dim, left_out):
    args = without(arguments(*shape), *left_out)
    o, mean, var = light_update(*args, head_dim)
    expected = written_out(*args, head_dim)
    assert_close(o, expected, 1e-14, "o")
    assert_close(mean, expected.mean((2, 3)), 1e-12, "mean")
    assert_close(var, expected.var((2, 3), correction=0), 1e-13, "var")


@pytest.mark.parametrize("left_out", [(), ("carry_weight",), ("carried", "scale", "gate", "carry_weight")])
def test_gradcheck_of_the_reference(left_out):
    args = without(arguments(2, 4, 3, 2), *left_out)
    given = [a for a in args if a is not None]
    require_grad(*given)

    def op(*tensors):
        tensors = iter(tensors)
        return light_update(*(None if a is None else next(tensors) for a in args), 2, backend="reference")

    assert torch.autograd.gradcheck(op, given)
    assert torch.autograd.gradgradcheck(op, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_low_precision_maps_accumulate_in_float32(dtype, layout):
    x, q, k, wv, carried, scale, gate, wc = arguments(2, 32, 9, 9, dtype)
    x, carried = (t.to(memory_format=layout) for t in (x, carried))
    vectors = [t.float() for t in (q, k, wv, scale, gate, wc)]
    o, mean, var = light_update(x, *vectors[:3], carried, *vectors[3:])
    assert (o.dtype, mean.dtype, var.dtype) == (dtype, torch.float32, torch.float32)
    expected = written_out(x.double(), q, k, wv, carried.double(), scale, gate, wc, 32)
    assert_close(o, expected, 2 * torch.finfo(dtype).eps, "o")  # one rounding, at the end
    assert_close(var, expected.var((2, 3), correction=0), 1e-6, "var")


def test_nan_stays_where_it_falls():
    args = arguments(2, 32, 5, 5)
    args[0][0, 3, 2, 2] = torch.nan
    o, mean, _ = light_update(*args)
    expected = torch.zeros_like(o, dtype=torch.bool)
    expected[0, 3, 1:4, 1:4] = True
    assert torch.equal(o.isnan(), expected)
    assert mean.isnan().nonzero().tolist() == [[0, 3]]
