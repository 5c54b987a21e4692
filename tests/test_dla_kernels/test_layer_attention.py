import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, require_grad
from test_dla_kernels.cases import BACKENDS, MANY_CALLS, stage

from dla_kernels import BatchNorm, layer_attention


def arguments(batch, channels, height, width, layers, dtype=torch.float64):
    """Of a stage: T maps and their value filters, q, k and gates [B, T, C]."""
    q, k, gates = torch.randn(3, batch, layers, channels, dtype=torch.float64)
    maps = [torch.randn(batch, channels, height, width, dtype=torch.float64).to(dtype) for _ in range(layers)]
    value_weights = list(torch.randn(layers, channels, 1, 3, 3, dtype=torch.float64))
    weight, bias = torch.randn(2, channels, dtype=torch.float64)
    return maps, q, k, gates, value_weights, BatchNorm(weight, bias)


def written_out(q, k, gates, values, head_dim):
    """Equation 2 head by head, on maps that are refreshed before they are attended to: q of one layer, [B, C]."""
    refreshed = torch.stack([v * g[..., None, None] for v, g in zip(values, gates.unbind(1), strict=True)], dim=1)
    heads = []
    for start in range(0, q.shape[1], head_dim):
        head = slice(start, start + head_dim)
        attention = torch.softmax(torch.einsum("bd,btd->bt", q[:, head], k[..., head]) / head_dim**0.5, dim=-1)
        heads.append(torch.einsum("bt,btdhw->bdhw", attention, refreshed[:, :, head]))
    return torch.cat(heads, dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "layers", "head_dim"),
    [
        pytest.param((2, 64, 5, 7), 3, 32, id="two heads, odd map"),
        pytest.param((2, 32, 1, 1), 1, 32, id="one layer, one pixel: a softmax over one key is 1"),
        pytest.param((2, 6, 7, 7), 2, 3, id="heads of three channels"),
        pytest.param((2, 32, 2, 3), 36, 32, id="36 layers, ResNet-152's third stage"),
        pytest.param((3, 5, 4, 4), 7, 1, id="a head for each channel"),
    ],
)
def test_equation(backend, shape, layers, head_dim):
    maps, q, k, gates, value_weights, norm = arguments(*shape, layers)
    *outputs, pooled = stage(maps, q, k, gates, value_weights, norm, head_dim, backend)
    values = [F.conv2d(x, w, padding=1, groups=shape[1]) for x, w in zip(maps, value_weights, strict=True)]
    assert_close(pooled, values[0].mean((2, 3)), 1e-12, "GAP of the value map")
    for t, out in enumerate(outputs):
        o = written_out(q[:, t], k[:, : t + 1], gates[:, : t + 1], values[: t + 1], head_dim)
        expected = maps[t] + F.batch_norm(o, None, None, norm.weight, norm.bias, training=True).relu()
        assert_close(out, expected, 1e-12, f"layer {t}")


@pytest.mark.parametrize("backend", MANY_CALLS)
def test_gradcheck_of_a_stage(backend):
    """Through the handles, by which a value map's gradient reaches the layer that made it."""
    maps, q, k, gates, value_weights, norm = arguments(2, 4, 3, 2, 3)
    inputs = (q, k, gates, norm.weight, norm.bias, *maps, *value_weights)
    require_grad(*inputs)

    def op(q, k, gates, weight, bias, *rest):
        return stage(rest[:3], q, k, gates, rest[3:], BatchNorm(weight, bias), 2, backend)

    # In Triton's interpreter along a random direction, not for every element.
    assert torch.autograd.gradcheck(op, inputs, fast_mode=backend == "triton")
    if backend == "reference":
        assert torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_map_read_elsewhere_gets_both_gradients(backend):
    maps, q, k, gates, value_weights, norm = arguments(2, 4, 3, 2, 2)
    require_grad(*maps, *value_weights)

    def loss(backend):
        args = (value_weights[0], [], norm, None, 2, 1, backend)
        _, layer = layer_attention(maps[0], q[:, 0], k[:, :1], gates[:, :1], *args)
        out, _ = layer_attention(
            maps[1], q[:, 1], k, gates, value_weights[1], [layer], norm, None, 2, 0, backend
        )  # fmt: skip
        return out.square().sum() + layer.value.square().sum() + layer.pooled.square().sum()

    tensors = (*maps, *value_weights)
    for a, b in zip(*(torch.autograd.grad(loss(b), tensors) for b in (backend, "reference")), strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_layers_need_no_handles(backend):
    maps, q, k, gates, value_weights, norm = arguments(2, 4, 3, 2, 2)
    options = {"head_dim": 2, "backend": backend}
    with torch.no_grad():
        _, first = layer_attention(maps[0], q[:, 0], k[:, :1], gates[:, :1], value_weights[0], [], norm, **options)
    require_grad(maps[1])
    out, _ = layer_attention(maps[1], q[:, 1], k, gates, value_weights[1], [first], norm, **options)
    (grad,) = torch.autograd.grad(out.square().sum(), [maps[1]])
    assert grad.abs().sum() > 0


@pytest.mark.skipif("native" not in BACKENDS, reason="the reference needs no handles")
def test_more_followers_than_announced():
    maps, q, k, gates, value_weights, norm = arguments(2, 4, 3, 2, 2)
    require_grad(*maps)
    _, first = layer_attention(maps[0], q[:, 0], k[:, :1], gates[:, :1], value_weights[0], [], norm, head_dim=2)
    with pytest.raises(ValueError, match=r"`prior\[0\]` was made for 0 followers, this is number 1"):
        layer_attention(maps[1], q[:, 1], k, gates, value_weights[1], [first], norm, head_dim=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    maps, q, k, gates, value_weights, norm = arguments(2, 32, 2, 2, 3)
    outputs = stage(maps, q * 1e3, k * 1e3, gates, value_weights, norm, 32, backend)
    assert all(out.isfinite().all() for out in outputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_each_value_map_once(backend):
    """What a stage saves grows by a fixed number of maps a layer: x, its value, o, and what the reference adds."""

    def saved_maps(layers):
        maps, q, k, gates, value_weights, norm = arguments(2, 32, 8, 8, layers)
        require_grad(q, k, gates, norm.weight, *maps, *value_weights)
        saved = {}

        def pack(t):
            saved[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = stage(maps, q, k, gates, value_weights, norm, 32, backend)
        assert outputs[0].grad_fn is not None
        return sum(t.untyped_storage().nbytes() >= maps[0].nbytes for t in saved.values())

    two, four, eight = map(saved_maps, (2, 4, 8))
    assert eight - four == 2 * (four - two)
    if backend != "reference":
        assert (two, four, eight) == (6, 12, 24)


@pytest.mark.parametrize("backend", MANY_CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_maps_accumulate_in_float32(backend, dtype):
    maps, q, k, gates, value_weights, norm = arguments(2, 32, 9, 9, 12, dtype)
    single = [t.float() for t in (q, k, gates)]
    outputs = stage(maps, *single, value_weights, norm, 32, backend)
    expected = stage([x.double() for x in maps], q, k, gates, value_weights, norm, 32, "reference")
    for t, (a, e) in enumerate(zip(outputs[:-1], expected[:-1], strict=True)):
        assert a.dtype == dtype
        assert_close(a, e, 2 * torch.finfo(dtype).eps, f"layer {t}")  # V's rounding, o's and its own
    assert outputs[-1].dtype == torch.float32
