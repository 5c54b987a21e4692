"""What only a GPU shows of the CUDA kernels: graphs, streams, devices and maps of more than 2^31 elements.

`make gpu` runs it there, beside the tests that ``--device cuda`` takes to the GPU. Without one it is skipped, but for
what the large maps are asked, which small ones are too.
"""

from functools import partial

import pytest
import torch
from helpers import assert_close, directions_of
from test_dla_kernels.cases import MAKE, ROWS, TYPICAL, Call
from test_dla_kernels.test_fused import LIMITS, slack_of

import dla_kernels
from dla_kernels import native

WHY_NOT = native.CUDA_ERROR if torch.cuda.is_available() else "no GPU"
needs_gpu = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


#: Calls of every op, and two that take all of a GPU's blocks at once, which wait for each other.
CALLS = TYPICAL | {
    "gap_dsu, all blocks": partial(MAKE["gap_dsu"], 128, 256, 2, 2, carried=True),
    "refresh_gates, all blocks": partial(MAKE["refresh_gates"], 40, 256, 1, 1, T=3),
}


def on_gpu(make, dtype, device="cuda") -> Call:
    """The call with all tensors made there, so that their strides are those the row asks for."""
    with torch.device(device):
        return make(dtype=dtype)


@needs_gpu
@pytest.mark.parametrize("make", ROWS)
def test_same_bits_every_time(make):
    call = on_gpu(make, torch.bfloat16)
    d = directions_of(call("native"))
    first = call.run("native", d)
    for _ in range(3):
        for name, value in call.run("native", d).items():
            assert torch.equal(value, first[name]), name


@needs_gpu
@pytest.mark.parametrize("op", CALLS)
def test_graph(op):
    """Captured once with its gradient, and replayed on other values."""
    call = on_gpu(CALLS[op], torch.float32)
    d = directions_of(call("native"))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call.run("native", d)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.run("native", d)
    with torch.no_grad():
        for tensor in call.differentiable.values():
            tensor.mul_(0.5)
    graph.replay()
    for name, value in call.run("native", d).items():
        assert torch.equal(captured[name], value), name


@needs_gpu
@pytest.mark.parametrize("op", CALLS)
def test_two_streams(op):
    """Two calls side by side do not share anything they write."""
    calls = [on_gpu(CALLS[op], torch.float32) for _ in range(2)]
    ds = [directions_of(call("native")) for call in calls]
    expected = [call.run("native", d) for call, d in zip(calls, ds, strict=True)]
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(20):
        torch.cuda.synchronize()
        results = []
        for call, d, stream in zip(calls, ds, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(call.run("native", d))
        torch.cuda.synchronize()
        for result, wanted in zip(results, expected, strict=True):
            for name, value in result.items():
                assert torch.equal(value, wanted[name]), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")
@pytest.mark.parametrize("op", TYPICAL)
def test_second_device(op):
    """While the first one is current."""
    call = on_gpu(TYPICAL[op], torch.float32, "cuda:1")
    d = directions_of(call("native"))
    expected = call.to_double().run("reference", [t.double() for t in d])
    for name, value in call.run("native", d).items():
        assert value.device == torch.device("cuda:1")
        assert_close(value, expected[name], slack_of(op, name, low=False) * LIMITS[torch.float32], name)


def run_large(op, x, other, of_samples, of_channels):
    """An op on two maps, its samples independent of each other: its outputs and the gradients of the maps."""
    x, other = x.detach().requires_grad_(), other.detach().requires_grad_()
    c = x.shape[1]
    norm = dla_kernels.BatchNorm(*of_channels[:3], of_channels[3].square() + 0.1, training=False)
    stencil, line = of_channels[:9].T.reshape(c, 1, 3, 3), of_channels[4, :3].view(1, 1, 3)
    y, h, gate = of_samples
    if op == "norm_residual":
        outputs = dla_kernels.norm_residual(x, other, norm, relu="sum", backend="native")
    elif op == "light_update":
        outputs = dla_kernels.light_update(
            x, y, line, line, stencil, norm, other, of_channels[5], gate, head_dim=32, backend="native"
        )
    elif op == "layer_attention":
        prior = []
        for t, m in enumerate((other, x)):
            features = torch.stack([y, h][: t + 1], 1)
            out, layer = dla_kernels.layer_attention(
                m, features, features, line, line.repeat(t + 1, 1, 1), stencil, prior, norm, head_dim=32,
                followers=1 - t, backend="native",
            )  # fmt: skip
            prior.append(layer)
        outputs = (out, layer.pooled)
    else:
        w2 = of_channels[:6].T.reshape(3 * c, 2)
        weights = [of_channels[:4].repeat(1, 2), torch.cat([w2, w2], 1), y.new_zeros(3 * c)]
        outputs = dla_kernels.gap_dsu(x, h, y, weights, carried=gate, backend="native")
    outputs = [o for o in outputs if o is not None]
    inputs = [x] if op == "gap_dsu" else [x, other]
    directions = [o.detach() for o in outputs]
    return [o.detach() for o in outputs], torch.autograd.grad(outputs, inputs, directions)


def check_large(op, shape, layout, device):
    """Of the last sample, the values are those that it has alone."""
    x = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=layout).normal_()
    other = torch.empty_like(x).normal_()
    of_samples, of_channels = torch.randn(3, *shape[:2], device=device), torch.randn(9, shape[1], device=device)
    whole = run_large(op, x, other, of_samples, of_channels)
    alone = run_large(op, x[-1:], other[-1:], of_samples[:, -1:], of_channels)
    for kind, of_whole, of_alone in zip(("output", "gradient"), whole, alone, strict=True):
        for i, (a, b) in enumerate(zip(of_whole, of_alone, strict=True)):
            if a.dim() == 4:
                assert torch.equal(a[-1:], b), f"{kind} {i}"
            else:
                assert_close(a[-1:], b, 1e-4, f"{kind} {i}")  # sums, cut in another way
    return whole


LARGE_OPS = [op for op in TYPICAL if op != "refresh_gates"]  # which has no map


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("op", LARGE_OPS)
def test_more_than_2_to_31_elements(op, layout):
    shape = (5, 512, 1024, 1024)
    assert torch.Size(shape).numel() > 2**31
    needed = 14 * 2 * torch.Size(shape).numel()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    (out, *_), _ = check_large(op, shape, layout, "cuda")
    assert out.isfinite().all()


@pytest.mark.skipif(native.ERROR is not None, reason=str(native.ERROR))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("op", LARGE_OPS)
def test_what_large_maps_are_asked(op, layout):
    """The same of a small one on the CPU."""
    check_large(op, (5, 64, 12, 12), layout, "cpu")


@needs_gpu
@pytest.mark.parametrize("name", ["resnet20_dla_l", "resnet20_dla_b"])
def test_network_trains_in_a_graph(name):
    """A step under autocast in channels_last, captured once, against the same steps without a graph."""
    import dla

    def step():
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss

    losses = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = dla.create_model(name, num_classes=10).cuda().to(memory_format=torch.channels_last)
        x = torch.randn(16, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
        labels = torch.arange(16, device="cuda") % 10
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = step()
        of_this = []
        for _ in range(5):
            if captured:
                graph.replay()
            else:
                loss = step()
            of_this.append(loss.item())
        losses.append(of_this)
    assert losses[1][-1] < losses[1][0]
    for a, b in zip(*losses, strict=True):
        assert a == pytest.approx(b, rel=0.05)  # cuDNN's choice of algorithms differs
