"""A run in pictures, each readable without the text."""

from collections.abc import Callable, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dla.benchmarks.readings import moved, of_copy, ours, p50, ratio
from dla.plots import STYLE


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
        f"matrix product,\n{peak / 1e9:.0f} GFLOP/s", (right, peak), ha="right", va="top", fontsize=8,
        xytext=(0, -4), textcoords="offset points",
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
    ours, literal = ([ratio(r, form) - 1 for r in rows if form in r["over_ours"]] for form in ("fused", "literal"))
    if not literal:
        return "Time of layer interactions beside the plain network"
    said = f"Layer interactions add {_span(ours)} to a training step"
    return f"{said}; literal ones, where measured, {_span(literal)}"


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


#: The pictures by name, each None where a run has no rows for it.
DRAW: dict[str, Callable[[dict], Figure | None]] = {
    "roofline": roofline,
    "speedup": speedups,
    "depth": depth_curves,
}
