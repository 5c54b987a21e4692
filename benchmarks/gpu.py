"""Everything that needs a GPU, piece by piece: tests, compute-sanitizer, then the benchmarks.

``python benchmarks/gpu.py [PIECE ...]`` runs the pieces that have not passed at this commit yet, each in a process of
its own that ends within ten minutes, and writes ``checks.json`` and ``checks.md`` into ``benchmarks/results/<device>/``
after every piece; stopped, it goes on from there. Without a GPU it says so and lists what was not run.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import dla_kernels
from dla.benchmarks.run import QUESTIONS, environment, slug
from dla_kernels import native

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIMIT_S = 590
TESTS = "tests/test_dla_kernels/test_cuda.py"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
OPS = tuple(dla_kernels.ops.__all__)
#: Rows for compute-sanitizer, under which everything is many times slower.
SMALL = "test_matches_the_reference and (float32 or bfloat16) and not more_planes and not runs"


def program(name: str) -> list[str]:
    # The program, as `python -m` would import the source tree instead of the installed package.
    return [sys.executable, str(Path(sys.executable).with_name(name))]


def pieces() -> dict[str, list[str]]:
    """The command of every piece; it succeeds with exit status 0."""
    pytest = [*program("pytest"), "-q", "-x", "-p", "no:cacheprovider", TESTS]
    bench = [*program("dla"), "bench", "--device", "cuda", "--resume", "--out", str(RESULTS)]
    found = {
        "tests": [*pytest, "-m", "not slow"],
        "networks": [*pytest, "-k", "test_network"],
        "large_maps": [*pytest, "-k", "2_to_31"],
    }
    # Each of them compiles hundreds of kernels.
    triton = ["env", "DLA_KERNELS_AUTOTUNE=0", *pytest[:-1], "tests/test_dla_kernels/test_triton.py"]
    found |= {f"triton_{op}": [*triton, "-m", "not slow", "-k", op] for op in OPS}
    found["triton_others"] = [*triton, "-k", " and ".join(f"not {op}" for op in OPS)]
    sanitizer = shutil.which("compute-sanitizer")
    for tool in SANITIZERS if sanitizer else ():
        command = [sanitizer, "--tool", tool, "--error-exitcode", "3", "--launch-timeout", "120"]
        for op in OPS:
            found[f"{tool}_{op}"] = [*command, *pytest, "-k", f"{SMALL} and {op}"]
    return found | {f"bench_{question}": [*bench, question] for question in QUESTIONS}


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]


def run_piece(command: list[str], env: dict[str, str]) -> dict:
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=LIMIT_S, capture_output=True, text=True)
        passed, output = done.returncode == 0, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        passed, output = False, f"{error.stdout}\nstopped after {LIMIT_S} s"
    return {"passed": passed, "seconds": time.monotonic() - start, "environment": env, "output": output[-4000:]}


def summary(results: dict[str, dict]) -> str:
    """What passed, as Markdown."""
    lines = [f"# {next(iter(results.values()))['environment']['device']}", ""]
    for piece, result in results.items():
        e = result["environment"]
        lines.append(
            f"- {piece}: {'passed' if result['passed'] else 'FAILED'} in {result['seconds']:.0f} s, {e['date']}, "
            f"commit {e['commit']}, torch {e['torch']}, driver {e['driver']}"
        )
    return "\n".join(lines) + "\n"


def run(asked: dict[str, list[str]], folder: Path, env: dict[str, str]) -> bool:
    """Runs the pieces that have not passed at this commit; whether all have in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    path, bench = folder / "checks.json", folder / "bench.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if bench.exists() and json.loads(bench.read_text())["environment"]["commit"] != env["commit"]:
        bench.unlink()  # the pieces of another commit do not go on from there
    for name, command in asked.items():
        before = results.get(name)
        if before and before["passed"] and before["environment"]["commit"] == env["commit"]:
            continue
        results[name] = run_piece(command, env)
        path.write_text(json.dumps(results, indent=1) + "\n")
        (folder / "checks.md").write_text(summary(results))
        print(
            f"{name}: {'passed' if results[name]['passed'] else 'FAILED'} in {results[name]['seconds']:.0f} s",
            flush=True,
        )
    return all(results[name]["passed"] for name in asked)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", choices=[[], *pieces()], help="by default all", metavar="PIECE")
    args = parser.parse_args()
    asked = {name: command for name, command in pieces().items() if name in (args.pieces or pieces())}
    reason = native.CUDA_ERROR if torch.cuda.is_available() else "torch finds no GPU here"
    no_sanitizer = "compute-sanitizer is not on the PATH: its pieces are not run"
    if reason is not None:
        print(f"Nothing was run: {reason}. Not run:")
        print("\n".join(f"  {name}: {' '.join(command)}" for name, command in asked.items()))
        if shutil.which("compute-sanitizer") is None:
            print(f"  {no_sanitizer}")
        return 0
    device = torch.device("cuda:0")
    print(f"dla-kernels {dla_kernels.__version__} on {torch.cuda.get_device_name()}")
    if shutil.which("compute-sanitizer") is None:
        print(no_sanitizer)
    return 0 if run(asked, RESULTS / slug(device), environment(device) | {"driver": driver()}) else 1


if __name__ == "__main__":
    raise SystemExit(main())
