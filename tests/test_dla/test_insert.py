import copy
import io
import pickle

import pytest
import timm
import torch
import torchvision
from helpers import assert_close
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import nn

import dla
from dla.resnet import Bottleneck
from dla.stage import INTERACTIONS, create_stage

SMALL = {"layers": (2, 2, 1, 1), "channels": (32, 32, 64, 32), "num_classes": 5}
NETWORKS = {
    "torchvision": lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 1, 1, 1], 5),
    "torchvision_resnext": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], 5, groups=8, width_per_group=4
    ),
    "resnet_d": lambda: timm.create_model("resnet18d", **SMALL),
    "resnext": lambda: timm.create_model("resnext50_32x4d", **SMALL),
    "seresnet": lambda: timm.create_model("seresnet50", **SMALL, drop_path_rate=0.1),
    "ecaresnet_t": lambda: timm.create_model("ecaresnet26t", **SMALL),
    "seresnet_ts": lambda: ByobNet(
        ByoModelCfg(
            tuple(ByoBlockCfg("bottle", d=2, c=c, s=s, gs=0, br=0.5) for c, s in ((32, 1), (64, 2))),
            stem_chs=16,
            act_layer="silu",
            attn_layer="se",
        ),
        num_classes=5,
    ),
    "own": lambda: dla.resnet_cifar(20, num_classes=5),
}


def network(name="resnet_d"):
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as if it were trained
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return model


def images(batch=4, dtype=torch.float32):
    return torch.randn(batch, 3, 32, 32, dtype=dtype)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_starts_as_the_network_that_it_was(name, interaction):
    """To the last bit, in inference and in training, and so the running statistics: a block runs but once."""
    model = network(name)
    config = dla.OFFICIAL if interaction.endswith("_l") else dla.PAPER
    inserted = dla.insert(model, interaction, config=config, cell="dia" if interaction == "lii" else "dsu")
    own = model.state_dict().keys()
    assert list(own) == [key for key in inserted.state_dict() if key in own]
    new = inserted.state_dict().keys() - own
    assert all(".attention." in key or ".cell." in key or ".carry_conv." in key for key in new)
    assert any(".cell." in key for key in new) == (not interaction.startswith("mrla"))
    x = images()
    assert torch.equal(inserted.eval()(x), model.eval()(x))
    with torch.no_grad():
        assert torch.equal(inserted(x), model(x))
    inserted.train()
    model.train()
    torch.manual_seed(1)  # drop path
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(inserted(x), expected)
    after = inserted.state_dict()
    assert all(torch.equal(after[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_zeros_stay_zeros(interaction):
    """Features that a ReLU cut off, with and without gradients, which do flow in eval mode."""
    model = network().eval()
    inserted = dla.insert(model, interaction).eval()
    x = images()
    expected, got = model.forward_features(x), inserted.forward_features(x)
    assert (expected == 0).any()
    assert torch.equal(got, expected)
    with torch.no_grad():
        assert torch.equal(inserted.forward_features(x), expected)
    got.square().sum().backward()
    for module in inserted.modules():
        if isinstance(module, dla.attention.BaseLayerAttention):
            assert module.bn.weight.grad.norm() > 0


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("config", ["paper", "official"])
def test_then_it_learns(interaction, config):
    """No new parameter is left without a gradient, and what starts at zero leaves it."""
    model = network()
    inserted = dla.insert(model, interaction, config=dla.CONFIGS[config])
    optimizer = torch.optim.SGD(inserted.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        inserted(images()).square().sum().backward()
        optimizer.step()
    new = {n: p for n, p in inserted.named_parameters() if n not in dict(model.named_parameters())}
    assert all(p.grad is not None for p in new.values())
    starts_at_zero = [p for n, p in new.items() if n.endswith(".bn.weight")]
    if interaction == "lii":
        starts_at_zero = [p for m in inserted.modules() if isinstance(m, dla.cells.DSU) for p in m.weights[-2:]]
    assert starts_at_zero
    assert all(p.abs().max() > 1e-6 for p in starts_at_zero)
    assert inserted(images()).isfinite().all()


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("config", ["paper", "official", "released"])
def test_computes_what_a_stage_of_this_package_computes(interaction, config):
    """There blocks offer shortcut and branch, here they are taken from blocks that run as they are."""
    torch.manual_seed(2)
    blocks = nn.Sequential(Bottleneck(16, 8, 2), Bottleneck(32, 8), Bottleneck(32, 8)).double()
    stage = create_stage(blocks, 32, interaction, config=dla.CONFIGS[config]).double()
    inserted = dla.insert(blocks, interaction, config=dla.CONFIGS[config], reduction=4)
    inserted.gain = 1.0
    inserted.load_state_dict({key.replace("blocks.", ""): value for key, value in stage.state_dict().items()})
    x = torch.randn(3, 16, 6, 6, dtype=torch.float64)
    expected, got = stage(x), inserted(x)
    assert_close(got, expected, 1e-12)
    direction = torch.randn_like(got)
    expected.backward(direction)
    got.backward(direction)
    theirs, stats = dict(inserted.named_parameters()), inserted.state_dict()
    for name, p in stage.named_parameters():
        other = theirs[name.replace("blocks.", "")].grad
        assert (other - p.grad).norm() <= 1e-11 * max(p.grad.norm(), 1), name
    for name, value in stage.state_dict().items():
        assert_close(stats[name.replace("blocks.", "")], value, 1e-12, name)


def test_the_branch_of_a_foreign_block_is_gated_before_drop_path():
    """Layer-wise integration, written out with torchvision's blocks."""
    model = network("torchvision").double().eval()
    inserted = dla.insert(model, "lii", stages="layer1")
    cell = inserted.layer1.cell
    for parameter in cell.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 64, 6, 5, dtype=torch.float64)
    got, state = inserted.layer1(x), None
    for block in model.layer1:
        branch = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
        state = cell(branch.mean((2, 3)), state or cell.initial_state(branch))
        x = torch.relu(x + 2 * branch * state.hidden[..., None, None])
    assert_close(got, x, 1e-13)


def test_only_the_stages_that_are_named():
    inserted = dla.insert(network(), "dla_l", stages=["layer3", "layer1"])
    assert {row.layer for row in dla.fusion_report(inserted)} == {"layer1", "layer3"}
    assert type(inserted.layer2) is nn.Sequential
    one = dla.insert(inserted, "dla_b", stages="layer2", inplace=True)
    assert one is inserted
    assert {row.was for row in dla.fusion_report(one)} == {"InsertedLightStage", "InsertedBaseStage"}
    assert dla.layer_attention_maps(one, images(2))[0].shape == (2, 1, 2, 2)
    assert {row.backend for row in dla.fusion_report(dla.fuse(one, backend="reference"))} == {"reference"}


def test_the_model_is_left_unless_in_place():
    model = network()
    state, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    inserted = dla.insert(model, "lii")
    assert list(model.modules()) == modules
    assert not any(m._forward_hooks for m in modules)
    inserted(images())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    seen = []
    layer1, block = model.layer1, model.layer1[1]
    layer1.register_forward_hook(lambda m, args, out: seen.append(out))
    assert dla.insert(model, "dla_b", inplace=True) is model
    out = model.layer1(torch.randn(2, 64, 8, 8))
    assert model.layer1 is layer1  # so are its hooks, and whoever else holds it
    assert seen[0] is out
    assert layer1[1] is layer1.blocks[1] is block


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_removed_again(interaction):
    """The network that it was, with its weights as they are after a step of training."""
    model = network()
    classes, attributes = ([type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()])
    inserted = dla.insert(model, interaction, config=dla.OFFICIAL)
    optimizer = torch.optim.SGD(inserted.parameters(), 0.01)
    inserted(images()).square().sum().backward()
    optimizer.step()
    plain = dla.remove(dla.fuse(inserted, backend="reference"))
    assert [type(m) for m in plain.modules()] == classes
    assert [set(vars(m)) for m in plain.modules()] == attributes
    assert not any(m._forward_hooks for m in plain.modules())
    assert dla.fusion_report(inserted)
    model.load_state_dict({k: v for k, v in inserted.state_dict().items() if k in model.state_dict()})
    x = images()
    assert torch.equal(plain.eval()(x), model.eval()(x))
    assert dla.remove(inserted, inplace=True) is inserted
    assert torch.equal(inserted.eval()(x), model(x))
    with pytest.raises(ValueError, match="`model` has no layer interaction that was inserted"):
        dla.remove(inserted)


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_state_dicts(interaction):
    """Its own go round, those of the network without layer interaction fill what they hold."""
    model = network()
    inserted = dla.insert(model, interaction, config=dla.OFFICIAL)
    for name, parameter in inserted.named_parameters():
        if "attention" in name:
            nn.init.normal_(parameter)
    other = dla.insert(network(), interaction, config=dla.OFFICIAL)
    other.load_state_dict(inserted.state_dict())
    assert torch.equal(other.eval()(x := images()), inserted.eval()(x))
    pretrained = dla.insert(network(), interaction)
    missing, unexpected = pretrained.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert not set(missing) & set(model.state_dict())
    assert torch.equal(pretrained.eval()(x), model.eval()(x))


@pytest.mark.parametrize("interaction", ["lii", "dla_l"])
def test_what_timm_offers(interaction):
    inserted = dla.insert(network("ecaresnet_t"), interaction, config=dla.OFFICIAL).eval()
    x = images(2)
    features = inserted.forward_features(x)
    assert torch.equal(inserted.forward_head(features), inserted(x))
    maps = inserted.forward_intermediates(x, intermediates_only=True)
    assert torch.equal(maps[-1], features)
    listed = timm.models.FeatureListNet(copy.deepcopy(inserted), out_indices=(1, 2, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(listed(x), maps[1:], strict=True))
    net = timm.create_model("resnet18d", features_only=True, **{**SMALL, "num_classes": 0})
    before = net.eval()(x)
    net = dla.insert(net, interaction).eval()
    assert all(torch.equal(a, b) for a, b in zip(net(x), before, strict=True))
    assert len(dla.fusion_report(net)) == 4


def test_activation_checkpointing_does_not_pass_by_the_attention():
    torch.manual_seed(1)
    inserted = dla.insert(network(), "dla_l", config=dla.OFFICIAL).double().eval()
    for module in inserted.modules():
        if isinstance(module, dla.attention.LightLayerAttention):
            nn.init.normal_(module.bn.weight)
    other = copy.deepcopy(inserted)
    other.set_grad_checkpointing()
    x = images(2, torch.float64).requires_grad_()
    for model in (inserted, other):
        model(x).square().sum().backward()
    for (name, a), b in zip(inserted.named_parameters(), other.parameters(), strict=True):
        assert_close(b.grad, a.grad, 1e-12, name)


@pytest.mark.parametrize("interaction", ["lii", "dla_b", "dla_l"])
def test_copies_and_pickles(interaction):
    inserted = dla.insert(network(), interaction, config=dla.OFFICIAL).eval()
    x = images(2)
    expected = inserted(x)
    file = io.BytesIO()
    torch.save(inserted, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(inserted), pickle.loads(pickle.dumps(inserted)), loaded):
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize(("interaction", "config"), [("lii", dla.PAPER), ("dla_l", dla.OFFICIAL)])
def test_compiles_to_one_graph_and_exports(interaction, config):
    inserted = dla.insert(network(), interaction, stages=["layer2"], config=config).double()
    for module in inserted.layer2.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    eager = copy.deepcopy(inserted)
    x = images(4, torch.float64)
    got, expected = torch.compile(inserted, fullgraph=True, backend="aot_eager")(x), eager(x)
    assert_close(got, expected, 1e-12)
    got.square().sum().backward()
    expected.square().sum().backward()
    for (name, a), b in zip(eager.named_parameters(), inserted.named_parameters(), strict=True):
        assert (b[1].grad - a.grad).norm() <= 1e-9 * max(a.grad.norm(), 1), name
    for (name, a), b in zip(eager.named_buffers(), inserted.buffers(), strict=True):
        assert_close(b, a, 1e-12, name)
    inserted.eval()
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(inserted, (x,), dynamic_shapes=(batch,)).module()
    x = images(3, torch.float64)
    assert_close(program(x), inserted(x), 1e-12)


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_channels_last_and_autocast(interaction):
    model = network().eval()
    inserted = dla.insert(model, interaction, config=dla.OFFICIAL)
    x = images()
    expected = inserted(x)
    inserted = inserted.to(memory_format=torch.channels_last)
    seen = []
    inserted.layer3.register_forward_hook(lambda m, args, out: seen.append(out))
    assert_close(inserted(x.contiguous(memory_format=torch.channels_last)), expected, 1e-5)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got, expected = inserted(x), model(x)
    assert seen[1].dtype == torch.bfloat16
    assert_close(got, expected, 0.02)


def test_dtypes_and_devices():
    """New parameters are at least float32; the meta device has no numbers to look at, a copy of the blocks has."""
    inserted = dla.insert(network().bfloat16(), "dla_b").eval()
    stage = inserted.layer1
    assert {p.dtype for p in (*stage.attention.parameters(), *stage.cell.parameters())} == {torch.float32}
    assert inserted(images().bfloat16()).dtype == torch.bfloat16
    assert {p.dtype for p in dla.insert(network().double(), "dla_b").parameters()} == {torch.float64}
    with torch.device("meta"):
        model = NETWORKS["resnet_d"]()
    assert {p.device.type for p in dla.insert(model, "lii").parameters()} == {"meta"}


def test_pre_activation_blocks():
    """Their output has no activation, and the last that runs is the branch itself."""
    model = timm.create_model("resnetv2_50", layers=(1, 2, 1, 1), channels=(32, 64, 64, 64), num_classes=3).eval()
    x = images(2)
    for interaction in ("dla_l", "lii"):
        assert torch.equal(dla.insert(model, interaction, config=dla.OFFICIAL)(x), model(x))


class Odd(nn.Module):
    downsample = None

    def __init__(self, *, residual=True):
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.residual = residual

    def forward(self, x):
        return (x * self.conv(x)).tanh() if self.residual else self.conv(x.flatten(1))


NO_STAGE = (
    "`model` has no stage that takes a layer interaction, an nn.Sequential of blocks that have a `downsample` or "
    r"`shortcut` and end with act\(branch \+ shortcut\)"
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dla.insert(nn.Linear(2, 2), "dla_l"), NO_STAGE + "$"),
        (lambda: dla.insert(timm.create_model("test_vit"), "dla_l"), NO_STAGE + "$"),
        (
            lambda: dla.insert(nn.Sequential(Odd()), "dla_l"),
            NO_STAGE + r"; the model: its block 0 does not end with act\(branch \+ shortcut\)$",
        ),
        (
            lambda: dla.insert(nn.Sequential(nn.Sequential(Odd(residual=False))), "dla_l"),
            NO_STAGE + r"; 0: its block 0 does not take a map \(RuntimeError: .*",
        ),
        (
            lambda: dla.insert(nn.Sequential(Bottleneck(32, 8), Bottleneck(32, 8, 2)), "dla_l"),
            NO_STAGE + "; the model: its blocks give maps of different shapes$",
        ),
        (lambda: dla.insert(dla.resnet_cifar(20, "dla_l"), "dla_l"), NO_STAGE + "; layer1 has one already; layer2 has"),
        (lambda: dla.insert(network(), "dla"), "`interaction` must be one of lii, mrla_b, mrla_l, .* got 'dla'"),
        (
            lambda: dla.insert(network(), "dla_l", stages=["layer5"]),
            r"`stages` must be of layer1, layer2, layer3, layer4, got 'layer5' \(no stage\)",
        ),
        (lambda: dla.insert(network(), "dla_l", stages=[]), r"`stages` must be different ones of layer1, .* got \[\]"),
        (
            lambda: dla.insert(network(), "lii", cell="rnn"),
            "`cell` must be dsu or dia with the activation sigmoid for lii to start as the identity, got 'rnn'",
        ),
        (
            lambda: dla.insert(network(), "lii", config=dla.Config(activation="tanh")),
            "`cell` must be dsu or dia .* got 'dsu' with tanh",
        ),
        (
            lambda: dla.insert(network(), "dla_l", head_dim=64),
            "`head_dim` must divide the 32 channels, got 64, for the stage layer1",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_is_half_inserted():
    model = network()
    with pytest.raises(ValueError, match="`head_dim` must divide the 32 channels, got 64"):
        dla.insert(model, "dla_l", stages=["layer3", "layer1"], head_dim=64, inplace=True)
    assert not dla.fusion_report(model)
