"""What a run shows: tables, pictures, what changed since another run, and the tables that the documentation quotes."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.table import Table

from dla.plots import STYLE

#: A table: headers, and lines of as many cells.
Cells = tuple[list[str], list[list[str]]]

TITLES = {
    "ops": "Ops against the bytes that they must move; rivals: their time over ours",
    "blocks": "A stage of four blocks; rivals: their time over ours",
    "models": "Whole networks; rivals: their time over ours",
    "depth": "A training step of a stage by its blocks; literal: its time over ours",
    "launches": "Ops that a block dispatches, forward + backward; time of a stage of four on maps of one pixel",
}


def p50(row: dict, rival: str) -> float | None:
    return row["seconds"][rival]["p50"] if rival in row["seconds"] else None


def ours(row: dict) -> str:
    return next(iter(row["seconds"]))


def ratio(row: dict, rival: str | None = None) -> float:
    """A rival's time, by default ours, over the base's."""
    return p50(row, rival or ours(row)) / p50(row, row["base"])


def bytes_per_s(row: dict) -> float | None:
    return row["facts"]["bytes"] / p50(row, ours(row)) or None


def of_copy(row: dict) -> float | None:
    """Bytes a second over those of a copy of the same map in the same round."""
    rate = bytes_per_s(row)
    return rate and rate / (2 * row["facts"]["map_bytes"] / p50(row, "copy"))


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _times(row: dict, rival: str) -> str:
    other = p50(row, rival)
    return "" if other is None else f"{other / p50(row, ours(row)):.2f}"


def _mebibytes(row: dict, fact: str) -> str:
    value = row["facts"].get(fact)
    return "" if value is None else f"{value / 2**20:.1f}"


def _measured(row: dict) -> str:
    """The median, and half of what lies between the 20th and the 80th percentile beside it."""
    times = row["seconds"][ours(row)]
    return f"{_milliseconds(times['p50'])} ±{(times['p80'] - times['p20']) / 2 / times['p50']:.0%}"


def _count(row: dict, form: str) -> str:
    return " + ".join(f"{row['facts'][f'ops {way}, {form}']}" for way in ("forward", "backward"))


def _over_ours(rivals: Sequence[str]) -> dict[str, Callable[[dict], str]]:
    return {name: lambda row, rival=name: _times(row, rival) for name in rivals}


def _memory(what: str) -> dict[str, Callable[[dict], str]]:
    return {
        f"{what} MiB": lambda row: _mebibytes(row, f"{what}, fused"),
        f"{what}, literal": lambda row: _mebibytes(row, f"{what}, literal"),
        f"{what}, plain": lambda row: _mebibytes(row, f"{what}, plain"),
    }


_MS = {"ms": _measured}
_OVER_PLAIN = {"over plain": lambda row: f"{p50(row, 'fused') / p50(row, 'plain'):.2f}"}
#: Columns of a question's table after its labels. Rivals by name alone: their time over ours.
COLUMNS: dict[str, dict[str, Callable[[dict], str]]] = {
    "ops": {
        "backend": ours,
        **_MS,
        "GB/s": lambda row: f"{bytes_per_s(row) / 1e9:.1f}" if bytes_per_s(row) else "",
        "of copy": lambda row: f"{of_copy(row):.0%}" if of_copy(row) else "",
        **_over_ours(["reference", "compiled", "triton", "native, CUDA graph", "triton, CUDA graph"]),
    },
    "blocks": _MS | _OVER_PLAIN | _over_ours(["reference", "literal", "compiled reference", "compiled literal"]),
    "models": {
        **_MS,
        "plain ms": lambda row: _milliseconds(p50(row, "plain")),
        **_OVER_PLAIN,
        **_over_ours(["reference", "literal", "compiled reference", "compiled plain"]),
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
}


def cells(rows: Iterable[dict], question: str) -> Cells:
    """The table of a question; columns that say nothing are left out."""
    rows = [row for row in rows if row["question"] == question]
    if not rows:
        return [], []
    labels = list(rows[0]["labels"])
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
            found[0] = f"WRONG: {row['error']}"
        lines.append([*map(str, row["labels"].values()), *found])
    return [*labels, *columns], lines


def tables(results: dict) -> list[Table]:
    """For the terminal."""
    found = []
    for question, title in TITLES.items():
        headers, lines = cells(results["rows"], question)
        if not lines:
            continue
        table = Table(title=title)
        for header in headers:
            table.add_column(header, justify="right" if header in COLUMNS[question] else "left")
        for line in lines:
            table.add_row(*line, style="red" if any(c.startswith("WRONG") for c in line) else None)
        found.append(table)
    return found


def markdown_table(results: dict, question: str) -> str:
    headers, lines = cells(results["rows"], question)
    return "\n".join("| " + " | ".join(line) + " |" for line in [headers, ["---"] * len(headers), *lines])


def limits_line(results: dict) -> str:
    limits, e = results["limits"], results["environment"]
    return (
        f"{e['device']}: copies {limits['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"multiplies matrices at {limits['flops_per_s'] / 1e9:.0f} GFLOP/s in float32. "
        f"dla-kernels {e['dla-kernels']}, commit {e['commit']}, torch {e['torch']}, {e['date']}, `{e['command']}`."
    )


def markdown(results: dict, pictures: Sequence[str]) -> str:
    parts = [f"# {results['environment']['device']}", limits_line(results), "Medians of interleaved runs."]
    parts += [f"![{name}]({name}.png)" for name in pictures]
    for question, title in TITLES.items():
        if any(row["question"] == question for row in results["rows"]):
            parts += [f"## {title}", markdown_table(results, question)]
    return "\n\n".join(parts) + "\n"


def write(results: dict, folder: Path) -> list[Path]:
    """Writes the pictures and ``bench.md`` beside ``bench.json``."""
    paths = []
    measured = [row for row in results["rows"] if "error" not in row]
    for name, draw in {"roofline": roofline, "speedup": speedups, "depth": depth_curves}.items():
        figure = draw(results | {"rows": measured})
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=200)
    path = folder / "bench.md"
    path.write_text(markdown(results, [p.stem for p in paths]))
    return [path, *paths]


@mpl.rc_context(STYLE)
def roofline(results: dict) -> Figure | None:
    """FLOPs a second over FLOPs a byte, of every op, under what this machine reached in the same run."""
    rows = [row for row in results["rows"] if row["question"] == "ops" and row["facts"]["bytes"]]
    if not rows:
        return None
    limits = results["limits"]
    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    axes = figure.subplots()
    points = [(r["facts"]["flops"] / r["facts"]["bytes"], r["facts"]["flops"] / p50(r, ours(r))) for r in rows]
    x = np.geomspace(min(p[0] for p in points) / 2, 2 * limits["flops_per_s"] / limits["copy_bytes_per_s"], 100)
    roof = np.minimum(x * limits["copy_bytes_per_s"], limits["flops_per_s"])
    axes.plot(x, roof, color="black", linewidth=1.3, marker="", zorder=1)
    axes.annotate(
        f"copy, {limits['copy_bytes_per_s'] / 1e9:.0f} GB/s", (x[8], roof[8]), rotation=0, fontsize=8,
        xytext=(-6, 2),
        ha="right", textcoords="offset points",
    )  # fmt: skip
    axes.annotate(
        f"matrix product, {limits['flops_per_s'] / 1e9:.0f} GFLOP/s", (x[-1], roof[-1]), ha="right", fontsize=8,
        xytext=(0, 4), textcoords="offset points",
    )  # fmt: skip
    names = list(dict.fromkeys(r["labels"]["op"] for r in rows))
    shapes = list(dict.fromkeys(r["labels"]["shape"] for r in rows))
    colors = [c["color"] for c in mpl.rcParams["axes.prop_cycle"]]
    markers = [c["marker"] for c in mpl.rcParams["axes.prop_cycle"]]
    for row, (intensity, rate) in zip(rows, points, strict=True):
        color = colors[names.index(row["labels"]["op"]) % len(colors)]
        axes.plot(
            intensity, rate, color=color, marker=markers[shapes.index(row["labels"]["shape"]) % len(markers)],
            markersize=6, fillstyle="full" if row["labels"][""] == "forward" else "none", linestyle="none",
        )  # fmt: skip
    handles = [
        mpl.lines.Line2D([], [], color=colors[i % len(colors)], marker="", linewidth=4) for i in range(len(names))
    ]
    labels = list(names)
    handles += [
        mpl.lines.Line2D([], [], color="grey", marker=markers[i % len(markers)], linestyle="none")
        for i in range(len(shapes))
    ]
    labels += shapes
    handles += [
        mpl.lines.Line2D([], [], color="grey", marker="o", fillstyle=f, linestyle="none") for f in ("full", "none")
    ]
    labels += ["filled: forward", "hollow: backward"]
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must move", ylabel="FLOP/s")
    axes.xaxis.set_major_locator(LogLocator(2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1e9:g} G"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.set_title(f"What the ops reach of what {results['environment']['device']} can")
    return figure


@mpl.rc_context(STYLE)
def speedups(results: dict) -> Figure | None:
    """Time beside the plain block's or network's, of ours and of the literal form or the reference."""
    groups = {q: [r for r in results["rows"] if r["question"] == q] for q in ("blocks", "models")}
    groups = {q: rows for q, rows in groups.items() if rows}
    if not groups:
        return None
    heights = [len(rows) for rows in groups.values()]
    figure = Figure(figsize=(6.4, 0.9 + 0.27 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (question, rows) in zip(panels, groups.items(), strict=True):
        names = [" ".join(map(str, (v for k, v in r["labels"].items() if k not in ("batch", "image")))) for r in rows]
        forms = [f for f in ("fused", "reference", "literal") if any(f in r["seconds"] for r in rows)]
        place = np.arange(len(rows))
        for i, form in enumerate(forms):
            values = [ratio(r, form) if form in r["seconds"] else np.nan for r in rows]
            bars = axes.barh(
                place + (i - (len(forms) - 1) / 2) * 0.8 / len(forms), values, 0.8 / len(forms), label=form
            )
            if form == "fused":
                axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_yticks(place, names, fontsize=7.5)
        axes.invert_yaxis()
        axes.set(title=TITLES[question].partition(";")[0], xlabel="time, plain = 1")
    handles = {name: h for axes in panels for h, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.suptitle(results["environment"]["device"], fontsize=9)
    return figure


@mpl.rc_context(STYLE)
def depth_curves(results: dict) -> Figure | None:
    """Time and peak memory of a training step over the blocks of a stage: linear, and the literal DLA-B's quadratic."""
    rows = [row for row in results["rows"] if row["question"] == "depth"]
    if not rows:
        return None
    figure = Figure(figsize=(6.4, 3.1), layout="constrained")
    for axes, (what, value) in zip(
        figure.subplots(1, 2),
        {
            "ms of a training step": lambda r, form: p50(r, form) * 1e3,
            "peak MiB of a training step": lambda r, form: r["facts"][f"peak, {form}"] / 2**20,
        }.items(),
        strict=True,
    ):
        for interaction in dict.fromkeys(r["labels"]["interaction"] for r in rows):
            some = [r for r in rows if r["labels"]["interaction"] == interaction]
            name = interaction.replace("_", "-").upper()
            for form in ("literal", "fused"):
                axes.plot(
                    [r["labels"]["blocks"] for r in some], [value(r, form) for r in some],
                    label=f"{name}, {form}", linewidth=1.3, markersize=4,
                )  # fmt: skip
        axes.plot(
            [r["labels"]["blocks"] for r in some], [value(r, "plain") for r in some],
            label="plain", linewidth=1.3, markersize=4, color="grey", linestyle="--",
        )  # fmt: skip
        axes.set(xlabel="blocks in the stage", ylabel=what, ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(loc="upper left")
    figure.suptitle(results["environment"]["device"], fontsize=9)
    return figure


def compare(before: dict, after: dict) -> list[tuple[str, float, float]]:
    """Name, then ours over the base, before and after, of every row that both runs have."""
    old = {row["name"]: row for row in before["rows"] if "error" not in row}
    return [
        (row["name"], ratio(old[row["name"]]), ratio(row))
        for row in after["rows"]
        if "error" not in row and row["name"] in old
    ]


def load(path: Path) -> dict:
    """A run's results.

    Raises:
        ValueError: the file is not there or not of a run.
    """
    try:
        results = json.loads(path.read_text())
        results["environment"], results["limits"], results["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of `dla bench` ({error})") from error
    return results


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
