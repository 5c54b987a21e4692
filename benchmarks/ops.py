"""What do the native ops cost on this CPU, beside the reference, torch.compile of it, and a copy of the same map?

``python benchmarks/ops.py [--shape 32x64x32x32 ...] [--threads 1] [--channels-last] [--compile]`` prints one row for
each op: milliseconds forward and backward, GB/s against the op's byte floor in maps, how many times faster than the
reference and, with ``--compile``, than the reference compiled by inductor. Times are of processor time, so that a busy
machine does not count; with several threads they are elapsed.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import dla_kernels
from dla_kernels import BatchNorm


def median(function: Callable[[], object], clock: Callable[[], float], runs: int = 15) -> float:
    for _ in range(3):
        function()
    times = []
    for _ in range(runs):
        start = clock()
        function()
        times.append(clock() - start)
    return statistics.median(times)


def cases(shape: list[int], memory_format: torch.memory_format) -> Iterator[tuple]:
    """Name, maps moved forward and backward, the call of tensors and a backend, and the tensors."""
    b, c, h, w = shape
    reduced, t = max(1, c // 4), 4

    def maps(n: int) -> list[Tensor]:
        return [torch.randn(b, c, h, w).contiguous(memory_format=memory_format).requires_grad_() for _ in range(n)]

    def vectors(*shape: int) -> Tensor:
        return (torch.randn(shape) * shape[-1] ** -0.5).requires_grad_()

    x, o = maps(2)
    y, h_, c_, gate, bias = vectors(b, c), vectors(b, c), vectors(b, c), vectors(b, c), vectors(c)
    scale, filter_, value_weight, carry_weight = vectors(c), vectors(1, 1, 5), vectors(c, 1, 3, 3), vectors(c, 1, 3, 3)
    keys, gates, q = vectors(b, t, c), vectors(b, t, c), vectors(b, c)
    weights = [vectors(reduced, 2 * c), vectors(3 * c, reduced), vectors(3 * c)]
    ops = dla_kernels
    with torch.no_grad():
        prior = [ops.layer_attention(v, q, keys[:, :1], gates[:, :1], value_weight, [], BatchNorm(scale, bias))[1]
                 for v in maps(t - 1)]  # fmt: skip

    def step(x, h, c, *weights, backend):
        return ops.gap_dsu(x, h, c, weights, carried=h, backend=backend)

    def refresh(keys, gates, h, c, *weights, backend):
        return (ops.refresh_gates(keys, gates, h, c, weights, backend=backend),)

    def attend(x, q, k, gates, value_weight, scale, bias, backend):
        out, layer = ops.layer_attention(
            x, q, k, gates, value_weight, prior, BatchNorm(scale, bias), head_dim=c, backend=backend
        )
        return out, layer.pooled

    def update(x, y, value_weight, carried, lambda_, gate, scale, bias, carry_weight=None, *, backend):
        return ops.light_update(
            x, y, filter_, filter_, value_weight, BatchNorm(scale, bias), carried, lambda_, gate, carry_weight,
            head_dim=c, backend=backend,
        )  # fmt: skip

    def block(x, o, scale, bias, backend):
        return ops.norm_residual(x, o, BatchNorm(scale, bias), relu="sum", backend=backend)

    yield "gap_dsu", 1, 0, step, [x, h_, c_, *weights]
    yield "refresh_gates", 0, 0, refresh, [keys, gates, h_, c_, *weights]
    # V from x, o from the V's, out from both; backward sums, o's gradient and V's, x's
    yield f"layer_attention, {t} layers", t + 6, t + 11, attend, [x, q, keys, gates, value_weight, scale, bias]
    update_args = [x, y, value_weight, o, scale, gate, scale, bias]
    yield "light_update", 6, 9, update, update_args
    yield "light_update, filtered carry", 6, 9, update, [*update_args, carry_weight]
    yield "norm_residual", 4, 8, block, [x, o, scale, bias]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["32x64x32x32", "32x256x8x8", "4x256x56x56"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    print(" ".join(f"{k}={v}" for k, v in dla_kernels.build_info().items()))
    for text in args.shape:
        shape = [int(n) for n in text.split("x")]
        source, target = torch.randn(2, *shape)
        size = source.nbytes
        copy = median(lambda: target.copy_(source), clock)  # noqa: B023
        print(f"\n{text}, a map of {size / 2**20:.1f} MiB, copied at {2 * size / copy / 1e9:.1f} GB/s")
        for name, forward_maps, backward_maps, call, tensors in cases(shape, memory_format):
            rivals = {"native": (call, "native"), "reference": (call, "reference")}
            if args.compile:
                torch._dynamo.reset()
                rivals["compiled"] = torch.compile(call, fullgraph=True), "reference"
            times = {}
            for rival, (function, backend) in rivals.items():
                with torch.no_grad():
                    forward = median(lambda: function(*tensors, backend=backend), clock)  # noqa: B023
                outputs = function(*tensors, backend=backend)
                outputs = [o for o in outputs if o.requires_grad]
                directions = [torch.randn_like(o) for o in outputs]
                backward = median(
                    lambda: torch.autograd.grad(outputs, tensors, directions, retain_graph=True),  # noqa: B023
                    clock,
                )
                times[rival] = forward, backward
            columns = []
            for i, maps in enumerate((forward_maps, backward_maps)):
                native, *others = (t[i] for t in times.values())
                gains = " ".join(f"{other / native:5.1f}x" for other in others)
                columns.append(f"{native * 1e3:7.2f} ms {maps * size / native / 1e9:5.1f} GB/s {gains}")
            print(f"{name:30s} forward {columns[0]}   backward {columns[1]}", flush=True)


if __name__ == "__main__":
    main()
