"""What the native ops cost on this CPU, beside the reference and beside a copy of the same map.

``python benchmarks/ops.py [--shape 32x64x32x32 ...] [--threads 1] [--channels-last]`` prints one row for each op:
milliseconds forward and backward, GB/s against the op's byte floor in maps, and how many times faster than the
reference. Times are of processor time, so that a busy machine does not count; with several threads they are elapsed.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import dla_kernels


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
    """Name, maps moved forward and backward, the call, and its tensors."""
    b, c, h, w = shape
    reduced, t = max(1, c // 4), 4

    def maps(n: int) -> list[Tensor]:
        return [torch.randn(b, c, h, w).contiguous(memory_format=memory_format).requires_grad_() for _ in range(n)]

    def vectors(*shape: int) -> Tensor:
        return (torch.randn(shape) * shape[-1] ** -0.5).requires_grad_()

    x, o, *values = maps(2 + t)
    q, k, gate, mean = (vectors(b, c) for _ in range(4))
    var = torch.rand(b, c).add(0.1).requires_grad_()
    scale, bias, value_weight, carry_weight = vectors(c), vectors(c), vectors(c, 1, 3, 3), vectors(c, 1, 3, 3)
    keys, gates = vectors(b, t, c), vectors(b, t, c)
    weights = [vectors(reduced, 2 * c), vectors(3 * c, reduced), vectors(3 * c)]
    k_ = dla_kernels
    yield "gap_dsu", 1, 0, lambda **b: k_.gap_dsu(x, q, k, weights, **b), [x, q, k, *weights]
    yield "refresh_gates", 0, 0, lambda **b: (k_.refresh_gates(keys, gates, q, k, weights, **b),), [keys, gates, q, k]
    yield (
        f"layer_attention, {t} layers", t + 1, 2 * t + 2,
        lambda **b: k_.layer_attention(q, keys, values, gates, c, **b), [q, keys, gates, *values],
    )  # fmt: skip
    yield (
        "light_update", 3, 6,
        lambda **b: k_.light_update(x, q, k, value_weight, o, scale, gate, None, c, **b),
        [x, q, k, value_weight, o, scale, gate],
    )  # fmt: skip
    yield (
        "light_update, filtered carry", 3, 6,
        lambda **b: k_.light_update(x, q, k, value_weight, o, scale, gate, carry_weight, c, **b),
        [x, q, k, value_weight, o, scale, gate, carry_weight],
    )  # fmt: skip
    yield (
        "norm_residual, moments given", 3, 4,
        lambda **b: k_.norm_residual(x, o, scale, bias, mean, var, **b)[:2], [x, o, scale, bias, mean, var],
    )  # fmt: skip
    yield (
        "norm_residual, residual block", 4, 8,
        lambda **b: k_.norm_residual(x, o, scale, bias, relu="sum", **b)[:2], [x, o, scale, bias],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["32x64x32x32", "32x256x8x8", "4x256x56x56"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels-last", action="store_true")
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
            times = {}
            for backend in ("native", "reference"):
                with torch.no_grad():
                    forward = median(lambda: call(backend=backend), clock)  # noqa: B023
                outputs = call(backend=backend)
                directions = [torch.randn_like(o) for o in outputs]
                backward = median(
                    lambda: torch.autograd.grad(outputs, tensors, directions, retain_graph=True),  # noqa: B023
                    clock,
                )
                times[backend] = forward, backward
            columns = [
                f"{native * 1e3:7.2f} ms {maps * size / native / 1e9:5.1f} GB/s {reference / native:5.1f}x"
                for native, reference, maps in zip(*times.values(), (forward_maps, backward_maps), strict=True)
            ]
            print(f"{name:30s} forward {columns[0]}   backward {columns[1]}")


if __name__ == "__main__":
    main()
