from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers import assert_close, gradients
from torch import nn

import dla
from dla.benchmarks import literal
from dla.cells import State
from dla.stage import create_stage

CHANNELS = 32


class SmoothBlock(nn.Module):
    """A residual block without a kink: near a ReLU's, two correct implementations give different gradients."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.drop_path = nn.Identity()
        self.act = nn.Tanh()

    def branches(self, x):
        return self.conv(x).tanh(), x

    def forward(self, x):
        branch, shortcut = self.branches(x)
        return self.act(branch + shortcut)


def build(depth, interaction, config=dla.PAPER, **kwargs):
    torch.manual_seed(3)
    stage = create_stage([SmoothBlock(CHANNELS) for _ in range(depth)], CHANNELS, interaction, config=config, **kwargs)
    for module in stage.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Maps that stay of one size keep the softmax away from 0 and 1, where its gradients cancel.
            nn.init.uniform_(module.weight, 0.05, 0.15)
    return stage.double()


def assert_same(stage, expected_forward, limit, batch=3):
    """Outputs and the gradients of the input and of every parameter."""
    x = torch.randn(batch, CHANNELS, 4, 3, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*stage.named_parameters(), strict=True)
    inputs = (x, *parameters)
    got, expected = stage(x), expected_forward(stage, x)
    assert_close(got, expected, limit)
    got, expected = gradients([got], inputs), gradients([expected], inputs)
    largest = max(g.norm() for g in expected)
    for name, a, b in zip(("x", *names), got, expected, strict=True):
        if b.norm() < 1e-14 * largest:
            # Zero in exact arithmetic, as a first layer's query, whose softmax has but one key.
            assert (a - b).norm() <= 1e-14 * largest, f"gradient of {name}"
        else:
            assert_close(a, b, limit, f"gradient of {name}")


@pytest.mark.parametrize("depth", [1, 2, 7, 36])
@pytest.mark.parametrize("config", ["paper", "official", "released"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_lazy_dla_b_is_the_literal_one(depth, config, mode):
    stage = build(depth, "dla_b", dla.CONFIGS[config]).train(mode == "train")
    assert_same(stage, literal.base_stage, 1e-12)


@pytest.mark.parametrize("depth", [1, 2, 7, 36])
@pytest.mark.parametrize("config", ["paper", "official", "released"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dla_l_is_the_literal_one(depth, config, mode):
    stage = build(depth, "dla_l", dla.CONFIGS[config]).train(mode == "train")
    assert_same(stage, literal.light_stage, 1e-12)


@pytest.mark.parametrize(
    ("cache", "gate", "context"), [*product(["input", "key_value"], ["context", "hidden"], ["own", "first"])]
)
def test_every_field_of_dla_b_alone(cache, gate, context):
    stage = build(3, "dla_b", replace(dla.PAPER, cache=cache, gate=gate, context=context))
    assert_same(stage, literal.base_stage, 1e-12)


@pytest.mark.parametrize(
    ("carry", "gate", "carry_conv", "context"),
    [*product(["output", "shortcut"], ["context", "hidden"], [False, True], ["own", "first"])],
)
def test_every_field_of_dla_l_alone(carry, gate, carry_conv, context):
    config = replace(dla.PAPER, carry=carry, gate=gate, carry_conv=carry_conv, context=context)
    assert_same(build(3, "dla_l", config), literal.light_stage, 1e-12)


@pytest.mark.parametrize(
    ("dsu", "initial_state", "activation"),
    [*product(["joint", "split"], ["random", "zeros"], [None, "identity", "tanh", "relu", "sigmoid"])],
)
def test_every_field_of_the_cell_alone(dsu, initial_state, activation):
    config = replace(dla.PAPER, dsu=dsu, initial_state=initial_state, activation=activation)
    assert_same(build(3, "dla_b", config), literal.base_stage, 1e-12)
    assert_same(build(3, "dla_l", config), literal.light_stage, 1e-12)


@pytest.mark.parametrize("cell", ["dsu", "dia", "lstm", "rnn"])
def test_every_cell_inside_dla(cell):
    assert_same(build(3, "dla_b", cell=cell), literal.base_stage, 1e-12)
    assert_same(build(3, "dla_l", cell=cell), literal.light_stage, 1e-12)


@pytest.mark.parametrize("config", [dla.PAPER, dla.OFFICIAL])
def test_mrla_is_dla_without_the_refresh(config):
    """The same stage, its cell taken away: no second code path."""
    for form, forward in (("b", literal.base_stage), ("l", literal.light_stage)):
        dynamic, static = build(3, f"dla_{form}", config), build(3, f"mrla_{form}", config)
        assert type(dynamic) is type(static)
        assert static.cell is None
        assert_same(static, forward, 1e-12)
        dynamic.cell = dynamic.carry_conv = None
        static.load_state_dict(dynamic.state_dict())
        x = torch.randn(2, CHANNELS, 4, 3, dtype=torch.float64)
        assert torch.equal(dynamic(x), static(x))


@pytest.mark.parametrize("cell", ["dsu", "dia", "lstm", "rnn"])
def test_lii_is_the_equation(cell):
    def written_out(stage, x):
        h = c = torch.zeros(len(x), CHANNELS, dtype=x.dtype)
        for block in stage.blocks:
            branch, shortcut = block.branches(x)
            h, c, _ = stage.cell(branch.mean((2, 3)), State(h, c))
            x = block.act(shortcut + branch * h[:, :, None, None])
        return x

    assert_same(build(4, "lii", cell=cell), written_out, 1e-12)


@pytest.mark.parametrize("interaction", ["lii", "mrla_b", "mrla_l", "dla_b", "dla_l"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("config", ["paper", "official"])
def test_every_parameter_gets_a_gradient(interaction, depth, config):
    """A parameter without one stops distributed training."""
    stage = build(depth, interaction, dla.CONFIGS[config])
    stage(torch.randn(2, CHANNELS, 4, 3, dtype=torch.float64)).square().sum().backward()
    assert [name for name, p in stage.named_parameters() if p.grad is None] == []


def test_attention_maps():
    model = dla.resnet_cifar(56, "dla_b").double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    maps = dla.layer_attention_maps(model, x)
    assert [m.shape for m in maps] == [(2, heads, 6, 6) for heads in (2, 4, 8)]
    for stage in maps:
        assert_close(stage.sum(-1), torch.ones_like(stage.sum(-1)), 1e-6)
        assert torch.equal(stage, stage.tril())
        assert stage[..., 0, 0].eq(1).all()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_attention_maps_are_those_that_the_model_uses():
    """A stage's output from its last row of weights, and uniform weights where the query is zero."""
    stage = build(3, "mrla_b").eval()
    x = torch.randn(2, CHANNELS, 4, 3, dtype=torch.float64)
    last, values = stage.attention[-1], []
    hooks = [a.register_forward_pre_hook(lambda m, args: values.append(m.value(args[0]))) for a in stage.attention]
    seen = []
    hooks.append(last.register_forward_pre_hook(lambda m, args: seen.append(args[0])))
    weights = dla.layer_attention_maps(stage, x)[0][:, 0, 2]  # [B, T]: one head of all channels
    o = torch.einsum("bt,tbchw->bchw", weights, torch.stack(values))
    assert_close(stage(x), seen[0] + last.bn(o).relu(), 1e-13)
    for hook in hooks:
        hook.remove()
    torch.nn.init.zeros_(last.query.weight)
    uniform = dla.layer_attention_maps(stage, x)[0][:, 0, 2]
    assert_close(uniform, torch.full_like(uniform, 1 / 3), 1e-14)


def test_attention_maps_need_a_softmax_over_layers():
    with pytest.raises(ValueError, match="`model` has no softmax over layers: build it with interaction mrla_b or"):
        dla.layer_attention_maps(dla.resnet_cifar(20, "dla_l"), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": []}, "`blocks` must hold at least one residual block, got an empty stage"),
        ({"interaction": "dla"}, "`interaction` must be None or one of lii, mrla_b, mrla_l, dla_b, dla_l, got 'dla'"),
        ({"cell": "gru"}, "`cell` must be one of rnn, lstm, dia, dsu, got 'gru'"),
        ({"reduction": 33}, "`reduction` must be between 1 and the 32 channels, got 33"),
        ({"head_dim": 24}, "`head_dim` must divide the 32 channels, got 24"),
        ({"drop_path": 1.0}, r"`drop_path` must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_input(change, message):
    good = {"blocks": [SmoothBlock(CHANNELS)] * 2, "channels": CHANNELS, "interaction": "dla_b"}
    with pytest.raises(ValueError, match=message):
        create_stage(**good | change)
