import pytest
import torch
from helpers import assert_close, require_grad

from dla_kernels import layer_attention


def arguments(batch, channels, height, width, layers, dtype=torch.float64):
    q = torch.randn(batch, channels, dtype=torch.float64)
    k, gates = torch.randn(2, batch, layers, channels, dtype=torch.float64)
    values = [torch.randn(batch, channels, height, width, dtype=torch.float64).to(dtype) for _ in range(layers)]
    return q, k, values, gates


def written_out(q, k, values, gates, head_dim):
    """Equation 2 head by head, on maps that are refreshed before they are attended to."""
    refreshed = torch.stack([v * g[..., None, None] for v, g in zip(values, gates.unbind(1), strict=True)], dim=1)
    heads = []
    for start in range(0, q.shape[1], head_dim):
        head = slice(start, start + head_dim)
        attention = torch.softmax(torch.einsum("bd,btd->bt", q[:, head], k[..., head]) / head_dim**0.5, dim=-1)
        heads.append(torch.einsum("bt,btdhw->bdhw", attention, refreshed[:, :, head]))
    return torch.cat(heads, dim=1)


@pytest.mark.parametrize(
    ("shape", "layers", "head_dim"),
    [
        pytest.param((2, 64, 5, 7), 3, 32, id="two heads, odd map"),
        pytest.param((1, 32, 1, 1), 1, 32, id="one layer, one pixel: a softmax over one key is 1"),
        pytest.param((2, 6, 7, 7), 2, 3, id="heads of three channels"),
        pytest.param((2, 32, 2, 3), 36, 32, id="36 layers, ResNet-152's third stage"),
        pytest.param((3, 5, 4, 4), 7, 1, id="a head for each channel"),
    ],
)
def test_equation(shape, layers, head_dim):
    q, k, values, gates = arguments(*shape, layers)
    o, mean, var = layer_attention(q, k, values, gates, head_dim)
    expected = written_out(q, k, values, gates, head_dim)
    assert_close(o, expected, 1e-13, "o")
    assert_close(mean, expected.mean((2, 3)), 1e-13, "mean")
    assert_close(var, expected.var((2, 3), correction=0), 1e-12, "var")


def test_gradcheck_of_the_reference():
    q, k, values, gates = arguments(2, 4, 3, 2, 3)
    require_grad(q, k, gates, *values)

    def op(q, k, gates, *values):
        return layer_attention(q, k, values, gates, head_dim=2, backend="reference")

    assert torch.autograd.gradcheck(op, (q, k, gates, *values))
    assert torch.autograd.gradgradcheck(op, (q, k, gates, *values))


def test_large_scores_do_not_overflow():
    q, k, values, gates = arguments(1, 32, 2, 2, 3)
    o, *_ = layer_attention(q * 1e3, k * 1e3, values, gates)
    assert o.isfinite().all()


def test_keeps_each_value_map_once():
    """What is saved for backward grows by no stack of maps: T maps of values, nothing more of their size."""
    q, k, values, gates = arguments(2, 32, 8, 8, 6)
    require_grad(q, k, gates, *values)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = layer_attention(q, k, values, gates)
    map_bytes = values[0].nbytes
    # o itself is kept for its moments.
    assert outputs[0].grad_fn is not None
    assert sum(n >= map_bytes for n in saved.values()) <= len(values) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_maps_accumulate_in_float32(dtype):
    q, k, values, gates = arguments(2, 32, 9, 9, 12, dtype)
    o, mean, var = layer_attention(q.float(), k.float(), values, gates.float())
    assert (o.dtype, mean.dtype, var.dtype) == (dtype, torch.float32, torch.float32)
    expected = written_out(q, k, [v.double() for v in values], gates, 32)
    assert_close(o, expected, 2 * torch.finfo(dtype).eps, "o")  # one rounding, at the end
    assert_close(mean, expected.mean((2, 3)), 1e-5, "mean")
