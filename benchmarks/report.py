"""What a run shows: tables, pictures, what changed since another run, and the tables that the documentation quotes."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich import box
from rich.table import Table

from dla.benchmarks.run import load
from dla.plots import STYLE

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
#: A spread that tells of other work on the machine.
DISTURBED = 0.25
#: Labels that a question's tables are parted by.
APART = {
    "ops": ("shape", "dtype", "layout"),
    "blocks": ("stage",),
    "models": ("batch", "image"),
    "depth": ("interaction",),
}


def p50(row: dict, rival: str) -> float | None:
    return row["seconds"][rival]["p50"] if rival in row["seconds"] else None


def ours(row: dict) -> str:
    return next(iter(row["seconds"]))


def ratio(row: dict, rival: str | None = None) -> float:
    """A rival's time, by default ours, over the base's."""
    return row["over_ours"][rival or ours(row)] / row["over_ours"][row["base"]]


def moved(row: dict) -> int:
    """Bytes that an op must move."""
    return (row["facts"]["reads"] + row["facts"]["writes"]) * row["facts"]["map_bytes"]


def of_copy(row: dict) -> float | None:
    """Bytes a second over those of a copy of such a map into a new tensor, in the same rounds."""
    if not moved(row):
        return None
    return moved(row) / (2 * row["facts"]["map_bytes"]) * row["over_ours"]["copy"]


def of_limit(row: dict) -> float | None:
    """What the reads take at the rate of a sum, and the writes at that of a copy less its reads, over our time."""
    if not moved(row):
        return None
    read, copy = row["over_ours"]["read"], row["over_ours"]["copy"]
    return row["facts"]["reads"] * read + row["facts"]["writes"] * max(0, copy - read)


def reached(row: dict) -> float:
    """What a row of ``floors`` is measured by: see that file."""
    facts, over_ours = row["facts"], row["over_ours"]
    match facts["unit"]:
        case "of copy":
            return of_copy(row)
        case "x two launches":
            return 1 / (2 * over_ours["empty"] + facts["bytes"] / (2 * facts["map_bytes"]) * over_ours["copy"])
        case "x as fast":
            return over_ours[row["base"]]
        case "x the time":
            return 1 / over_ours[row["base"]]
    raise ValueError(f"no such unit: {facts['unit']}")


def met(row: dict) -> bool:
    facts = row["facts"]
    return reached(row) <= facts["asked"] if facts["is_most"] else reached(row) >= facts["asked"]


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


def _spread(row: dict) -> float:
    """Half of what lies between the 20th and the 80th percentile of our time, over the median."""
    times = row["seconds"][ours(row)]
    return (times["p80"] - times["p20"]) / 2 / times["p50"]


def _measured(row: dict) -> str:
    return f"{_milliseconds(p50(row, ours(row)))} ±{_spread(row):.0%}"


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
        "reached": lambda row: f"{reached(row):.2f} {row['facts']['unit']}",
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
    held = [
        of_copy(row) >= row["facts"]["goal"] if row["question"] == "ops" else ratio(row) <= row["facts"]["goal"]
        for row in rows
        if "goal" in row["facts"]
    ]
    lines = [f"{sum(held)} of {len(held)} goals (at least, at most) are met."] if held else []
    if disturbed := sum(_spread(row) > DISTURBED for row in rows):
        lines.append(f"{disturbed} of {len(rows)} rows spread by more than {DISTURBED:.0%}: the machine was busy.")
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


def markdown(results: dict, pictures: Sequence[str]) -> str:
    parts = [f"# {results['environment']['device']}", limits_line(results), "Medians of interleaved runs."]
    parts += notes(results)
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
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)  # an earlier run's
        else:
            paths.append(path)
            figure.savefig(path, dpi=200)
    path = folder / "bench.md"
    path.write_text(markdown(results, [p.stem for p in paths]))
    return [path, *paths]


def _name(interaction: str) -> str:
    return interaction.replace("_", "-").upper()


def _network(model: str) -> str:
    """resnet110_dla_b -> DLA-B-110; resnet50d+dla_l -> resnet50d + DLA-L."""
    base, plus, interaction = model.partition("+")
    if plus:
        return f"{base} + {_name(interaction)}"
    base, _, interaction = model.partition("_")
    return f"{_name(interaction)}-{base.removeprefix('resnet')}"


def _span(shares: Sequence[float]) -> str:
    low, high = (f"{100 * f(shares):.0f}" for f in (min, max))
    return f"{low} %" if low == high else f"{low} to {high} %"


@mpl.rc_context(STYLE)
def roofline(results: dict) -> Figure | None:
    """FLOPs a second over FLOPs a byte, of every op, under what this machine reached in the same run.

    Of several dtypes and layouts the first is drawn. A machine's memory may be faster at one time than at another: its
    limit is the best that was seen, at the start or beside the largest maps.
    """
    rows = [row for row in results["rows"] if row["question"] == "ops" and moved(row)]
    if not rows:
        return None
    dtype, layout = (rows[0]["labels"][name] for name in ("dtype", "layout"))
    rows = [row for row in rows if (row["labels"]["dtype"], row["labels"]["layout"]) == (dtype, layout)]
    limits = results["limits"]
    figure = Figure(figsize=(6.4, 4.3), layout="constrained")
    axes = figure.subplots()
    points = [(r["facts"]["flops"] / moved(r), r["facts"]["flops"] / p50(r, ours(r))) for r in rows]
    large = [r for r in rows if r["facts"]["map_bytes"] == max(r["facts"]["map_bytes"] for r in rows)]
    peak = limits["flops_per_s"]
    left, right = min(p[0] for p in points) / 2, 2 * max(peak / limits["copy_bytes_per_s"], *(p[0] for p in points))
    roofs = {}
    for name, style, maps in (("copy", "-", 2), ("read", "--", 1)):
        rate = max(limits[f"{name}_bytes_per_s"], *(maps * r["facts"]["map_bytes"] / p50(r, name) for r in large))
        (roofs[f"{name}, {rate / 1e9:.0f} GB/s"],) = axes.plot(
            [left, peak / rate, right], [left * rate, peak, peak], style, color="black", linewidth=1.2, marker=""
        )
    axes.annotate(
        f"matrix product, {peak / 1e9:.0f} GFLOP/s", (right, peak), ha="right", fontsize=8,
        xytext=(0, 4), textcoords="offset points",
    )  # fmt: skip
    names = list(dict.fromkeys(r["labels"]["op"] for r in rows))
    shapes = list(dict.fromkeys(r["labels"]["shape"] for r in rows))
    colors = [c["color"] for c in mpl.rcParams["axes.prop_cycle"]]
    markers = [*(c["marker"] for c in mpl.rcParams["axes.prop_cycle"]), *"X<>*ph"]  # one for every shape
    fills = {"forward": "full", "backward": "none", "inference": "left"}
    for row, (intensity, rate) in zip(rows, points, strict=True):
        axes.plot(
            intensity, rate, color=colors[names.index(row["labels"]["op"]) % len(colors)],
            marker=markers[shapes.index(row["labels"]["shape"]) % len(markers)], markersize=6,
            fillstyle=fills[row["labels"][""]], markerfacecoloralt="white", linestyle="none",
        )  # fmt: skip

    def sign(**style) -> mpl.lines.Line2D:
        return mpl.lines.Line2D([], [], **{"color": "dimgrey", "marker": "o", "linestyle": "none", **style})

    handles = {name: sign(color=colors[i % len(colors)], marker="s") for i, name in enumerate(names)}
    handles |= {shape: sign(marker=markers[i % len(markers)]) for i, shape in enumerate(shapes)}
    handles |= {what: sign(fillstyle=fill, markerfacecoloralt="white") for what, fill in fills.items()}
    handles |= roofs
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    axes.set(xscale="log", yscale="log", xlim=(left, right), xlabel="FLOPs per byte that must move", ylabel="GFLOP/s")
    axes.xaxis.set_major_locator(LogLocator(2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1e9:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.set_title(
        f"Ops on {large[0]['labels']['shape']} move {_span([of_copy(r) for r in large])} of a copy's bytes a second\n"
        f"{results['environment']['device']}, {dtype}, {layout}"
    )
    return figure


#: Panels of the bars, and what a row of each is called.
_BARS = {
    "blocks": lambda labels: _name(labels["interaction"]),
    "models": lambda labels: _network(labels["model"]),
}
#: Of STYLE's colours those that white figures can be read on.
_COLORS = {"fused": "#0072b2", "reference": "#d55e00", "literal": "#009e73"}
_TASKS = {"train step": "training step", "inference": "inference"}


@mpl.rc_context(STYLE)
def speedups(results: dict) -> Figure | None:
    """Time beside the plain block's or network's, of ours and of the literal form and the reference."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in results["rows"]:
        if row["question"] in _BARS:
            shared = {"blocks": "stage of 4 blocks, {stage}", "models": "networks, batch {batch}, {image}x{image}"}
            groups.setdefault((row["question"], shared[row["question"]].format(**row["labels"])), []).append(row)
    if not groups:
        return None
    measured = {rival for rows in groups.values() for row in rows for rival in row["over_ours"]}
    forms = [form for form in ("fused", "reference", "literal") if form in measured]
    lanes = {key: _lanes(key[0], rows, forms) for key, rows in groups.items()}
    heights = [0.16 * max(bottom for _, bottom in places.values()) for places in lanes.values()]
    figure = Figure(figsize=(6.8, 1 + 0.75 * len(groups) + sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), len(_TASKS), squeeze=False, height_ratios=heights, sharex="row", sharey="row")
    for line, (key, rows) in zip(panels, groups.items(), strict=True):
        places = lanes[key]
        for axes, (task, title) in zip(line, _TASKS.items(), strict=True):
            for row in (r for r in rows if r["labels"][""] == task):
                top, _ = places[_BARS[key[0]](row["labels"])]
                shown = [form for form in forms if form in row["over_ours"]]
                for i, form in enumerate(shown):
                    axes.barh(top + 0.5 + i, ratio(row, form), 1, label=form, color=_COLORS[form])
                    axes.annotate(
                        f"{ratio(row, form):.2f}", (0, top + 0.5 + i), fontsize=7, color="white", va="center_baseline",
                        xytext=(4, 0), textcoords="offset points",
                    )  # fmt: skip
                if "goal" in row["facts"]:
                    axes.plot([row["facts"]["goal"]] * 2, [top - 0.15, top + 1.15], "-", color="black", marker="",
                              linewidth=1.6, label="goal")  # fmt: skip
            axes.axvline(1, color="black", linewidth=0.8, linestyle=":", label="plain")
            axes.set_yticks([(top + bottom - 0.5) / 2 for top, bottom in places.values()], places, fontsize=8)
            axes.set_title(f"{key[1]}: {title}", fontsize=8)
        line[0].invert_yaxis()
    for axes in panels[-1]:
        axes.set_xlabel("time, plain = 1")
    handles = {name: h for axes in panels.flat for h, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.suptitle(f"{_bars_say(groups)}\n{results['environment']['device']}", fontsize=9)
    return figure


def _lanes(question: str, rows: list[dict], forms: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The first and the last lane of every name's bars, one for each form that some row of it has."""
    places, bottom = {}, 0.0
    for name in dict.fromkeys(_BARS[question](r["labels"]) for r in rows):
        some = [r for r in rows if _BARS[question](r["labels"]) == name]
        top, bottom = bottom, bottom + 0.5 + sum(any(form in r["over_ours"] for r in some) for form in forms)
        places[name] = top, bottom
    return places


def _bars_say(groups: dict[tuple[str, str], list[dict]]) -> str:
    rows = [row for group in groups.values() for row in group if row["labels"][""] == "train step"]
    both = [row for row in rows if "literal" in row["over_ours"]]
    if not both:
        return "Time of layer interactions beside the plain network"
    ours, literal = (_span([ratio(row, form) - 1 for row in both]) for form in ("fused", "literal"))
    return f"A layer interaction's part of a training step: {ours} of the plain one, written out literally {literal}"


@mpl.rc_context(STYLE)
def depth_curves(results: dict) -> Figure | None:
    """Time and peak memory of a training step over the blocks of a stage."""
    rows = [row for row in results["rows"] if row["question"] == "depth"]
    if not rows:
        return None
    figure = Figure(figsize=(6.8, 3.4), layout="constrained")
    measures = {
        "time of a training step (ms)": lambda r, form: p50(r, form) * 1e3,
        "peak memory of a training step (MiB)": lambda r, form: r["facts"][f"peak, {form}"] / 2**20,
    }
    interactions = list(dict.fromkeys(r["labels"]["interaction"] for r in rows))
    of = {i: sorted((r for r in rows if r["labels"]["interaction"] == i), key=_blocks) for i in interactions}
    colors = [c["color"] for c in mpl.rcParams["axes.prop_cycle"]]
    markers = [c["marker"] for c in mpl.rcParams["axes.prop_cycle"]]
    for axes, (label, value) in zip(figure.subplots(1, 2), measures.items(), strict=True):
        for i, (interaction, some) in enumerate(of.items()):
            for form, style in (("literal", "--"), ("fused", "-")):
                axes.plot(
                    [_blocks(r) for r in some], [value(r, form) for r in some], style, color=colors[i],
                    marker=markers[i], markerfacecolor=colors[i] if form == "fused" else "white",
                    label=f"{_name(interaction)}, {form}", linewidth=1.3, markersize=4,
                )  # fmt: skip
        axes.plot(
            [_blocks(r) for r in some], [value(r, "plain") for r in some],
            label="plain", linewidth=1.3, marker="x", markersize=4, color="dimgrey", linestyle=":",
        )  # fmt: skip
        last = of[interactions[0]][-1]
        axes.set(xlabel="blocks in the stage", ylabel=label, ylim=(0, None), xlim=(0, None))
        times = value(last, "literal") / value(last, "fused")
        axes.set_title(f"{_name(interactions[0])}, {_blocks(last)} blocks: literal {times:.1f} times the fused")
        axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(loc="upper left")
    conclusion = "Fused, a stage's memory grows with its blocks, that of the literal DLA-B with their square"
    figure.suptitle(f"{conclusion}\n{results['environment']['device']}", fontsize=9)
    return figure


def _blocks(row: dict) -> int:
    return row["labels"]["blocks"]


class Change(NamedTuple):
    """What differs between two runs in one row."""

    name: str
    what: str
    before: str
    after: str
    change: str
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
                changes.append(Change(now["name"], "result", *words, "", "error" in now))
            continue
        counted = {k: (was["facts"][k], now["facts"][k]) for k in now["facts"] if _counted(k) and k in was["facts"]}
        for what, (a, b) in {f"time over {now['base']}'s": (ratio(was), ratio(now)), **counted}.items():
            if abs(b - a) > threshold * a:
                change = f"{b / a - 1:+.0%}" if a else ""
                changes.append(Change(now["name"], what, f"{a:.3g}", f"{b:.3g}", change, b > a))
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
