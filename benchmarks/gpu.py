"""Everything that needs a GPU, piece by piece: tests, compute-sanitizer, then the benchmarks.

``python benchmarks/gpu.py [PIECE ...]`` runs the pieces that have not passed at this commit yet, each in a process of
its own that ends within ten minutes, and writes ``checks.json`` and ``checks.md`` into ``OUT/<device>/`` after every
piece; stopped, or out of its ``--minutes``, it goes on from there. Without a GPU it says so and lists what was not run.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import dla_kernels
from dla.benchmarks import report
from dla.benchmarks.run import QUESTIONS, environment, slug
from dla_kernels import native

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIMIT_S = 590
#: Files of tests that take --device: the ops', and the models'.
OPS_TESTS = ("fused", "fused_pytorch", *dla_kernels.ops.__all__)
MODEL_TESTS = ("cells", "stage", "resnet", "pytorch", "fuse", "insert")
#: compute-sanitizer's tools and what each is told. A filter keeps to our own kernels, all in the namespace dla;
#: initcheck has to see who else writes.
ONLY_OURS = ("--kernel-name", "kernel_substring=3dla")
SANITIZERS = {"memcheck": ONLY_OURS, "racecheck": ONLY_OURS, "synccheck": ONLY_OURS, "initcheck": ()}
#: A program of this Python, as `python -m` would run it, but without the folder that it is started in: there lies the
#: source tree, which the installed package comes before.
RUN_MODULE = "import runpy, sys; sys.path = [p for p in sys.path if p]; sys.argv = sys.argv[1:]; runpy.run_module"


class Piece(NamedTuple):
    """A command, which succeeds with exit status 0, and what its environment has beside ours."""

    command: list[str]
    variables: dict[str, str]

    def __str__(self) -> str:
        """As it would be typed."""
        words = ["python" if word == sys.executable else word for word in self.command]
        if words[1] == "-c":
            words[1:3] = ["-m"]
        return shlex.join([*(f"{name}={value}" for name, value in self.variables.items()), *words])


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", f"{RUN_MODULE}('{name}', run_name='__main__', alter_sys=True)", name, *arguments]


def pieces(out: Path = RESULTS) -> dict[str, Piece]:
    """By name, in the order in which they are run."""
    # Before cuBLAS is asked for the same bits every time, it wants to know its workspace.
    variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "DLA_KERNELS_AUTOTUNE": "0"}

    def pytest(path: str, *options: str, workers: int = min(12, os.cpu_count() or 1)) -> Piece:
        common = ("-q", "--maxfail", "20", "-n", str(workers), "-p", "no:cacheprovider", "-p", "no:benchmark")
        return Piece(module("pytest", *common, f"tests/{path}", *options), variables)

    found = {"graphs_streams_devices": pytest("test_dla_kernels/test_cuda.py", "-m", "not slow")}
    for name in OPS_TESTS:
        found[f"ops_{name}"] = pytest(f"test_dla_kernels/test_{name}.py", "--device", "cuda")
    for name in MODEL_TESTS:
        found[f"models_{name}"] = pytest(f"test_dla/test_{name}.py", "--device", "cuda")
    found["large_maps"] = pytest("test_dla_kernels/test_cuda.py", "-m", "slow", workers=0)  # one takes most of a GPU
    # Each of them compiles hundreds of kernels.
    triton, ops = ("test_dla_kernels/test_triton.py", "-m", "not slow", "-k"), dla_kernels.ops.__all__
    found |= {f"triton_{op}": pytest(*triton, op) for op in ops}
    found["triton_others"] = pytest(*triton, " and ".join(f"not {op}" for op in ops))
    sanitizer = shutil.which("compute-sanitizer")
    for tool, options in SANITIZERS.items() if sanitizer else ():
        command = [sanitizer, "--tool", tool, "--error-exitcode", "3", *options]
        script = [sys.executable, "tests/sanitized.py"]
        # A tensor's memory is its own, so that what lies beside it belongs to no one.
        alone = variables | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found[f"{tool}_planted"] = Piece([*script, "planted", *command], alone)
        for op in dla_kernels.ops.__all__:
            found[f"{tool}_{op}"] = Piece([*command, *script, "cuda", op], alone)
    bench = ("bench", "--device", "cuda", "--resume", "--out", str(out))
    return found | {f"bench_{q}": Piece(module("dla.cli", *bench, q), {}) for q in ("floors", *QUESTIONS)}


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]


def run_piece(piece: Piece, env: dict[str, str], limit_s: float) -> dict:
    start = time.monotonic()
    # In a session of its own: what it started ends with it.
    process = subprocess.Popen(
        piece.command, cwd=ROOT, env=os.environ | piece.variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit_s)
        passed, stopped = process.returncode == 0, False
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        passed, stopped = False, True
        output += f"\nstopped after {limit_s:.0f} s"
    seconds = time.monotonic() - start
    return {"passed": passed, "stopped": stopped, "seconds": seconds, "environment": env, "output": output[-4000:]}


def words(result: dict) -> str:
    state = "passed" if result["passed"] else "STOPPED" if result["stopped"] else "FAILED"
    return f"{state} after {result['seconds']:.0f} s" if result["stopped"] else f"{state} in {result['seconds']:.0f} s"


def summary(results: dict[str, dict], not_run: list[str], bench: dict | None = None) -> str:
    """What passed and what was not run, as Markdown, and what was asked of this GPU."""
    lines = [f"# {next(iter(results.values()))['environment']['device']}", ""]
    for piece, result in results.items():
        e = result["environment"]
        versions = f"torch {e['torch']}, CUDA {e['cuda']}, driver {e['driver']}"
        lines.append(f"- {piece}: {words(result)}, {e['date']}, commit {e['commit']}, {versions}")
    if not_run:
        lines += ["", f"Not run at this commit: {', '.join(not_run)}."]
    if bench is not None and any(row["question"] == "floors" for row in bench["rows"]):
        lines += ["", f"## {report.TITLES['floors']}", "", report.markdown_table(bench, "floors")]
    return "\n".join(lines) + "\n"


def run(asked: dict[str, Piece], folder: Path, env: dict[str, str], until: float = float("inf")) -> bool:
    """Runs the pieces that have not passed at this commit, up to a time of the clock; whether all have in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    path, bench = folder / "checks.json", folder / "bench.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if bench.exists() and json.loads(bench.read_text())["environment"]["commit"] != env["commit"]:
        bench.unlink()  # the pieces of another commit do not go on from there

    def passed(name: str) -> bool:
        return name in results and results[name]["passed"] and results[name]["environment"]["commit"] == env["commit"]

    for name, piece in asked.items():
        if passed(name):
            continue
        left = until - time.monotonic()
        if left < 1:
            print(f"{name}: not run, the time is over; run again to go on", flush=True)
            break
        results[name] = run_piece(piece, env, min(LIMIT_S, left))
        path.write_text(json.dumps(results, indent=1) + "\n")
        measured = json.loads(bench.read_text()) if bench.exists() else None
        missing = [n for n in asked if n not in results or results[n]["environment"]["commit"] != env["commit"]]
        (folder / "checks.md").write_text(summary(results, missing, measured))
        print(f"{name}: {words(results[name])}", flush=True)
        if not results[name]["passed"]:
            print(results[name]["output"], flush=True)
    return all(passed(name) for name in asked)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help="by default all; one may be the start of several")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then, to go on another time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: benchmarks/results")
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    known = pieces(args.out.resolve())
    for start in args.pieces:
        if not any(name.startswith(start) for name in known):
            parser.error(f"PIECE must be, or be the start of, one of {', '.join(known)}, got {start!r}")
    asked = {name: piece for name, piece in known.items() if name.startswith(tuple(args.pieces) or "")}
    device = torch.device("cuda:0")
    reason = native.why_not(device) if torch.cuda.is_available() else "torch finds no GPU here"
    without = [] if shutil.which("compute-sanitizer") else [f"{tool}: no compute-sanitizer" for tool in SANITIZERS]
    if reason is not None:
        print(f"Nothing was run: {reason}. Not run:")
        print("\n".join(f"  {name}: {piece}" for name, piece in asked.items()))
        print("\n".join(f"  {line}" for line in without))
        return 0
    print(f"dla-kernels {dla_kernels.__version__} on {torch.cuda.get_device_name()}")
    print("\n".join(f"not run: {line}" for line in without))
    return 0 if run(asked, args.out / slug(device), environment(device) | {"driver": driver()}, until) else 1


if __name__ == "__main__":
    raise SystemExit(main())
