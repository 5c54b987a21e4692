import copy
import io
import pickle
from importlib import import_module

import pytest
import torch
from helpers import assert_close
from test_dla import eager
from torch import nn

import dla
from dla.stage import BaseStage

#: The variants of the authors' code: CIFAR, ImageNet, detection; DLA and MRLA.
VARIANTS = {
    "dla_l_cifar": ("dla_l", {}),
    "dla_l_imagenet": ("dla_l", {"filter_name": "extict", "inner": "mrla", "reduction": 16}),
    "dla_l_detection": ("dla_l", {"inner": "mrla", "reduction": 20}),
    "dla_b_cifar": ("dla_b", {}),
    "mrla_l_imagenet": ("mrla_l", {}),
    "mrla_l_cifar_basic": ("mrla_l", {"basic": True}),
    "mrla_l_channel_attention": ("mrla_l", {"se": True}),
    "mrla_b_imagenet": ("mrla_b", {"head_dim": 16}),
    "mrla_b_channelwise": ("mrla_b", {"head_dim": 1, "basic": True}),
}


def build(variant, **more):
    kind, kwargs = VARIANTS[variant]
    return eager.Network(kind, **kwargs, **more).double()


def images(batch=3):
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64)


def assert_same(actual, expected, name):
    """To rounding; what is zero in exact arithmetic, as the gradient of a shift before a BatchNorm, is small."""
    assert (actual - expected).norm() <= 1e-11 * max(expected.norm(), 1), name


def assert_same_step(one, other, x):
    """A step of an optimiser: outputs, all gradients, all Parameters and buffers after it."""
    outputs = []
    for model in (one, other):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
        optimizer.step()
    assert_close(outputs[1], outputs[0], 1e-12)
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert_same(b.grad, a.grad, f"gradient of {name}")
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert_same(b.double(), a.double(), name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_fused_model_trains_as_the_eager_one(variant, backend):
    model = build(variant)
    fused = dla.fuse(copy.deepcopy(model), backend=backend, inplace=True)
    assert fused.state_dict().keys() == model.state_dict().keys()
    for _ in range(2):
        assert_same_step(model, fused, images())
    model.load_state_dict(fused.state_dict())
    x = images()
    assert_close(fused.eval()(x), model.eval()(x), 1e-13)
    with torch.no_grad():
        assert_close(fused(x), model(x), 1e-13)


def test_every_variant_is_fused_whole():
    for variant in VARIANTS:
        report = dla.fusion_report(dla.fuse(build(variant), backend="native"))
        names = ["stages.0", "stages.1"]
        if variant.startswith("mrla"):
            names = [f"{stage}.{block}" for stage in names for block in "01"]
        assert [row.layer for row in report] == names
        assert {row.backend for row in report} == {"native"}
        assert all(row.now == f"Fused{row.was}" and not row.note for row in report)
        header, first, *_ = str(report).splitlines()
        assert header.split() == ["layer", "was", "now", "backend", "note"]
        assert first.split() == [names[0], report[0].was, report[0].now, "native"]


def test_the_ops_run_on_the_backend_that_was_chosen(monkeypatch):
    op = import_module("dla_kernels.ops.light_update")
    seen, folded = [], op.folded

    def recorded(*args):
        *_, backend, _ = args  # the last one is whether it may write over the map
        seen.append(backend)
        return folded(*args)

    monkeypatch.setattr(op, "folded", recorded)
    for variant in ("dla_l_cifar", "mrla_l_imagenet"):
        for backend, expected in (("native", {"native"}), ("reference", set())):
            fused = dla.fuse(build(variant), backend=backend).eval()
            seen.clear()
            with torch.no_grad():
                fused(images())
            assert set(seen) == expected


def test_parameters_are_shared_and_the_model_is_left():
    model = build("dla_l_cifar")
    classes = [type(m) for m in model.modules()]
    fused = dla.fuse(model)
    assert fused is not model
    assert [type(m) for m in model.modules()] == classes
    for (name, a), (other, b) in zip(model.named_parameters(), fused.named_parameters(), strict=True):
        assert a is b
        assert name == other
    assert all(a is b for a, b in zip(model.buffers(), fused.buffers(), strict=True))
    assert isinstance(fused.stages[0], eager.DlaLStage)


def test_in_place_and_undone():
    for variant in VARIANTS:
        model = build(variant)
        classes, attributes = ([type(m) for m in model.modules()], [set(m.__dict__) for m in model.modules()])
        assert dla.fuse(model, inplace=True) is model
        assert [type(m) for m in model.modules()] != classes
        eager_again = dla.unfuse(model)
        assert [type(m) for m in eager_again.modules()] == classes
        assert [type(m) for m in model.modules()] != classes
        assert dla.unfuse(model, inplace=True) is model
        assert [type(m) for m in model.modules()] == classes
        assert [set(m.__dict__) for m in model.modules()] == attributes
        with pytest.raises(ValueError, match="`model` has nothing that was fused"):
            dla.unfuse(model)


def test_fused_anew():
    model = build("dla_l_cifar").eval()
    fused = dla.fuse(dla.fuse(model, backend="reference"), backend="native", context="own", inplace=True)
    assert {row.backend for row in dla.fusion_report(fused)} == {"native"}
    assert [type(m).__name__ for m in fused.stages] == ["FusedDlaLStage"] * 2
    x = images(1)
    assert_close(fused(x), model(x), 1e-12)
    assert type(dla.unfuse(fused).stages[0]) is eager.DlaLStage


@pytest.mark.parametrize("variant", ["dla_l_cifar", "dla_b_cifar"])
def test_own_context(variant):
    """With a batch of one the first sample's context is its own; each sample of a larger one then stands alone."""
    model = build(variant).eval()
    fused = dla.fuse(model, context="own")
    x = images()
    alone = torch.cat([model(sample[None]) for sample in x])
    assert_close(fused(x), alone, 1e-12)
    assert (model(x) - alone).norm() > 1e-6 * alone.norm()


def test_drop_path():
    """The same samples are dropped where the same are drawn, and none in inference."""
    for variant in ("dla_l_cifar", "mrla_l_imagenet"):
        model = build(variant, drop_path=0.5)
        fused = dla.fuse(model)
        attention = next(m for m in fused.modules() if isinstance(m, dla.attention.LightLayerAttention))
        keep = attention.keep(images(64))
        assert keep.shape == (64,)
        assert set(keep.tolist()) == {0.0, 2.0}
        x = images(64)
        torch.manual_seed(0)
        drawn = attention.keep(x)
        torch.manual_seed(0)
        assert torch.equal(drawn, attention.drop_path(torch.ones_like(x[:, :1, :1, :1])).flatten())
        attention.drop_path.eval()  # its own mode counts
        assert attention.keep(images()) is None
        x = images()
        assert_close(fused.eval()(x), model.eval()(x), 1e-12)


@pytest.mark.parametrize("variant", ["dla_l_cifar", "dla_b_cifar", "mrla_l_imagenet", "mrla_b_imagenet"])
def test_copies_and_pickles(variant):
    fused = dla.fuse(build(variant)).eval()
    x = images()
    expected = fused(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(x), expected)
        assert str(dla.fusion_report(other)) == str(dla.fusion_report(fused))
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    state = dict(fused.named_parameters()) | dict(fused.named_buffers())
    other = {name: t + 0.1 for name, t in state.items()}
    swapped = torch.func.functional_call(fused, other, x)
    fused.load_state_dict(other)
    assert_close(swapped, fused(x), 1e-13)


@pytest.mark.parametrize(("variant", "backend"), [("dla_l_cifar", "auto"), ("mrla_b_imagenet", "native")])
def test_compiles_and_exports(variant, backend):
    fused = dla.fuse(build(variant), backend=backend).eval()
    x = images()
    expected = fused(x)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), expected, 1e-12)
    assert_close(torch.export.export(fused, (x,)).module()(x), expected, 1e-12)


@pytest.mark.parametrize("variant", ["dla_l_cifar", "dla_b_cifar", "mrla_l_imagenet"])
def test_under_autocast_maps_keep_its_dtype(variant):
    """Also after a network that gives float32; the eager layers turn all maps into float32."""
    stage = build(variant).float().eval().stages[0]
    x = torch.randn(3, 16, 8, 8)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        expected, got = stage(x), dla.fuse(stage)(x)
    assert got.dtype == torch.bfloat16
    assert_close(got, expected, 0.05)


def test_attention_maps_of_the_authors_models():
    maps = dla.layer_attention_maps(dla.fuse(build("dla_b_cifar")), images())
    assert [m.shape for m in maps] == [(3, 1, 2, 2), (3, 2, 2, 2)]


def test_the_fused_model_is_that_of_this_package():
    """A third computation: the same weights in a stage of ours, by :func:`dla.load_released`'s names."""
    model = build("dla_b_cifar").eval()
    ours = nn.Module()
    ours.layer1 = dla.create_stage(copy.deepcopy(model.stages[0].layers), 32, "dla_b", config=dla.RELEASED)
    for block in ours.layer1.blocks:
        block.__class__ = OwnBlock
    ours.double().eval()
    state = {k: v for k, v in model.state_dict().items() if k.startswith("stages.0.")}
    dla.load_released(ours, state)
    x = torch.randn(2, 16, 5, 4, dtype=torch.float64)
    fused = dla.fuse(model.stages[0])
    assert isinstance(fused, BaseStage)
    assert_close(fused(x), ours.layer1(x), 1e-13)


class OwnBlock(eager.DlaBBlock):
    """One of the eager blocks, as :mod:`dla.stage` takes it."""

    def output(self, x):
        x, shortcut = self.residual(x)
        return x, x.mean((2, 3)), shortcut


def test_own_models_get_a_backend():
    model = dla.resnet_cifar(20, "dla_b").eval()
    fused = dla.fuse(model, backend="reference")
    assert [stage.backend for stage in (model.layer1, fused.layer1)] == ["auto", "reference"]
    assert {(row.was, row.backend) for row in dla.fusion_report(fused)} == {("BaseStage", "reference")}
    assert {row.note for row in dla.fusion_report(model)} == {"can be fused"}
    x = torch.randn(2, 3, 8, 8)
    assert_close(fused(x), model(x), 1e-5)
    assert dla.unfuse(fused).layer1.backend == "auto"


def test_what_computes_something_else_is_left():
    """A file of the authors' has no ReLU in MRLA-B; nothing but its output tells."""
    model = nn.ModuleDict({"odd": eager.Network("mrla_b", relu=False), "even": eager.Network("mrla_b")})
    fused = dla.fuse(model)
    for row in dla.fusion_report(fused):
        if row.layer.startswith("odd"):
            assert row.now == row.backend == ""
            assert row.note.startswith("it computes something else, the fused form differs by ")
        else:
            assert row.now == "FusedMrlaBBlock"
    x = images().float()
    assert torch.equal(fused.eval()["odd"](x), model.eval()["odd"](x))


class NeedsAGpu(eager.DlaLStage):
    def forward(self, x):
        raise AssertionError("no GPU here\nand more")


def test_an_eager_layer_that_cannot_run_here_is_fused_by_its_structure():
    torch.manual_seed(1)
    stage = NeedsAGpu([eager.DlaLBlock(32, 32)], 32)
    fused = dla.fuse(stage, inplace=True)
    (row,) = dla.fusion_report(fused)
    device = torch.get_default_device()
    assert row.note == f"not compared: the eager layer fails on {device} (AssertionError: no GPU here)"
    assert fused(torch.randn(2, 32, 4, 4)).shape == (2, 32, 4, 4)


def odd(change):
    model = build("dla_l_cifar")
    change(model.stages[0])
    return model


def group_norm(stage):
    stage.attention[1].bn_layer_attention = nn.GroupNorm(4, 32)


def two_cells(stage):
    stage.lstm.w_ih.append(nn.Linear(32, 96))


def hooked(stage):
    stage.attention[0].register_forward_hook(lambda *_: None)


def uneven(stage):
    del stage.attention[1]


def other_branch(stage):
    stage.lstm.w_ih[0].seq[1] = nn.SiLU()


def other_projections(stage):
    del stage.attention[0].layer_attention.layer_attention.Wk


def other_drop_path(stage):
    stage.attention[0].drop_path = nn.Dropout(0.1)


def other_filter(stage):
    stage.attention[0].layer_attention.layer_attention.Wv = nn.Conv2d(32, 32, 5, padding=2, groups=32, bias=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            other_filter,
            "the fused form does not take it (ValueError: light_update: `value_weight` must have shape "
            "(C=32, 1, 3, 3), got (32, 1, 5, 5))",
        ),
        (other_drop_path, "its drop_path is a Dropout without drop_prob"),
        (group_norm, "its attention is not normalised by a BatchNorm2d with scale and shift"),
        (two_cells, "its lstm is not a cell of one layer"),
        (other_branch, "the branches of its lstm are not Linear, ReLU, Linear"),
        (other_projections, "an attention without Wq, Wk, Wv and heads"),
        (hooked, "attention.0 has a hook that the fused form would not call"),
        (uneven, "2 layers for 1 attentions"),
    ],
)
def test_what_is_left(change, reason):
    left, fused = dla.fusion_report(dla.fuse(odd(change)))
    assert (left.now, left.backend, left.note) == ("", "", reason)
    assert fused.now == "FusedDlaLStage"


def test_blocks_of_mrla_b_without_their_first():
    with pytest.raises(ValueError, match=r"nothing that can be fused, which are .*; 0 was left: no block before it"):
        dla.fuse(nn.Sequential(eager.MrlaBBlock(32, 32)))


def test_an_unknown_block_keeps_its_own_forward():
    class Odd(eager.DlaLBlock):
        def __init__(self, *args):
            super().__init__(*args)
            self.relu = nn.SiLU()
            self.first = self._modules.pop("conv1")

        @property
        def conv1(self):
            return self.first

    model = eager.DlaLStage([Odd(16, 32), eager.DlaLBlock(32, 32)], 32).double()
    fused = dla.fuse(model)
    assert type(fused.layers[0]) is Odd
    assert type(fused.layers[1]) is not eager.DlaLBlock
    assert_same_step(copy.deepcopy(model), fused, torch.randn(3, 16, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: dla.fuse(nn.Linear(2, 2)),
            ValueError,
            r"`model` has nothing that can be fused, which are the stages of this package, the stages of the DLA code "
            r"\(layers, attention and lstm\) and the residual blocks of the MRLA code \(mrla and bn_mrla\)$",
        ),
        (
            lambda: dla.fuse(build("dla_l_cifar"), context="all"),
            ValueError,
            "`context` must be first or own, got 'all'",
        ),
        (lambda: dla.fuse(build("dla_l_cifar"), backend="gpu"), ValueError, "`backend` must be one of auto, native, "),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_backend_that_cannot_run_changes_nothing(monkeypatch):
    monkeypatch.setattr("dla_kernels.native.why_not", lambda device: "not built")
    model = build("dla_l_cifar")
    with pytest.raises(RuntimeError, match="backend native: not built"):
        dla.fuse(model, backend="native", inplace=True)
    assert type(model.stages[0]) is eager.DlaLStage


def test_reports_leave_the_random_numbers_alone():
    model = build("mrla_l_imagenet")
    state = torch.get_rng_state()
    dla.fuse(model)
    dla.fusion_report(model)
    assert torch.equal(torch.get_rng_state(), state)
