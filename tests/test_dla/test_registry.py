"""What timm's own tests ask of a model, and its optimisers; its names and defaults."""

import subprocess
import sys

import pytest
import timm
import torch
from helpers import assert_close
from timm.optim import create_optimizer_v2

import dla
from dla.resnet import IMAGENET_STAGES

CIFAR = ["resnet20", *(f"resnet20_{i}" for i in dla.stage.INTERACTIONS)]
IMAGENET = ["resnet50_dla_l", "resnet50_mrla_b"]


def images(model, batch, size=None):
    channels, *full = model.default_cfg["input_size"]
    return torch.randn(batch, channels, *([size] * 2 if size else full))


def test_every_model_is_registered_once():
    ours = {name for name in timm.list_models(module="registry") if name.startswith("resnet")}
    plain = {f"resnet{depth}" for depth in IMAGENET_STAGES}
    assert ours == set(dla.list_models()) - plain
    assert timm.model_entrypoint("resnet50").__module__ == "timm.models.resnet"
    assert {f"resnet{d}_{i}" for d in (50, 101, 152) for i in ("dla_l", "dla_b", "mrla_l", "mrla_b")} <= ours


def test_they_are_those_of_create_model():
    torch.manual_seed(3)
    ours = dla.create_model("resnet20_dla_l", config=dla.OFFICIAL, drop_path_rate=0.1, num_classes=3, in_chans=1)
    torch.manual_seed(3)
    timms = timm.create_model("resnet20_dla_l", config=dla.OFFICIAL, drop_path_rate=0.1, num_classes=3, in_chans=1)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), timms.state_dict().values(), strict=True))
    assert [m.drop_path for m in timms.modules() if hasattr(m, "lambda_")] == [0.1] * 6


@pytest.mark.parametrize("name", CIFAR + IMAGENET)
def test_forward_and_checkpointing(name):
    model = timm.create_model(name).eval()
    x = images(model, 1, 32)
    out = model(x)
    assert out.shape == (1, model.num_classes)
    assert not out.isnan().any()
    model.set_grad_checkpointing()
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("name", CIFAR)
def test_checkpointing_changes_no_gradient(name):
    model, other = (timm.create_model(name).double() for _ in range(2))
    other.load_state_dict(model.state_dict())
    other.set_grad_checkpointing()
    x = images(model, 3, 16).double()
    runs = []
    for m, stage in ((model, model.layer3), (other, other.layer3)):
        stage.register_forward_pre_hook(lambda *_, m=m: runs.append(m))
        m(x).square().sum().backward()
    assert [m is other for m in runs] == [False, True, True]
    for (key, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-10 * max(a.grad.norm(), 1), key
    other.set_grad_checkpointing(False)
    assert not other.grad_checkpointing


@pytest.mark.parametrize("name", CIFAR + IMAGENET)
def test_backward_reaches_every_parameter(name):
    model = timm.create_model(name, num_classes=42)
    out = model(images(model, 2, 32 if name in CIFAR else 64))
    assert out.shape == (2, 42)
    out.mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["resnet20_dla_b", "resnet20_lii", "resnet50_dla_l"])
def test_default_configuration(name):
    model = timm.create_model(name).eval()
    cfg, state, pool = model.default_cfg, model.state_dict(), model.default_cfg["pool_size"]
    x = images(model, 1)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (1, model.num_features, *pool)
        pre_logits = model.forward_head(features, pre_logits=True)
        assert pre_logits.shape == (1, model.head_hidden_size)
        assert_close(model.get_classifier()(pre_logits), model(x), 1e-6)
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert torch.equal(model(x), pre_logits)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), features)
        model.reset_classifier(5, "avg")
        assert model(x).shape == (1, 5)
    assert timm.create_model(name, num_classes=0, global_pool="").eval()(x).shape == features.shape
    assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= state.keys()
    assert timm.data.resolve_data_config(model=model)["input_size"] == cfg["input_size"] == tuple(x.shape[1:])


@pytest.mark.parametrize("name", CIFAR + IMAGENET)
def test_features(name):
    model = timm.create_model(name).eval()
    features = timm.create_model(name, features_only=True).eval()
    features.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("fc.")})
    x = images(model, 1, 64)
    maps = features(x)
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == features.feature_info.reduction()
    assert torch.equal(maps[-1], model.forward_features(x))
    assert len(timm.create_model(name, features_only=True, out_indices=(1, 3))(x)) == 2


@pytest.mark.parametrize("name", ["resnet20_dla_b", "resnet50_dla_l"])
@pytest.mark.parametrize("feature_cls", ["getter", "fx"])
def test_other_ways_to_features(name, feature_cls):
    """By intermediates, with the rest of the model dropped, and by torch.fx, to which a stage is one node."""
    model = timm.create_model(name).eval()
    x = images(model, 1, 64)
    output, maps = model.forward_intermediates(x)
    assert output is maps[-1]
    assert torch.equal(output, model.forward_features(x))
    net = timm.create_model(name, features_only=True, feature_cls=feature_cls, out_indices=(1, 2)).eval()
    kept = {k.removeprefix("model.").removeprefix("graph_module."): k for k in net.state_dict()}
    assert not any(k.startswith(("layer3", "layer4", "fc")) for k in kept)
    net.load_state_dict({kept[k]: v for k, v in model.state_dict().items() if k in kept})
    assert all(torch.equal(a, b) for a, b in zip(net(x), maps[1:3], strict=True))


def test_intermediates():
    model = timm.create_model("resnet20_dla_l").eval()
    x = images(model, 2, 16)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    runs = []
    model.layer3.register_forward_hook(lambda *_: runs.append(1))
    output, (first, third) = model.forward_intermediates(x, [0, -2], stop_early=True)
    assert not runs
    assert [torch.equal(a, b) for a, b in ((first, maps[0]), (third, maps[2]), (output, maps[2]))] == [True] * 3
    (last,) = model.forward_intermediates(x, 1, intermediates_only=True)
    assert torch.equal(last, maps[3])
    assert model.prune_intermediate_layers([0, 1], prune_head=False) == [0, 1]
    assert torch.equal(model(x), maps[1])
    assert dla.ResNet(**model.arguments | {"config": dla.PAPER}).state_dict().keys() == model.state_dict().keys()
    assert model.prune_intermediate_layers([0]) == [0]
    assert torch.equal(model(x), maps[0])


def test_devices_and_dtypes():
    model = timm.create_model("resnet20_dla_l", device="meta", dtype=torch.bfloat16)
    assert {(t.device.type, t.dtype) for t in model.parameters()} == {("meta", torch.bfloat16)}
    model.eval().reset_classifier(0, "")
    model.reset_classifier(7)
    assert (model.fc.weight.device.type, model.fc.weight.dtype, model.fc.training) == ("meta", torch.bfloat16, False)
    assert model(images(model, 2, 16).to("meta", torch.bfloat16)).shape == (2, 7)


def test_weight_decay_leaves_lambda_out():
    model = timm.create_model("resnet20_dla_l")
    assert model.no_weight_decay() == {name for name, _ in model.named_parameters() if name.endswith("lambda_")}
    assert len(model.no_weight_decay()) == 3
    names = {p: name for name, p in model.named_parameters()}
    for group in create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.1).param_groups:
        lambdas = [names[p] for p in group["params"] if names[p].endswith("lambda_")]
        assert bool(lambdas) == (group["weight_decay"] == 0)


def test_layer_wise_learning_rates():
    model = timm.create_model("resnet20_dla_l")
    optimizer = create_optimizer_v2(model, "adamw", lr=0.1, layer_decay=0.5)
    assert sorted({group["lr_scale"] for group in optimizer.param_groups}) == [0.0625, 0.125, 0.25, 0.5, 1.0]


def test_dropout_before_the_classifier():
    model = timm.create_model("resnet20", drop_rate=0.5, num_classes=0)
    assert 0.4 < model(images(model, 8)).eq(0).double().mean() < 0.6
    assert not model.eval()(images(model, 8)).eq(0).all(0).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_pool": "max"}, r"`global_pool` must be \"avg\", or \"\" with `num_classes` 0, got 'max' with 10"),
        ({"global_pool": ""}, r"`global_pool` must be \"avg\", or \"\" with `num_classes` 0, got '' with 10"),
        ({"features_only": True, "feature_cls": "getter", "out_indices": (1, 4)}, "`indices` must be of the 4 levels"),
        ({"drop_rate": 1.0}, r"`drop_rate` must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("resnet20_dla_l", **arguments)


@pytest.mark.parametrize(
    "code",
    [
        "import dla; assert 'timm' not in sys.modules; import timm; assert timm.is_model('resnet50_dla_l')",
        "import timm, dla; assert timm.is_model('resnet50_dla_l')",
        "import dla; assert importlib.util.find_spec('timm'); import timm; assert timm.is_model('resnet50_dla_l');"
        "assert not any('when_imported' in type(f).__module__ for f in sys.meta_path)",
        "sys.modules['timm'] = None; import dla; dla.create_model('resnet20_dla_l')",
        "import timm.models, warnings; del timm.models.register_notrace_module; warnings.simplefilter('ignore');"
        "import dla; dla.create_model('resnet20_dla_l'); assert not timm.is_model('resnet50_dla_l');"
        "warnings.simplefilter('error'); import pytest; from dla.when_imported import import_with;"
        "pytest.raises(UserWarning, import_with, 'timm', 'dla.registry').match('was not imported with timm: cannot')",
    ],
    ids=["dla first", "timm first", "looked up first", "without timm", "another timm"],
)
def test_imports(code):
    subprocess.run([sys.executable, "-c", f"import importlib.util, sys; {code}"], check=True)
