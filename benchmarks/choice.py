"""Which of the fused backends is the faster one on a GPU? Writes ``dla_kernels/measured.py``, which "auto" follows.

``python -I -m dla.benchmarks.choice`` reads every ``benchmarks/results/<device>/bench.json``. An op's time is the
geometric mean over its rows, forward and backward, in which both backends were measured.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean

from dla.benchmarks.readings import p50
from dla.benchmarks.run import load

BACKENDS = ("native", "triton")
RESULTS, TARGET = Path("benchmarks/results"), Path("dla_kernels/measured.py")


def fastest(runs: Iterable[dict]) -> dict[str, dict[str, str]]:
    """{compute capability: {op: backend}} of the runs on GPUs; where two are of one capability, their rows together."""
    ratios = defaultdict(lambda: defaultdict(list))
    for results in runs:
        capability = results["environment"].get("capability")
        for row in results["rows"]:
            if capability is None or row["question"] != "ops" or "error" in row:
                continue
            native, triton = (p50(row, backend) for backend in BACKENDS)
            if native is not None and triton is not None:
                ratios[capability][row["labels"]["op"].partition("+")[0]].append(triton / native)
    return {
        capability: {op: BACKENDS[geometric_mean(found) < 1] for op, found in sorted(of_ops.items())}
        for capability, of_ops in sorted(ratios.items())
    }


def source(table: dict[str, dict[str, str]]) -> str:
    """The module that holds it."""
    lines = [line for capability, of_ops in table.items() for line in (
        f'    "{capability}": {{', *(f'        "{op}": "{backend}",' for op, backend in of_ops.items()), "    },",
    )]  # fmt: skip
    body = "\n".join(["{", *lines, "}"]) if lines else "{}"
    return f'''"""Which fused backend was measured to be the faster one on a GPU. Written by ``make tables``."""

#: {{compute capability: {{op: backend}}}}, from ``benchmarks/results/``. What is not there has no figures.
FASTEST: dict[str, dict[str, str]] = {body}
'''


def main() -> None:
    now = source(fastest(load(path) for path in sorted(RESULTS.glob("*/bench.json"))))
    if TARGET.read_text() != now:  # else the package would be built anew
        TARGET.write_text(now)


if __name__ == "__main__":
    main()
