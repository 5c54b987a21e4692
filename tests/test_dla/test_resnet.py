import copy
from dataclasses import replace

import pytest
import torch
from helpers import assert_close, relative_error
from torch import nn

import dla
from dla.attention import LightLayerAttention
from dla.resnet import Bottleneck
from dla.stage import INTERACTIONS

NAMES = ["resnet20", *(f"resnet20_{i}" for i in INTERACTIONS)]


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("interaction", "cell", "depth", "exact", "printed"),
    # The exact counts for 10 and 100 classes, and the paper's, in millions.
    [
        (None, "dsu", 20, (220_378, 243_508), ("0.22", "0.24")),
        (None, "dsu", 56, (591_322, 614_452), ("0.59", "0.61")),
        (None, "dsu", 110, (1_147_738, 1_170_868), ("1.15", "1.17")),
        ("lii", "dia", 20, (439_226, 462_356), ("0.44", "0.46")),
        ("lii", "dia", 56, (810_170, 833_300), ("0.81", "0.83")),
        ("lii", "dia", 110, (1_366_586, 1_389_716), ("1.37", "1.39")),
        ("mrla_b", "dsu", 20, (230_286, 253_416), ("0.23", "0.25")),
        ("mrla_l", "dsu", 20, (231_182, 254_312), ("0.23", "0.25")),
        ("mrla_l", "dsu", 56, (623_734, 646_864), ("0.62", "0.65")),
        ("mrla_l", "dsu", 110, (1_212_562, 1_235_692), ("1.21", "1.24")),
        ("dla_b", "dsu", 20, (405_230, 428_360), ("0.41", "0.43")),
        ("dla_l", "dsu", 20, (410_158, 433_288), ("0.41", "0.43")),
        # Printed as 0.82: 0.82584 is cut there, not rounded.
        ("dla_l", "dsu", 56, (802_710, 825_840), ("0.80", "0.83")),
        ("dla_l", "dsu", 110, (1_391_538, 1_414_668), ("1.39", "1.41")),
    ],
)
def test_parameter_counts_on_cifar(interaction, cell, depth, exact, printed):
    for classes, number, text in zip((10, 100), exact, printed, strict=True):
        model = dla.resnet_cifar(depth, interaction, cell, dla.OFFICIAL, classes)
        assert count(model) == number
        assert f"{number / 1e6:.2f}" == text


@pytest.mark.parametrize(
    ("depth", "interaction", "config", "reduction", "exact", "printed"),
    [
        (50, None, dla.OFFICIAL, 16, 25_557_032, "25.6"),
        (50, "mrla_l", dla.OFFICIAL, 16, 25_738_452, "25.7"),
        (101, "mrla_l", dla.OFFICIAL, 16, 44_939_646, "44.9"),
        (101, "dla_l", dla.OFFICIAL, 16, 47_783_006, "47.8"),
        # The paper's row of ResNet-50 follows other readings than its row of ResNet-101.
        (50, "dla_l", replace(dla.OFFICIAL, dsu="joint"), 20, 27_169_492, "27.2"),
        (50, "dla_l", dla.OFFICIAL, 32, 27_188_932, "27.2"),
        (50, "dla_l", dla.OFFICIAL, 16, 28_581_812, "28.6"),
    ],
)
def test_parameter_counts_on_imagenet(depth, interaction, config, reduction, exact, printed):
    with torch.device("meta"):
        model = dla.resnet(depth, interaction, config=config, reduction=reduction)
    assert count(model) == exact
    assert f"{exact / 1e6:.1f}" == printed


def warmed(name, config, batch=8):
    """A model in float64 whose running statistics fit its maps, and images for it."""
    model = dla.create_model(name, config=config).double()
    x = torch.randn(batch, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(3):
            model(x)
    return model.eval(), x


@pytest.mark.parametrize("config", ["paper", "official"])
@pytest.mark.parametrize("name", NAMES)
def test_samples_are_independent(name, config):
    model, x = warmed(name, dla.CONFIGS[config])
    with torch.no_grad():
        alone = torch.cat([model(sample) for sample in x.split(1)])
        assert_close(model(x), alone, 1e-12)
        other = x.clone()
        other[0] = torch.randn_like(x[0])
        assert_close(model(other)[1:], alone[1:], 1e-12)


@pytest.mark.parametrize("name", ["resnet20_dla_b", "resnet20_dla_l"])
def test_released_gates_every_sample_by_the_first(name):
    model, x = warmed(name, dla.RELEASED)
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(sample) for sample in x.split(1)])
        assert_close(together[:1], alone[:1], 1e-12)
        assert all(relative_error(a, b) > 1e-6 for a, b in zip(together[1:], alone[1:], strict=True))
    x.requires_grad_()
    leaked = torch.autograd.grad(model(x)[1].sum(), x)[0]
    assert leaked[0].norm() > 0
    assert leaked[2:].norm() == 0


@pytest.mark.parametrize("name", NAMES)
def test_timm_interface(name):
    model = dla.create_model(name, num_classes=7, in_chans=1)
    x = torch.randn(2, 1, 16, 16)
    features = model.forward_features(x)
    assert features.shape == (2, 256, 4, 4)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model(x).shape == (2, 7)
    assert model.get_classifier().out_features == model.num_classes == 7
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    headless = dla.create_model(name, num_classes=0)
    assert headless(torch.randn(2, 3, 16, 16)).shape == (2, 256)


@pytest.mark.parametrize("interaction", [None, *INTERACTIONS])
def test_imagenet_model(interaction):
    model = dla.resnet(50, interaction, num_classes=5)
    assert all(m.bn3.weight.eq(0).all() for m in model.modules() if isinstance(m, Bottleneck))
    x = torch.randn(2, 3, 64, 64)
    assert model.forward_features(x).shape == (2, 2048, 2, 2)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_model_in_another_precision(name, dtype):
    model = dla.create_model(name).to(dtype)
    out = model(torch.randn(2, 3, 16, 16).to(dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()
    out.sum().backward()


@pytest.mark.parametrize("config", ["paper", "official"])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_keeps_the_maps_in_its_dtype(name, config):
    """No stage turns the residual stream float32."""
    model = dla.create_model(name, config=dla.CONFIGS[config])
    dtypes = set()
    for stage in model.stage_names:
        getattr(model, stage).register_forward_hook(lambda m, args, out: dtypes.add(out.dtype))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        model(torch.randn(2, 3, 16, 16))
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_gives_the_same_numbers(name):
    model, x = warmed(name, dla.PAPER)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_close(last(x.to(memory_format=torch.channels_last)), model(x), 1e-12)


@pytest.mark.parametrize("name", ["resnet20", "resnet20_lii", "resnet20_mrla_b", "resnet20_dla_l"])
def test_drop_path(name):
    """Dropped where it should be: in training alone, by the chosen rate, on the attention output if there is one."""
    torch.manual_seed(1)
    plain = dla.create_model(name)
    dropping = dla.create_model(name, drop_path_rate=0.5)
    dropping.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 16, 16)
    assert not torch.equal(dropping(x), plain(x))
    plain.load_state_dict(dropping.state_dict())
    assert torch.equal(dropping.eval()(x), plain.eval()(x))
    blocks = [m for m in dropping.modules() if isinstance(m, Bottleneck)]
    attends = name.endswith(("_b", "_l"))
    assert {b.drop_path.drop_prob for b in blocks} == {0.0 if attends else 0.5}


def attend(attention, x):
    """The block's output, and the o that its BatchNorm saw."""
    out, _, o, _ = attention(x, x.mean((2, 3)), None, None, None)
    return out, o


def test_drop_path_keeps_the_mean():
    attention = LightLayerAttention(32, drop_path=0.25, carry=False)
    x = torch.randn(4000, 32, 1, 2)
    added = attend(attention, x)[0] - x
    dropped = added.flatten(1).eq(0).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    attention.drop_path = 0.0
    kept = attend(attention, x)[0] - x
    assert_close(added[~dropped], kept[~dropped] / 0.75, 1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_those_of_torch(momentum):
    attention = LightLayerAttention(32, carry=False).double()
    attention.bn.momentum = momentum
    expected = copy.deepcopy(attention.bn)
    for _ in range(3):
        x = torch.randn(4, 32, 5, 5, dtype=torch.float64)
        out, o = attend(attention, x)
        assert_close(out, x + expected(o), 1e-13)
    for name, buffer in expected.named_buffers():
        assert_close(dict(attention.bn.named_buffers())[name], buffer, 1e-14, name)


def test_batch_norm_without_running_statistics():
    attention = LightLayerAttention(32, carry=False).double()
    attention.bn = nn.BatchNorm2d(32, track_running_stats=False).double()
    x = torch.randn(4, 32, 5, 5, dtype=torch.float64)
    for mode in (True, False):
        out, o = attend(attention.train(mode), x)
        assert_close(out, x + attention.bn(o), 1e-13)


def test_batch_norm_of_one_value():
    attention = LightLayerAttention(32, carry=False)
    before = copy.deepcopy(attention.bn.state_dict())
    with pytest.raises(ValueError, match="BatchNorm in training needs more than one value per channel, got a batch of"):
        attend(attention, torch.randn(1, 32, 1, 1))
    assert all(torch.equal(value, before[name]) for name, value in attention.bn.state_dict().items())


def test_every_name_builds():
    with torch.device("meta"):
        for name in dla.list_models():
            assert count(dla.create_model(name)) > 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: dla.resnet_cifar(21), r"`depth` must be 9n \+ 2 .* such as 20, 29, 47, 56, 110, 164, got 21"),
        (lambda: dla.resnet_cifar(2), r"`depth` must be 9n \+ 2 with n >= 1, .* got 2"),
        (lambda: dla.resnet(34), "`depth` must be one of 50, 101, 152, got 34"),
        (lambda: dla.resnet_cifar(20, "dla"), "`interaction` must be None or one of lii, mrla_b, .* got 'dla'"),
        (lambda: dla.resnet_cifar(20, "dla_l", "gru"), "`cell` must be one of rnn, lstm, dia, dsu, got 'gru'"),
        (lambda: dla.resnet_cifar(20, "dla_l", reduction=65), "`reduction` must be between 1 and the 64 channels"),
        (lambda: dla.resnet_cifar(20, drop_path_rate=1), r"`drop_path_rate` must be in \[0, 1\), got 1"),
        (lambda: dla.resnet_cifar(20, in_chans=0), "`in_chans` 1, got 10 and 0"),
        (
            lambda: dla.resnet_cifar(20)(torch.randn(3, 8, 8)),
            r"`x` must have shape \(B, in_chans=3, H, W\), got \(3, 8",
        ),
        (lambda: dla.resnet_cifar(20)(torch.randn(1, 1, 8, 8)), r"`x` must have shape \(B, in_chans=3, .* \(1, 1, 8"),
        (lambda: dla.create_model("resnet18"), "`name` must be one of resnet20, resnet20_lii, .* got 'resnet18'"),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()
