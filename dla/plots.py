"""Figures: accuracy curves, and attention over a stage's layers. They return a Figure; saving is the caller's."""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib as mpl
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor, nn

import dla

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    # Okabe and Ito's colours, which the colour-blind tell apart; the markers serve a print in grey.
    "axes.prop_cycle": cycler(color=["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"])
    + cycler(marker=["o", "s", "^", "D", "v", "P"]),
}

# Above this many layers the weights no longer fit into their cells.
ANNOTATED_LAYERS = 8


@mpl.rc_context(STYLE)
def accuracy_curves(curves: Mapping[str, Sequence[float]], title: str = "") -> Figure:
    """Held-out accuracy after each epoch, one line for each model.

    Args:
        curves: model name -> accuracies in [0, 1] after epochs 1, 2, ...; the last one also stands in the legend.
        title: above the axes.

    Raises:
        ValueError: no curve, or an empty one.
    """
    if not curves or not all(len(curve) for curve in curves.values()):
        raise ValueError(f"`curves` must name at least one model, each with at least one epoch, got {dict(curves)}")
    figure = Figure(figsize=(4.6, 3.1), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        label = f"{name} ({curve[-1]:.1%})"
        axes.plot(range(1, len(curve) + 1), curve, label=label, linewidth=1.3, markersize=4, clip_on=False)
    axes.set(xlabel="epoch", ylabel="held-out accuracy", title=title, ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(loc="lower right")
    return figure


@mpl.rc_context(STYLE | {"axes.spines.left": False, "axes.spines.bottom": False})
def layer_attention_heatmaps(models: Mapping[str, Sequence[Tensor]]) -> Figure:
    """Attention over the layers of each stage: a row for each model, a column for each stage, one colour scale.

    Args:
        models: model name -> for each stage a matrix (L, L), whose entry [l, m] is the weight of layer m in layer l.
            What lies above the diagonal, m > l, is left blank. L may differ from stage to stage.

    Raises:
        ValueError: no model, models of different numbers of stages, or a matrix that is not square.
    """
    counts = {len(maps) for maps in models.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"`models` must give every model the same stages, at least one, got {sorted(counts)}")
    shapes = {tuple(weights.shape) for maps in models.values() for weights in maps}
    if not all(len(shape) == 2 and shape[0] == shape[1] for shape in shapes):
        raise ValueError(f"`models` must hold matrices (L, L), got shapes {sorted(shapes)}")

    rows, columns = len(models), counts.pop()
    figure = Figure(figsize=(2.2 * columns + 0.9, 2.2 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    # Layer 1 attends to itself alone, with weight 1 in every model: that must not stretch the scale.
    top = max((float(w[1:].max()) for maps in models.values() for w in maps if len(w) > 1), default=1.0)
    for row, (name, maps) in zip(axes, models.items(), strict=True):
        for ax, weights in zip(row, maps, strict=True):
            image = _heatmap(ax, weights.detach().float().cpu(), top)
        row[0].set_ylabel(f"{name}\nlayer $l$ (query)")
    for stage, (ax, lowest) in enumerate(zip(axes[0], axes[-1], strict=True), 1):
        ax.set_title(f"stage {stage}")
        lowest.set_xlabel("layer $m$ (key)")
    bar = figure.colorbar(image, ax=axes, aspect=20 * rows, pad=0.02, extend="max" if top < 0.99 else "neither")
    bar.set_label("attention weight")
    bar.outline.set_visible(False)
    return figure


def _heatmap(ax: Axes, weights: Tensor, top: float) -> AxesImage:
    layers = len(weights)
    above = np.triu(np.ones((layers, layers), dtype=bool), k=1)
    image = ax.imshow(np.ma.masked_array(weights.numpy(), mask=above), cmap="viridis", vmin=0, vmax=top)
    if layers <= ANNOTATED_LAYERS:
        for l, m in zip(*np.nonzero(~above), strict=True):
            color = "white" if weights[l, m] < 0.6 * top else "black"
            ax.text(m, l, f"{weights[l, m]:.2f}", ha="center", va="center", fontsize=6, color=color)
    ticks = range(0, layers, max(1, layers // 6))
    ax.set_xticks(ticks, [tick + 1 for tick in ticks])
    ax.set_yticks(ticks, [tick + 1 for tick in ticks])
    ax.tick_params(length=0)
    return image


@torch.no_grad()
def mean_layer_attention(model: nn.Module, batches: Iterable[Tensor]) -> list[Tensor]:
    """A model's layer attention, averaged over images and heads.

    Args:
        model: one with a softmax over layers (`*_mrla_b`, `*_dla_b`); run in eval mode, its mode is restored.
        batches: images (B, C, H, W).

    Returns:
        For each stage a matrix (L, L) as in `layer_attention_heatmaps`.

    Raises:
        ValueError: the model has no softmax over layers, or there are no images.
    """
    training, images, totals = model.training, 0, None
    model.eval()
    try:
        for batch in batches:
            maps = [m.mean(1).sum(0) for m in dla.layer_attention_maps(model, batch)]
            totals = maps if totals is None else [a + b for a, b in zip(totals, maps, strict=True)]
            images += len(batch)
    finally:
        model.train(training)
    if totals is None:
        raise ValueError("`batches` must hold at least one batch of images, got none")
    return [total / images for total in totals]
