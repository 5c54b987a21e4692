import io

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import dla
from dla.plots import accuracy_curves, layer_attention_heatmaps, mean_layer_attention


def attention(layers, seed=0):
    scores = torch.randn(layers, layers, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.ones(layers, layers).triu(1).bool(), -torch.inf).softmax(-1)


@pytest.fixture
def stages():
    return [attention(3, 1), attention(6, 2), attention(4, 3)]


def heatmap_axes(figure: Figure):
    return [ax for ax in figure.axes if ax.images]


def test_curves_hold_the_accuracies():
    curves = {"ResNet-20": [0.5, 0.75, 0.9], "DLA-L-20": [0.6, 0.955]}
    figure = accuracy_curves(curves, title="Digits")
    (axes,) = figure.axes
    assert [line.get_ydata().tolist() for line in axes.lines] == list(curves.values())
    assert [line.get_xdata().tolist() for line in axes.lines] == [[1, 2, 3], [1, 2]]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["ResNet-20 (90.0%)", "DLA-L-20 (95.5%)"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("epoch", "held-out accuracy", "Digits")
    assert axes.get_ylim() == (0, 1)
    assert len({line.get_color() for line in axes.lines}) == len({line.get_marker() for line in axes.lines}) == 2


@pytest.mark.parametrize("epochs", [1, 2, 15])
def test_curves_count_whole_epochs(epochs):
    figure = accuracy_curves({"a": [0.5] * epochs})
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert all(label.get_text().isdecimal() for label in axes.get_xticklabels())
    assert [label.get_text() for label in axes.get_yticklabels()][-1] == "100%"


@pytest.mark.parametrize("curves", [{}, {"a": []}, {"a": [0.5], "b": []}])
def test_curves_need_an_epoch(curves):
    with pytest.raises(ValueError, match="`curves` must name at least one model"):
        accuracy_curves(curves)


def test_heatmaps_hold_the_attention_and_blank_what_lies_above(stages):
    others = [attention(len(w), 9) for w in stages]
    figure = layer_attention_heatmaps({"static": stages, "dynamic": others})
    for ax, weights in zip(heatmap_axes(figure), stages + others, strict=True):
        shown = ax.images[0].get_array()
        above = np.triu(np.ones(weights.shape, dtype=bool), k=1)
        assert np.array_equal(np.ma.getmaskarray(shown), above)
        assert np.array_equal(shown.data[~above], weights.numpy()[~above])
        assert ax.images[0].origin == "upper"  # layer 1 at the top, so that the blank half is the upper one


def test_heatmaps_are_drawn_blank_above(stages):
    figure = layer_attention_heatmaps({"model": stages})
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba", dpi=100)
    width, height = (int(v) for v in figure.bbox.size)
    pixels = np.frombuffer(buffer.getvalue(), dtype=np.uint8).reshape(height, width, 4)
    ax = heatmap_axes(figure)[1]
    x, y = ax.transData.transform((5, 0)).astype(int)  # layer 6 in layer 1
    assert pixels[height - y, x].tolist() == [255, 255, 255, 255]
    x, y = ax.transData.transform((0, 5)).astype(int) + np.array((0, 9))  # layer 1 in layer 6, above its number
    image = ax.images[0]
    color = image.cmap(image.norm(stages[1][5, 0].item()), bytes=True)
    assert np.abs(pixels[height - y, x].astype(int) - color).max() <= 1


def test_heatmaps_are_labelled(stages):
    figure = layer_attention_heatmaps({"static": stages, "dynamic": stages})
    axes = np.array(heatmap_axes(figure)).reshape(2, 3)
    assert [ax.get_title() for ax in axes[0]] == ["stage 1", "stage 2", "stage 3"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["static\nlayer $l$ (query)", "dynamic\nlayer $l$ (query)"]
    assert [ax.get_xlabel() for ax in axes[1]] == ["layer $m$ (key)"] * 3
    for ax, weights in zip(axes[0], stages, strict=True):
        layers = [str(l) for l in range(1, len(weights) + 1)]
        assert [t.get_text() for t in ax.get_xticklabels()] == [t.get_text() for t in ax.get_yticklabels()] == layers
        numbers = {t.get_position(): t.get_text() for t in ax.texts}
        assert numbers == {(m, l): f"{weights[l, m]:.2f}" for l in range(len(weights)) for m in range(l + 1)}


def test_heatmaps_share_one_scale_and_one_bar(stages):
    figure = layer_attention_heatmaps({"static": stages, "dynamic": [w / 2 for w in stages]})
    top = max(w[1:].max().item() for w in stages)  # all but layer 1's trivial weight
    assert {ax.images[0].get_clim() for ax in heatmap_axes(figure)} == {(0, top)}
    (bar,) = [ax for ax in figure.axes if not ax.images]
    assert bar.get_ylabel() == "attention weight"


def test_deep_stages_get_fewer_ticks_and_no_numbers():
    figure = layer_attention_heatmaps({"model": [attention(36)]})
    (ax,) = heatmap_axes(figure)
    assert not ax.texts
    assert [t.get_text() for t in ax.get_yticklabels()] == ["1", "7", "13", "19", "25", "31"]


def test_one_layer_alone():
    (ax,) = heatmap_axes(layer_attention_heatmaps({"model": [torch.ones(1, 1)]}))
    assert ax.images[0].get_clim() == (0, 1)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({}, "must give every model the same stages"),
        ({"a": []}, "must give every model the same stages"),
        ({"a": [attention(3)], "b": [attention(3)] * 2}, r"the same stages, at least one, got \[1, 2\]"),
        ({"a": [torch.ones(2, 3)]}, r"matrices \(L, L\), got shapes \[\(2, 3\)\]"),
        ({"a": [torch.ones(1, 3, 3)]}, r"matrices \(L, L\)"),
    ],
)
def test_bad_attention_is_refused(models, message):
    with pytest.raises(ValueError, match=message):
        layer_attention_heatmaps(models)


def test_mean_attention_counts_every_image_alike():
    model = dla.create_model("resnet29_dla_b", in_chans=1)
    images = torch.randn(5, 1, 8, 8)
    means = mean_layer_attention(model, [images[:3], images[3:]])
    model.eval()
    expected = [maps.mean((0, 1)) for maps in dla.layer_attention_maps(model, images)]
    assert len(means) == 3
    for mean, whole in zip(means, expected, strict=True):
        assert mean.shape == (3, 3)
        assert torch.allclose(mean, whole, atol=1e-6)
        assert torch.allclose(mean.sum(1), torch.ones(3), atol=1e-6)
        assert not mean.triu(1).any()


@pytest.mark.parametrize("training", [True, False])
def test_mean_attention_restores_the_mode(training):
    model = dla.create_model("resnet20_mrla_b", in_chans=1).train(training)
    statistics = model.bn1.running_mean.clone()
    mean_layer_attention(model, [torch.randn(2, 1, 8, 8)])
    assert model.training is training
    assert torch.equal(model.bn1.running_mean, statistics)


def test_mean_attention_needs_a_softmax_and_images():
    with pytest.raises(ValueError, match="no softmax over layers"):
        mean_layer_attention(dla.create_model("resnet20_dla_l"), [torch.randn(2, 3, 8, 8)])
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        mean_layer_attention(dla.create_model("resnet20_dla_b"), [])
