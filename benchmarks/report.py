"""What a run shows: tables, what changed since another run, and the tables that the documentation quotes."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table

from dla.benchmarks import pictures
from dla.benchmarks.readings import (
    ANOTHER,
    DISTURBED,
    elsewhere,
    met,
    moved,
    of_copy,
    of_limit,
    ours,
    p50,
    ratio,
    reached,
    spread,
    unrest,
)
from dla.benchmarks.run import load

#: A table: what all its lines have in common, headers, and lines of as many cells.
Cells = tuple[str, list[str], list[list[str]]]

TITLES = {
    "ops": "Ops against the bytes that they must move; rivals: their time over ours",
    "blocks": "A stage of four blocks; rivals: their time over ours",
    "models": "Whole networks; rivals: their time over ours",
    "depth": "A training step of a stage by its blocks; literal: its time over ours",
    "launches": "Ops that a block dispatches, forward + backward; time of a stage of four on maps of one pixel",
    "floors": "What a GPU must reach",
}
#: Labels that a question's tables are parted by.
APART = {
    "ops": ("shape", "dtype", "layout"),
    "blocks": ("stage",),
    "models": ("batch", "image"),
    "depth": ("interaction",),
}


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _times(row: dict, rival: str) -> str:
    if rival in row.get("failed", {}):
        return "failed"
    return f"{row['over_ours'][rival]:.2f}" if rival in row["over_ours"] else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _mebibytes(row: dict, fact: str) -> str:
    value = row["facts"].get(fact)
    return "" if value is None else f"{value / 2**20:.3g}"


def _measured(row: dict) -> str:
    return f"{_milliseconds(p50(row, ours(row)))} ±{spread(row, ours(row)):.0%}"


def _count(row: dict, form: str) -> str:
    return "+".join(f"{row['facts'][f'ops {way}, {form}']}" for way in ("forward", "backward"))


def _over_ours(rivals: Sequence[str]) -> dict[str, Callable[[dict], str]]:
    return {name: lambda row, rival=name: _times(row, rival) for name in rivals}


def _memory(what: str) -> dict[str, Callable[[dict], str]]:
    return {
        f"{what} MiB": lambda row: _mebibytes(row, f"{what}, fused"),
        f"{what}, literal": lambda row: _mebibytes(row, f"{what}, literal"),
        f"{what}, plain": lambda row: _mebibytes(row, f"{what}, plain"),
    }


_MS = {"ms": _measured}
_OVER_PLAIN = {"over plain": lambda row: f"{1 / row['over_ours']['plain']:.2f}"}
_COMPILED = ["compiled fused", "compiled plain", "compiled reference", "compiled literal"]
#: Columns of a question's table after its labels. Rivals by name alone: their time over ours.
COLUMNS: dict[str, dict[str, Callable[[dict], str]]] = {
    "ops": {
        **_MS,
        "GB/s": lambda row: f"{moved(row) / p50(row, ours(row)) / 1e9:.1f}" if moved(row) else "",
        "of copy": lambda row: _percent(of_copy(row)),
        "at least": lambda row: _percent(row["facts"].get("goal")),
        "of limit": lambda row: _percent(of_limit(row)),
        **_over_ours(["reference", "compiled", "triton", "native, CUDA graph", "triton, CUDA graph"]),
    },
    "blocks": _MS | _OVER_PLAIN | _over_ours(["reference", "literal", *_COMPILED]),
    "models": {
        **_MS,
        "plain ms": lambda row: _milliseconds(p50(row, "plain")),
        **_OVER_PLAIN,
        "at most": lambda row: f"{row['facts']['goal']:.2f}" if "goal" in row["facts"] else "",
        **_over_ours(["reference", "literal", *_COMPILED]),
    },
    "depth": _MS | _OVER_PLAIN | _over_ours(["literal"]) | _memory("saved") | _memory("peak"),
    "launches": {
        "kernels": lambda row: str(row["facts"].get("kernels, fused", "")),
        "kernels, literal": lambda row: str(row["facts"].get("kernels, literal", "")),
        "ops": lambda row: _count(row, "fused"),
        "ops, plain": lambda row: _count(row, "plain"),
        "ops, literal": lambda row: _count(row, "literal") if "literal" in row["seconds"] else "",
        **_MS,
        **_OVER_PLAIN,
        **_over_ours(["literal"]),
    },
    "floors": {
        **_MS,
        "reached": lambda row: f"{reached(row):.3g} {row['facts']['unit']}",
        "asked": lambda row: f"{'≤' if row['facts']['is_most'] else '≥'} {row['facts']['asked']:g}",
        "launches": lambda row: str(row["facts"].get("launches", "")),
        "met": lambda row: "yes" if met(row) else "no",
    },
}


def cells(rows: Iterable[dict], question: str) -> list[Cells]:
    """The tables of a question; columns that say nothing are left out, and what all lines share is the tables' name."""
    parts: dict[str, list[dict]] = {}
    for row in (row for row in rows if row["question"] == question):
        shared = [(k, row["labels"][k]) for k in APART.get(question, ())]
        name = ", ".join(v if isinstance(v, str) else f"{k} {v}" for k, v in shared)
        if question == "ops" and "error" not in row:
            name += f", {ours(row)}"
        parts.setdefault(name, []).append(row)
    return [(name, *_cells(part, question)) for name, part in parts.items()]


def _cells(rows: list[dict], question: str) -> tuple[list[str], list[list[str]]]:
    labels = [name for name in rows[0]["labels"] if name not in APART.get(question, ())]
    columns = {
        name: [("" if "error" in row else cell(row)) for row in rows] for name, cell in COLUMNS[question].items()
    }
    # An error stands in the first.
    kept = next(iter(columns)) if any("error" in row for row in rows) else None
    columns = {name: column for name, column in columns.items() if any(column) or name == kept}
    lines = []
    for i, row in enumerate(rows):
        found = [column[i] for column in columns.values()]
        if "error" in row:
            found[0] = row["error"]
        lines.append([*(str(row["labels"][name]) for name in labels), *found])
    return [*labels, *columns], lines


def tables(results: dict) -> list[Table]:
    """For the terminal."""
    found = []
    for question, title in TITLES.items():
        for i, (name, headers, lines) in enumerate(cells(results["rows"], question)):
            heading = "\n".join(filter(None, [title.replace("; ", "\n") * (i == 0), name]))
            table = Table(title=heading, box=box.SIMPLE_HEAD, padding=0)
            for header in headers:
                # Headers are broken, so that lines need not be.
                number = header in COLUMNS[question]
                table.add_column(header.replace(" ", "\n") if number else header, justify="right" if number else "left")
            errors = [row["error"] for row in results["rows"] if "error" in row]
            for line in lines:
                table.add_row(*line, style="red" if any(c in errors for c in line) else None)
            found.append(table)
    return found


def notes(results: dict) -> list[str]:
    """What the tables leave to be said: goals, rows that were disturbed, and rivals that could not run."""
    rows = [row for row in results["rows"] if "error" not in row]
    held = [m for row in rows if (m := met(row)) is not None]
    lines = [f"{sum(held)} of {len(held)} goals (at least, at most) are met."] if held else []
    if disturbed := sum(unrest(row) > DISTURBED for row in rows):
        lines.append(f"{disturbed} of {len(rows)} rows spread by more than {DISTURBED:.0%}: the machine was busy.")
    if other := sum(abs(elsewhere(row, rows)) > ANOTHER for row in rows):
        lines.append(f"{other} of {len(rows)} rows met a machine that copied over {ANOTHER:.0%} faster or slower.")
    failed = {(name, why) for row in rows for name, why in row.get("failed", {}).items()}
    return lines + [f"{name} failed: {why}" for name, why in sorted(failed)]


def markdown_table(results: dict, question: str) -> str:
    parts = []
    for name, headers, lines in cells(results["rows"], question):
        parts += [f"**{name}**"] if name else []
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in [headers, ["---"] * len(headers), *lines]))
    return "\n\n".join(parts)


def limits_line(results: dict) -> str:
    limits, e = results["limits"], results["environment"]
    fresh = limits.get("fresh_copy_bytes_per_s")
    return (
        f"{e['device']}: copies {limits['copy_bytes_per_s'] / 1e9:.1f} GB/s"
        + (f" ({fresh / 1e9:.1f} into memory new to the process)" if fresh else "")
        + f", reads {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"multiplies matrices at {limits['flops_per_s'] / 1e9:.0f} GFLOP/s in float32. "
        f"dla-kernels {e['dla-kernels']}, commit {e['commit']}, torch {e['torch']}, {e['date']}, "
        f"memory {e['memory']}, `{e['command']}`."
    )


def markdown(results: dict, drawn: Sequence[str]) -> str:
    parts = [f"# {results['environment']['device']}", limits_line(results), "Medians of interleaved runs."]
    parts += notes(results)
    parts += [f"![{name}]({name}.png)" for name in drawn]
    for question, title in TITLES.items():
        if any(row["question"] == question for row in results["rows"]):
            parts += [f"## {title}", markdown_table(results, question)]
    return "\n\n".join(parts) + "\n"


def write(results: dict, folder: Path) -> list[Path]:
    """Writes the pictures and ``bench.md`` beside ``bench.json``."""
    paths = []
    measured = [row for row in results["rows"] if "error" not in row]
    for name, draw in pictures.DRAW.items():
        figure = draw(results | {"rows": measured})
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)  # an earlier run's
        else:
            paths.append(path)
            figure.savefig(path, dpi=200)
    path = folder / "bench.md"
    path.write_text(markdown(results, [p.stem for p in paths]))
    return [path, *paths]


class Change(NamedTuple):
    """What differs between two runs in one row.

    Attributes:
        copies: how much more time a copy took, where the row met another machine: then a time says nothing of ours.
        worse: whether it is ours that got worse.
    """

    name: str
    what: str
    before: str
    after: str
    change: str
    copies: str
    worse: bool


def compare(before: dict, after: dict, threshold: float) -> tuple[list[Change], int]:
    """What changed by more than the threshold, and of how many rows: time over the base's, and what can be counted.

    Raises:
        ValueError: the runs have no row in common.
    """
    old = {row["name"]: row for row in before["rows"]}
    rows = [(old[row["name"]], row) for row in after["rows"] if row["name"] in old]
    if not rows:
        raise ValueError("the two runs have no row in common")
    changes = []
    for was, now in rows:
        if "error" in was or "error" in now:
            if was.get("error") != now.get("error"):
                words = [row.get("error", "measured") for row in (was, now)]
                changes.append(Change(now["name"], "result", *words, "", "", "error" in now))
            continue
        slower = elsewhere(now, [was])
        another = f"{slower:+.0%}" if abs(slower) > ANOTHER else ""
        counted = {k: (was["facts"][k], now["facts"][k]) for k in now["facts"] if _counted(k) and k in was["facts"]}
        for what, (a, b) in {f"time over {now['base']}'s": (ratio(was), ratio(now)), **counted}.items():
            if abs(b - a) > threshold * a:
                change, copies = f"{b / a - 1:+.0%}" if a else "", "" if what in counted else another
                changes.append(Change(now["name"], what, f"{a:.3g}", f"{b:.3g}", change, copies, b > a and not copies))
    return changes, len(rows)


def _counted(fact: str) -> bool:
    """Whether less of it is better: bytes and launches of ours."""
    return fact.endswith(", fused")


#: ``<!-- bench results/NAME/bench.json QUESTION -->`` and the table up to ``<!-- /bench -->``.
_QUOTED = re.compile(r"(<!-- bench (\S+) (\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def quoted(text: str, folder: Path) -> str:
    """A document with the tables it quotes as the results under ``folder`` have them now."""

    def table(match: re.Match) -> str:
        results, what = load(folder / match[2]), match[3]
        body = limits_line(results) if what == "limits" else markdown_table(results, what)
        return f"{match[1]}\n{body}\n\n{match[4]}"

    return _QUOTED.sub(table, text)


def main() -> None:
    """``python -m dla.benchmarks.report FILE ...`` brings the tables that documents quote up to date."""
    import sys

    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(quoted(path.read_text(), Path("benchmarks")))


if __name__ == "__main__":
    main()
