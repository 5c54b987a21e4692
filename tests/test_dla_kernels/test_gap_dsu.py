import pytest
import torch
from helpers import assert_close, dsu_weights, gradients, require_grad
from test_dla_kernels.cases import BACKENDS

from dla_kernels import gap_dsu, pack_dsu


def written_out(x, h, c, weights, activation):
    """Equations 4, 7, 8 and 9, one sample and one product at a time."""
    y = x.flatten(2).sum(-1) / (x.shape[2] * x.shape[3])
    contexts = []
    for y_b, h_b, c_b in zip(y, h, c, strict=True):
        if len(weights) == 3:
            w1, w2, b2 = weights
            candidate, i, f = (w2 @ (w1 @ torch.cat([h_b, y_b])).clamp(min=0) + b2).view(3, -1)
        else:
            w1y, b1y, w2y, b2y, w1h, b1h, w2h, b2h = weights
            gates = w2y @ (w1y @ y_b + b1y).clamp(min=0) + b2y + w2h @ (w1h @ h_b + b1h).clamp(min=0) + b2h
            i, f, candidate = gates.view(3, -1)
        contexts.append(c_b / (1 + (-f).exp()) + candidate.tanh() / (1 + (-i).exp()))
    context = torch.stack(contexts)
    sigma = {"identity": context, "tanh": context.tanh(), "relu": context.clamp(min=0), "sigmoid": context.sigmoid()}
    return y, sigma[activation], context


@pytest.mark.parametrize("form", ["joint", "split"])
@pytest.mark.parametrize("activation", ["identity", "tanh", "relu", "sigmoid"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((3, 8, 5, 7), id="odd map"),
        pytest.param((1, 5, 1, 1), id="one sample, one pixel, prime channels"),
        pytest.param((2, 37, 11, 13), id="primes"),
    ],
)
def test_equations(form, activation, shape):
    x = torch.randn(shape, dtype=torch.float64)
    h, c = torch.randn(2, *shape[:2], dtype=torch.float64)
    weights = dsu_weights(form, shape[1], 3)
    for name, got, expected in zip(
        ("y", "h", "c"),
        gap_dsu(x, h, c, weights, activation)[:3],
        written_out(x, h, c, weights, activation),
        strict=True,
    ):
        assert_close(got, expected, 1e-14, name)


def test_given_gap_is_taken_as_it_is():
    x = torch.randn(3, 8, 5, 7, dtype=torch.float64)
    h, c = torch.randn(2, 3, 8, dtype=torch.float64)
    weights = dsu_weights("joint", 8, 2)
    for got, expected in zip(gap_dsu(x.mean((2, 3)), h, c, weights)[:3], gap_dsu(x, h, c, weights)[:3], strict=True):
        assert_close(got, expected, 1e-14)


@pytest.mark.parametrize("form", ["joint", "split"])
def test_gradcheck_of_the_reference(form):
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    h, c = torch.randn(2, 2, 4, dtype=torch.float64)
    weights = dsu_weights(form, 4, 3)
    require_grad(x, h, c, *weights)
    carried = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def op(x, h, c, carried, *weights):
        return gap_dsu(x, h, c, weights, carried=carried, backend="reference")

    assert torch.autograd.gradcheck(op, (x, h, c, carried, *weights))
    assert torch.autograd.gradgradcheck(op, (x, h, c, carried, *weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_is_float32_whatever_the_map(dtype):
    x = torch.randn(2, 8, 64, 64).to(dtype)
    h, c = torch.randn(2, 2, 8)
    weights = dsu_weights("split", 8, 2, torch.float32)
    got = gap_dsu(x, h, c, weights)[:3]
    expected = written_out(x.double(), h.double(), c.double(), [w.double() for w in weights], "sigmoid")
    for name, a, b in zip(("y", "h", "c"), got, expected, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b, 1e-6, name)  # float32's own rounding: nothing inside was of low precision


def test_autocast_leaves_the_state_alone():
    x, (h, c) = torch.randn(2, 8, 4, 4), torch.randn(2, 2, 8)
    weights = dsu_weights("joint", 8, 2, torch.float32)
    expected = gap_dsu(x, h, c, weights, carried=h)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = gap_dsu(x, h, c, weights, carried=h)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_empty_batch():
    x, (h, c) = torch.randn(0, 8, 4, 4), torch.randn(2, 0, 8)
    weights = dsu_weights("joint", 8, 2, torch.float32)
    assert [t.shape for t in gap_dsu(x, h, c, weights, carried=h)] == [(0, 8)] * 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["joint", "split"])
@pytest.mark.parametrize("gate", ["context", "hidden"])
def test_the_carry_is_gated_by_a_step_from_the_new_state(backend, form, gate):
    h, c, y, carried = torch.randn(4, 3, 8, dtype=torch.float64)
    weights = dsu_weights(form, 8, 2)
    _, new_h, new_c, d = gap_dsu(y, h, c, weights, carried=carried, gate=gate, backend=backend)
    _, hidden, context, none = gap_dsu(carried, new_h, new_c, weights, backend=backend)
    assert none is None
    assert_close(d, context if gate == "context" else hidden, 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["joint", "split"])
def test_packed_weights_are_the_same_weights(backend, form):
    x, (h, c) = torch.randn(3, 8, 4, 4, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    weights = dsu_weights(form, 8, 2)
    require_grad(*weights)
    packed = pack_dsu(weights)
    for weight, unpacked in zip(weights, packed.unpack(), strict=True):
        assert torch.equal(weight, unpacked)
    one, other = (gap_dsu(x, h, c, w, carried=h, backend=backend) for w in (weights, packed))
    for a, b in zip(one, other, strict=True):
        assert_close(a, b, 1e-15)
    for a, b in zip(gradients(one[1:], weights), gradients(other[1:], weights), strict=True):
        assert_close(a, b, 1e-14)
