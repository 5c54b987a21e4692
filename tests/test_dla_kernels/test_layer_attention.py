import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, require_grad
from test_dla_kernels.cases import BACKENDS, MANY_CALLS, stage

from dla_kernels import BatchNorm, layer_attention, native
from dla_kernels.common import accumulate_dtype


def arguments(batch, channels, height, width, layers, dtype=torch.float64):
    """Of a stage, see :func:`cases.stage`: T maps, features and gates [B, T, C], the filters, BatchNorm."""
    features, gates = torch.randn(2, batch, layers, channels, dtype=torch.float64)
    query_weights, key_weights = (list(torch.randn(layers, 1, 1, 3, dtype=torch.float64)) for _ in range(2))
    maps = [torch.randn(batch, channels, height, width, dtype=torch.float64).to(dtype) for _ in range(layers)]
    value_weights = list(torch.randn(layers, channels, 1, 3, 3, dtype=torch.float64))
    weight, bias = torch.randn(2, channels, dtype=torch.float64)
    return maps, features, gates, query_weights, key_weights, value_weights, BatchNorm(weight, bias)


def attend(arguments, t, prior, **options):
    """Layer t of these arguments."""
    maps, features, gates, query_weights, key_weights, value_weights, norm = arguments
    now = slice(0, t + 1)
    return layer_attention(
        maps[t], features[:, now], gates[:, now], query_weights[t], torch.cat(key_weights[now]), value_weights[t],
        prior, norm, **options,
    )  # fmt: skip


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
    given = maps, features, gates, query_weights, key_weights, value_weights, norm = arguments(*shape, layers)
    *outputs, value, pooled, key = stage(*given, head_dim, backend)
    q, k = (
        torch.stack([F.conv1d(y[:, None], w, padding=1)[:, 0] for y, w in zip(rows.unbind(1), weights, strict=True)], 1)
        for rows, weights in ((features, query_weights), (features * gates, key_weights))
    )
    assert_close(key, k[:, 0], 1e-12, "the first layer's key")
    values = [F.conv2d(x, w, padding=1, groups=shape[1]) for x, w in zip(maps, value_weights, strict=True)]
    assert_close(value, values[0], 1e-12, "the value map")
    assert_close(pooled, values[0].mean((2, 3)), 1e-12, "its GAP")
    for t, out in enumerate(outputs):
        o = written_out(q[:, t], k[:, : t + 1], gates[:, : t + 1], values[: t + 1], head_dim)
        expected = maps[t] + F.batch_norm(o, None, None, norm.weight, norm.bias, training=True).relu()
        assert_close(out, expected, 1e-12, f"layer {t}")


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("backend", MANY_CALLS)
def test_gradcheck_of_a_stage(backend, keys):
    """Through the handles, by which a value map's gradient reaches the layer that made it."""
    maps, features, gates, query_weights, key_weights, value_weights, norm = arguments(2, 4, 3, 2, 3)
    inputs = (features, gates, norm.weight, norm.bias, *maps, *query_weights, *key_weights, *value_weights)
    require_grad(*inputs)

    def op(features, gates, weight, bias, *rest):
        maps, *filters = (rest[i : i + 3] for i in range(0, 12, 3))
        return stage(maps, features, gates, *filters, BatchNorm(weight, bias), 2, backend, keys=keys)

    # In Triton's interpreter along a random direction, not for every element.
    assert torch.autograd.gradcheck(op, inputs, fast_mode=backend == "triton")
    if backend == "reference":
        assert torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_map_read_elsewhere_gets_both_gradients(backend):
    given = maps, _, _, _, _, value_weights, _ = arguments(2, 4, 3, 2, 2)
    require_grad(*maps, *value_weights)

    def loss(backend):
        _, layer = attend(given, 0, [], head_dim=2, followers=1, backend=backend)
        out, _ = attend(given, 1, [layer], head_dim=2, backend=backend)
        return out.square().sum() + layer.value.square().sum() + layer.pooled.square().sum()

    tensors = (*maps, *value_weights)
    for a, b in zip(*(torch.autograd.grad(loss(b), tensors) for b in (backend, "reference")), strict=True):
        assert_close(a, b, 1e-12)


def check_infinite_gradient(backend, memory_format):
    """One that a ReLU of zero meets stays at its pixel."""
    (x,), features, gates, (query_weight,), (key_weight,), (value_weight,), norm = arguments(2, 32, 5, 5, 1)
    zeros, bias = torch.zeros(2, 32, dtype=torch.float64), torch.full_like(norm.bias, -1e3)
    norm = BatchNorm(norm.weight, bias, zeros[0], 1 + zeros[1], training=False)
    x = x.contiguous(memory_format=memory_format)
    require_grad(x, value_weight)
    out, _ = layer_attention(x, features, gates, query_weight, key_weight, value_weight, [], norm, backend=backend)
    direction = torch.zeros_like(out)
    direction[0, 3, 2, 2] = torch.inf
    grad_x, grad_weight = torch.autograd.grad(out, [x, value_weight], direction)
    assert torch.equal(grad_x, direction)
    assert torch.equal(grad_weight, torch.zeros_like(grad_weight))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_gradient(backend, memory_format):
    check_infinite_gradient(backend, memory_format)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_layers_need_no_handles(backend):
    given = maps, *_ = arguments(2, 4, 3, 2, 2)
    options = {"head_dim": 2, "backend": backend}
    with torch.no_grad():
        _, first = attend(given, 0, [], **options)
    require_grad(maps[1])
    out, _ = attend(given, 1, [first], **options)
    (grad,) = torch.autograd.grad(out.square().sum(), [maps[1]])
    assert grad.abs().sum() > 0


@pytest.mark.skipif("native" not in BACKENDS, reason="the reference needs no handles")
def test_more_followers_than_announced():
    given = maps, *_ = arguments(2, 4, 3, 2, 2)
    require_grad(*maps)
    _, first = attend(given, 0, [], head_dim=2)
    with pytest.raises(ValueError, match=r"`prior\[0\]` was made for 0 followers, this is number 1"):
        attend(given, 1, [first], head_dim=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    maps, features, *rest = arguments(2, 32, 2, 2, 3)
    outputs = stage(maps, features * 1e3, *rest, 32, backend)
    assert all(out.isfinite().all() for out in outputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_each_value_map_once(backend):
    """What a stage saves grows by a fixed number of maps a layer: x, its value, o, and what the reference adds."""

    def saved_maps(layers):
        given = maps, features, gates, *filters, norm = arguments(2, 32, 8, 8, layers)
        require_grad(features, gates, norm.weight, *maps, *itertools.chain(*filters))
        saved = {}

        def pack(t):
            saved[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = stage(*given, 32, backend)
        assert outputs[0].grad_fn is not None
        return sum(t.untyped_storage().nbytes() >= maps[0].nbytes for t in saved.values())

    two, four, eight = map(saved_maps, (2, 4, 8))
    assert eight - four == 2 * (four - two)
    if backend != "reference":
        assert (two, four, eight) == (6, 12, 24)


@pytest.mark.parametrize("backend", MANY_CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_maps_accumulate_in_float32(backend, dtype):
    maps, features, gates, *rest = arguments(2, 32, 9, 9, 12, dtype)
    *outputs, value, pooled, key = stage(maps, features.float(), gates.float(), *rest, 32, backend)
    *expected, _, _, _ = stage([x.double() for x in maps], features, gates, *rest, 32, "reference")
    for t, (a, e) in enumerate(zip(outputs, expected, strict=True)):
        assert a.dtype == dtype
        assert_close(a, e, 2 * torch.finfo(dtype).eps, f"layer {t}")  # V's rounding, o's and its own
    assert value.dtype == dtype
    assert pooled.dtype == key.dtype == torch.float32


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.skipif(native.ERROR is not None, reason=str(native.ERROR))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 32, 5, 7), (3, 5, 1, 1), (2, 1, 9, 3), (2, 70, 17, 19), (0, 4, 3, 3)])
def test_in_place_gives_the_same_bits(shape, layout, dtype):
    maps, *vectors, norm = arguments(*shape, 6, dtype)
    maps = [m.to(memory_format=layout) for m in maps]
    vectors = [v if isinstance(v, list) else v.to(accumulate_dtype(maps[0])) for v in vectors]
    statistics = torch.rand(2, shape[1], dtype=torch.float64)
    given = maps, *vectors, BatchNorm(norm.weight, norm.bias, *statistics, training=False)
    with torch.no_grad():
        prior, again = [], []
        for t, x in enumerate(maps):
            expected, layer = attend(given, t, prior, head_dim=1)
            out, same = attend(given, t, again, head_dim=1, inplace=True)
            assert out is x
            assert x._version == 1
            for actual, wanted in zip((out, *same[:3]), (expected, *layer[:3]), strict=True):
                assert torch.equal(actual, wanted)
            prior.append(layer)
            again.append(same)
    x = maps[0].clone()
    out, _ = attend(([x], *given[1:]), 0, [], head_dim=1, inplace=True)  # gradients may be taken
    assert out is not x
    assert torch.equal(x, maps[0])
