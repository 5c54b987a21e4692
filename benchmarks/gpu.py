"""Everything that needs a GPU, piece by piece: tests, compute-sanitizer, then what the ops cost.

``python benchmarks/gpu.py [PIECE ...]`` runs the pieces that have no result of this commit yet, each in a process of
its own that ends within ten minutes, and writes ``benchmarks/results/<device>/<piece>.json`` and ``summary.md`` after
every piece; stopped, it goes on from there. Without a GPU it says so and lists what was not run.
"""

import argparse
import datetime
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import dla_kernels
from dla_kernels import native

ROOT = Path(__file__).parents[1]
LIMIT_S = 590
TESTS = "tests/test_dla_kernels/test_cuda.py"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: Rows for compute-sanitizer, under which everything is many times slower.
SMALL = "test_matches_the_reference and (float32 or bfloat16) and not more_planes and not runs"


def pytest_command(*options: str) -> list[str]:
    # The program, as `python -m pytest` would import the source tree instead of the installed package.
    program = Path(sys.executable).with_name("pytest")
    return [sys.executable, str(program), "-q", "-x", "-p", "no:cacheprovider", *options]


def pieces() -> dict[str, list[str]]:
    """The command of every piece; it succeeds with exit status 0."""
    found = {
        "tests": pytest_command(TESTS, "-m", "not slow"),
        "networks": pytest_command(TESTS, "-k", "test_network"),
        "large_maps": pytest_command(TESTS, "-k", "2_to_31"),
    }
    sanitizer = shutil.which("compute-sanitizer")
    for tool in SANITIZERS if sanitizer else ():
        command = [sanitizer, "--tool", tool, "--error-exitcode", "3", "--launch-timeout", "120"]
        for op in OPS:
            found[f"{tool}_{op}"] = [*command, *pytest_command(TESTS, "-k", f"{SMALL} and {op}")]
    for op in OPS:
        found[f"ops_{op}"] = [sys.executable, __file__, "--measure", op]
    return found


#: Layers of the stage that stands for layer_attention.
T = 4
#: Maps that an op must move, forward and backward, in training: every input read once in every pass that needs it,
#: every output written once.
MAPS = {
    "gap_dsu": (1, 0),
    "layer_attention": (T * (T + 1) // 2 + 4 * T, T * (T + 6)),
    "light_update": (6, 8),
    "norm_residual": (4, 6),
    "refresh_gates": (0, 0),
}
OPS = tuple(MAPS)
#: CIFAR's first stage, then ImageNet's four.
SHAPES = ((128, 64, 32, 32), (64, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7))


def seconds(function, repeats: int = 20) -> dict[str, float]:
    """Percentiles of a call's time on the device, captured in a graph so that launches by the host do not count."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    times = sorted(times[3:])
    return {f"p{p}": times[round(p / 100 * (len(times) - 1))] for p in (20, 50, 80)}


def copy_rate() -> float:
    """Bytes a second of a copy of 1 GiB: the peak that the ops are measured against."""
    source = torch.empty(2**28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))["p50"]


def measure(op: str) -> list[dict]:
    """Forward and gradient of ``op`` at all shapes, beside the reference, plain and compiled."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_dla_kernels.cases import MAKE

    options = {"T": T} if op in ("layer_attention", "refresh_gates") else {}
    peak, rows = copy_rate(), []
    for shape, dtype, layout, backend in itertools.product(
        SHAPES, (torch.bfloat16, torch.float32), ("planes", "rows"), ("native", "reference", "compiled reference")
    ):
        with torch.device("cuda"):
            call = MAKE[op](*shape, dtype, layout, **options)
        run = functools.partial(call.function, backend=backend.split()[-1])
        if backend.startswith("compiled"):
            torch._dynamo.reset()
            run = torch.compile(run)
        tensors, wanted = list(call.tensors.values()), list(call.differentiable.values())
        directions = [torch.randn_like(o) for o in run(*tensors)]

        def forward(run=run, tensors=tensors):
            with torch.no_grad():
                run(*tensors)

        def both(run=run, tensors=tensors, wanted=wanted, directions=directions):
            torch.autograd.grad(run(*tensors), wanted, directions)

        for kind, function, maps in (("forward", forward, MAPS[op][0]), ("with gradient", both, sum(MAPS[op]))):
            time_s = seconds(function)
            rate = maps * torch.Size(shape).numel() * dtype.itemsize / time_s["p50"]
            rows.append(
                {
                    "op": op,
                    "shape": shape,
                    "dtype": str(dtype).removeprefix("torch."),
                    "layout": "NCHW" if layout == "planes" else "channels_last",
                    "backend": backend,
                    "kind": kind,
                    **time_s,
                    "maps": maps,
                    "bytes_per_s": rate,
                    "of_copy": rate / peak,
                }
            )
    return rows


def environment() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.split("\n")[0]
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **native.build_info(),
    }


def summary(folder: Path) -> str:
    """The results as Markdown: what passed, then milliseconds and GB/s of the ops."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not results:
        return ""
    lines = [f"# {results[0]['environment']['device']}", ""]
    for result in results:
        e = result["environment"]
        lines.append(
            f"- {result['piece']}: {'passed' if result['passed'] else 'FAILED'} in {result['seconds']:.0f} s, "
            f"{e['date']}, commit {e['commit'][:9]}, torch {e['torch']}, driver {e['driver']}"
        )
    rows = [row for result in results if result["passed"] for row in result.get("rows", [])]
    if rows:
        lines += ["", "| op | shape | dtype | layout | kind | backend | ms | GB/s | of a copy |", "|" + " --- |" * 9]
        lines += [
            f"| {r['op']} | {'x'.join(map(str, r['shape']))} | {r['dtype']} | {r['layout']} | {r['kind']} | "
            f"{r['backend']} | {r['p50'] * 1e3:.3f} | {r['bytes_per_s'] / 1e9:.0f} | {r['of_copy']:.0%} |"
            for r in rows
        ]
    return "\n".join(lines) + "\n"


def run_piece(name: str, command: list[str], folder: Path) -> bool:
    start = time.monotonic()
    rows_path = folder / f"{name}.rows"
    try:
        done = subprocess.run(
            command, cwd=ROOT, timeout=LIMIT_S, capture_output=True, text=True,
            env=os.environ | {"DLA_ROWS": str(rows_path)},
        )  # fmt: skip
        passed, output = done.returncode == 0, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        passed, output = False, f"{error.stdout}\nstopped after {LIMIT_S} s"
    result = {
        "piece": name,
        "passed": passed,
        "seconds": time.monotonic() - start,
        "environment": environment(),
        "output": output[-4000:],
    }
    if rows_path.exists():
        result["rows"] = json.loads(rows_path.read_text())
        rows_path.unlink()
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "summary.md").write_text(summary(folder))
    print(f"{name}: {'passed' if passed else 'FAILED'} in {result['seconds']:.0f} s", flush=True)
    return passed


def done_before(path: Path) -> bool:
    if not path.exists():
        return False
    result = json.loads(path.read_text())
    return result["passed"] and result["environment"]["commit"] == environment()["commit"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", help="by default all")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    known = pieces()
    asked = {name: known[name] for name in args.pieces or known}
    reason = native.CUDA_ERROR if torch.cuda.is_available() else "torch finds no GPU here"
    if reason is not None:
        print(f"Nothing was run: {reason}. Not run:")
        print("\n".join(f"  {name}: {' '.join(command)}" for name, command in asked.items()))
        if shutil.which("compute-sanitizer") is None:
            print("  compute-sanitizer: it is not on the PATH")
        return 0
    if args.measure:
        Path(os.environ["DLA_ROWS"]).write_text(json.dumps(measure(args.measure)))
        return 0
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder = ROOT / "benchmarks" / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    print(f"dla-kernels {dla_kernels.__version__} on {torch.cuda.get_device_name()}")
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on the PATH: its pieces are not run")
    passed = [run_piece(n, c, folder) for n, c in asked.items() if not done_before(folder / f"{n}.json")]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
