import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, gradients, require_grad

from dla_kernels import norm_residual


def arguments(batch, channels, height, width, dtype=torch.float64):
    x, o = (torch.randn(batch, channels, height, width, dtype=torch.float64).to(dtype) for _ in range(2))
    weight, bias = torch.randn(2, channels, dtype=torch.float64)
    return x, o, weight, bias


def moments(o):
    return o.mean((2, 3)), o.var((2, 3), correction=0)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("keep", [None, (0.0, 1.25, 1.25)])
@pytest.mark.parametrize("shape", [(3, 8, 5, 7), (3, 5, 1, 1), (3, 1, 11, 13)])
def test_training_is_batch_norm_of_torch(shape, keep, relu):
    x, o, weight, bias = arguments(*shape)
    keep = None if keep is None else torch.tensor(keep, dtype=torch.float64)
    require_grad(x, o, weight, bias)
    out, y = norm_residual(x, o, *moments(o), weight, bias, keep, 1e-5, relu)

    normed = F.batch_norm(o, None, None, weight, bias, training=True, eps=1e-5)
    normed = normed.relu() if relu else normed
    expected = x + (normed if keep is None else normed * keep[:, None, None, None])
    assert_close(out, expected, 1e-13, "out")
    assert_close(y, expected.mean((2, 3)), 1e-13, "y")
    names = ("x", "o", "weight", "bias")
    inputs = (x, o, weight, bias)
    for name, got, wanted in zip(
        names, gradients((out, y), inputs), gradients((expected, expected.mean((2, 3))), inputs), strict=True
    ):
        assert_close(got, wanted, 1e-12, f"gradient of {name}")


def test_eval_takes_the_running_statistics():
    x, o, weight, bias = arguments(2, 8, 5, 7)
    mean, var = torch.randn(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64) + 0.5
    out, _ = norm_residual(x, o, mean, var, weight, bias)
    assert_close(out, x + F.batch_norm(o, mean, var, weight, bias), 1e-14)


@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck(relu):
    x, o, weight, bias = arguments(2, 3, 3, 2)
    mean, var = moments(o)
    keep = torch.tensor([1.25, 0.0], dtype=torch.float64)
    require_grad(x, o, weight, bias, mean, var)

    def op(x, o, mean, var, weight, bias):
        return norm_residual(x, o, mean, var, weight, bias, keep, relu=relu)

    inputs = (x, o, mean.detach().requires_grad_(), var.detach().requires_grad_(), weight, bias)
    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


def test_statistics_survive_a_mean_far_from_zero():
    """A variance from sums of squares would lose every digit in float32 here."""
    o = (1e4 + torch.randn(4, 8, 16, 16, dtype=torch.float64)).float()
    x, weight, bias = torch.zeros_like(o), torch.ones(8), torch.zeros(8)
    out, _ = norm_residual(x, o, *moments(o), weight, bias)
    expected = F.batch_norm(o.double(), None, None, training=True)
    assert_close(out, expected, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_maps_keep_their_dtype(dtype):
    x, o, weight, bias = arguments(2, 8, 9, 9, dtype)
    mean, var = (m.float() for m in moments(o.double()))
    out, y = norm_residual(x, o, mean, var, weight.float(), bias.float())
    assert (out.dtype, y.dtype) == (dtype, torch.float32)
    expected = x.double() + F.batch_norm(o.double(), None, None, weight, bias, training=True)
    assert_close(out, expected, torch.finfo(dtype).eps, "out")  # one rounding, at the end
    assert_close(y, expected.mean((2, 3)), 1e-5, "y")
