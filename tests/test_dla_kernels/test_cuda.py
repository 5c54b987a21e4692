"""The CUDA kernels on a GPU: values and gradients, graphs, streams, devices and maps of more than 2^31 elements.

`make gpu` runs it there, also under compute-sanitizer; without a GPU all of it is skipped.
"""

import pytest
import torch
from helpers import assert_close
from test_dla_kernels.cases import ROWS, TYPICAL, Call
from test_dla_kernels.test_fused import CANCELLING, LIMITS, slack_of

import dla_kernels
from dla_kernels import native

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(native.CUDA_ERROR is not None, reason=str(native.CUDA_ERROR)),
]


def on_gpu(make, dtype, device="cuda") -> Call:
    """The call with all tensors made there, so that their strides are those the row asks for."""
    with torch.device(device):
        return make(dtype=dtype)


def directions(call: Call, outputs) -> list[torch.Tensor]:
    return [d.to(o.device) for d, o in zip(call.directions([o.cpu() for o in outputs]), outputs, strict=True)]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("make", ROWS)
def test_matches_the_reference(make, dtype):
    call = on_gpu(make, dtype)
    low = dtype in (torch.bfloat16, torch.float16)
    expected_call = call if low else call.to_double()
    d = directions(call, call("native"))
    actual = call.run("native", d)
    expected = expected_call.run("reference", d if low else [t.double() for t in d])
    for name, value in actual.items():
        assert_close(value, expected[name], slack_of(call.op, name, low) * LIMITS[dtype], name)


@pytest.mark.parametrize("make", ROWS)
def test_same_bits_every_time(make):
    call = on_gpu(make, torch.bfloat16)
    d = directions(call, call("native"))
    first = call.run("native", d)
    for _ in range(3):
        for name, value in call.run("native", d).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("op", TYPICAL)
def test_graph(op):
    """Captured once with its gradient, and replayed on other values."""
    call = on_gpu(TYPICAL[op], torch.float32)
    d = directions(call, call("native"))
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


@pytest.mark.parametrize("op", TYPICAL)
def test_two_streams(op):
    """Two calls side by side do not share anything they write."""
    calls = [on_gpu(TYPICAL[op], torch.float32) for _ in range(2)]
    ds = [directions(call, call("native")) for call in calls]
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
    d = directions(call, call("native"))
    expected = call.to_double().run("reference", [t.double() for t in d])
    for name, value in call.run("native", d).items():
        assert value.device == torch.device("cuda:1")
        assert_close(value, expected[name], CANCELLING.get(op, 1) * LIMITS[torch.float32], name)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_more_than_2_to_31_elements(layout):
    """Of the last sample, which lies beyond, the values are those that it has alone."""
    shape = (5, 512, 1024, 1024)
    size = 2 * torch.Size(shape).numel()
    free, _ = torch.cuda.mem_get_info()
    if free < 5 * size:
        pytest.skip(f"needs {5 * size / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    o = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=layout).normal_()
    x = torch.empty_like(o).normal_()
    channels = torch.randn(4, 512, device="cuda")
    norm = dla_kernels.BatchNorm(*channels[:3], channels[3].square() + 0.1, training=False)
    out, y, *_ = dla_kernels.norm_residual(x, o, norm, backend="native")
    alone, alone_y, *_ = dla_kernels.norm_residual(x[-1:], o[-1:], norm, backend="native")
    assert torch.equal(out[-1:], alone)
    assert_close(y[-1:], alone_y, 1e-5)
    assert_close(y, out.float().mean((2, 3)), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20_dla_l", "resnet20_dla_b"])
def test_network(name):
    import dla

    grads = []
    for backend in ("native", "reference"):
        torch.manual_seed(0)
        model = dla.create_model(name, num_classes=10).double().cuda()
        x = torch.randn(4, 3, 32, 32).double().cuda()
        with dla_kernels.use_backend(backend):
            model(x).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    # What the next stage's BatchNorms take out again has a gradient of zero, of which rounding alone is left.
    largest = max(g.norm() for g in grads[1].values())
    for parameter, expected in grads[1].items():
        error = (grads[0][parameter] - expected).norm()
        assert error <= 1e-8 * max(expected.norm(), 1e-3 * largest), parameter
