"""Bad input: one clear sentence, naming the op, the argument, what was given and what is allowed."""

import pytest
import torch
from helpers import dsu_weights

import dla_kernels
from dla_kernels import BatchNorm, checks
from dla_kernels.checks import remembered
from dla_kernels.ops.layer_attention import Layer

B, T, C = 2, 3, 32
STATE = torch.randn(B, C)
MAP = torch.randn(B, C, 4, 4)
LAYERS = torch.randn(B, T, C)
WEIGHTS = dsu_weights("joint", C, 4, torch.float32)
STENCIL = torch.randn(C, 1, 3, 3)
VECTOR = torch.randn(C)
FILTER = torch.randn(1, 1, 3)
NORM = BatchNorm(VECTOR, VECTOR)
PIXEL = MAP[:1, :, :1, :1]

GOOD = {
    "gap_dsu": {"x": MAP, "h": STATE, "c": STATE, "weights": WEIGHTS},
    "refresh_gates": {"features": LAYERS, "gates": LAYERS, "h": STATE, "c": STATE, "weights": WEIGHTS},
    "layer_attention": {
        "x": MAP, "features": LAYERS, "gates": LAYERS, "query_weight": FILTER, "key_weights": torch.cat([FILTER] * T),
        "value_weight": STENCIL, "norm": NORM, "prior": [Layer(MAP, STATE, STATE)] * (T - 1),
    },
    "light_update": {
        "x": MAP, "y": STATE, "query_weight": FILTER, "key_weight": FILTER, "value_weight": STENCIL, "norm": NORM,
        "carried": MAP, "carry_scale": VECTOR, "gate": STATE, "carry_weight": STENCIL,
    },
    "norm_residual": {"x": MAP, "o": MAP, "norm": NORM},
    "pack_dsu": {"weights": WEIGHTS},
}  # fmt: skip

NO_CARRY = {"carried": None, "carry_scale": None, "gate": None, "carry_weight": None}

BAD = [
    ("gap_dsu", {"x": MAP[0]}, r"`x` must have shape \(B, C, H, W\), got \(32, 4, 4\)"),
    ("gap_dsu", {"x": MAP.int()}, r"`x` must be one of torch.float32, .* got torch.int32"),
    ("gap_dsu", {"x": [1.0]}, r"`x` must be a tensor, got list"),
    ("gap_dsu", {"h": STATE[:, :31]}, r"`h` must have shape \(B=2, C=32\), got \(2, 31\)"),
    ("gap_dsu", {"c": STATE.bfloat16()}, r"`c` must be torch.float32 .* got torch.bfloat16"),
    ("gap_dsu", {"c": STATE.to("meta")}, r"`c` must be on the device of `x`, cpu, got meta"),
    ("gap_dsu", {"x": MAP.double()}, r"`h` must be torch.float64 .* got torch.float32"),
    ("gap_dsu", {"weights": WEIGHTS[:2]}, r"`weights` must hold 3 tensors .* or 8 .* got 2"),
    ("gap_dsu", {"weights": WEIGHTS[1:] + WEIGHTS[:1]}, r"`weights.w1` must have shape \(R, 64\), got \(96, 4\)"),
    ("gap_dsu", {"activation": "gelu"}, r"`activation` must be one of identity, tanh, relu, sigmoid, got 'gelu'"),
    ("refresh_gates", {"gates": LAYERS[:, 1:]}, r"`gates` must have shape \(B=2, T=3, C=32\), got \(2, 2, 32\)"),
    ("refresh_gates", {"gate": "output"}, r"`gate` must be one of context, hidden, got 'output'"),
    ("gap_dsu", {"carried": MAP}, r"`carried` must have shape \(B=2, C=32\), got \(2, 32, 4, 4\)"),
    ("gap_dsu", {"gate": "output"}, r"`gate` must be one of context, hidden, got 'output'"),
    (
        "gap_dsu",
        {"weights": dla_kernels.pack_dsu(dsu_weights("joint", 16, 4, torch.float32))},
        r"`weights` must be for 32 channels, got those for 16",
    ),
    ("pack_dsu", {"weights": WEIGHTS[:1]}, r"`weights` must hold 3 tensors .* or 8 .* got 1"),
    ("pack_dsu", {"weights": WEIGHTS[::-1]}, r"`weights.w1` must have shape"),
    ("layer_attention", {"prior": []}, r"`features` must have shape \(B=2, T=1, C=32\), got \(2, 3, 32\)"),
    ("layer_attention", {"prior": [MAP, MAP]}, r"`prior\[0\]` must be a layer as layer_attention returns it, got"),
    ("layer_attention", {"value_weight": FILTER}, r"`value_weight` must have shape \(C=32, 1, 3, 3\), got"),
    ("layer_attention", {"prior": [Layer(MAP.half(), STATE, STATE)] * 2}, r"`prior\[0\]` must have the dtype of `x`,"),
    ("layer_attention", {"prior": [Layer(MAP[..., :3], STATE, STATE)] * 2}, r"`prior\[0\]` must have shape .*W=4"),
    ("layer_attention", {"key_weights": torch.cat([FILTER] * 2)}, r"`key_weights` must hold .* 3 layers or one, got 2"),
    ("layer_attention", {"key_weights": FILTER[..., :1]}, r"`key_weights` must have shape \(filters, 1, K=3\), got"),
    ("layer_attention", {"query_weight": FILTER[..., :2]}, r"`query_weight` must have an odd length, got 2"),
    ("layer_attention", {"followers": -1}, r"`followers` must be at least 0, got -1"),
    ("layer_attention", {"head_dim": 24}, r"`head_dim` must divide the 32 channels, got 24"),
    ("light_update", {"carried": MAP.half()}, r"`carried` must have the dtype of `x`, torch.float32, got"),
    ("light_update", {"value_weight": STENCIL[:, :, :1]}, r"`value_weight` must have shape \(C=32, 1, 3, 3\), got"),
    ("light_update", {"carry_scale": None}, r"`carry_scale` must be a tensor, got NoneType"),
    ("light_update", NO_CARRY | {"gate": STATE}, r"`gate` goes with `carried`, which is None"),
    ("light_update", dict.fromkeys(("query_weight", "key_weight"), FILTER[..., :2]), r"`query_weight` must have an"),
    ("light_update", {"key_weight": torch.randn(1, 1, 5)}, r"`key_weight` must have shape \(1, 1, K=3\), got"),
    ("light_update", {"head_dim": 0}, r"`head_dim` must divide the 32 channels, got 0"),
    ("norm_residual", {"o": MAP[:1]}, r"`o` must have shape \(B=2, C=32, H=4, W=4\), got \(1, 32, 4, 4\)"),
    ("norm_residual", {"keep": torch.ones(3)}, r"`keep` must have shape \(B=2\), got \(3,\)"),
    ("norm_residual", {"relu": True}, r"`relu` must be one of None, 'branch', 'sum', got True"),
    ("norm_residual", {"norm": VECTOR}, r"`norm` must be a dla_kernels.BatchNorm, got Tensor"),
    ("norm_residual", {"norm": NORM._replace(bias=VECTOR.int())}, r"`norm.bias` must be floating point, got"),
    ("norm_residual", {"norm": NORM._replace(weight=None)}, r"`norm.weight` must be a tensor, got NoneType"),
    ("norm_residual", {"norm": NORM._replace(running_mean=STATE)}, r"`norm.running_mean` must have shape \(C=32\)"),
    ("norm_residual", {"norm": NORM._replace(num_batches_tracked=VECTOR)}, r"`norm.num_batches_tracked` must have"),
    ("norm_residual", {"norm": NORM._replace(num_batches_tracked=VECTOR[0])}, r"`norm.num_batches_tracked` must be"),
    ("norm_residual", {"norm": NORM._replace(training=False)}, r"`norm` must have running statistics where it is not"),
    ("norm_residual", {"x": PIXEL, "o": PIXEL}, r"BatchNorm in training needs more than one value per channel, got"),
]  # fmt: skip


@pytest.mark.parametrize("op", GOOD)
def test_the_good_calls_pass(op):
    assert getattr(dla_kernels, op)(**GOOD[op]) is not None


@pytest.mark.parametrize(("op", "changed", "message"), BAD, ids=[f"{op}-{'-'.join(c)}" for op, c, _ in BAD])
def test_names_argument_value_and_what_is_allowed(op, changed, message):
    getattr(dla_kernels, op)(**GOOD[op])
    for _ in range(2):  # what passes is remembered, what fails is not
        with pytest.raises(ValueError, match=rf"^{op}: {message}"):
            getattr(dla_kernels, op)(**GOOD[op] | changed)


def test_a_call_like_one_that_passed_is_not_checked_again():
    checked = []
    check = remembered(lambda *arguments: checked.append(arguments))
    norm = NORM._replace(training=False)
    calls = [
        (MAP, None, "sum"), (MAP, STATE, "sum"), (MAP, None, "branch"), (MAP.double(), None, "sum"),
        (MAP.to("meta"), None, "sum"), (MAP[..., :1], None, "sum"), (NORM,), (norm,), (tuple(NORM),), ([MAP],),
        ((MAP,),),
    ]  # fmt: skip
    for _ in range(2):
        for call in calls:
            check(*call)
        assert len(checked) == len(calls)
    check(MAP.clone(), None, "sum")
    assert len(checked) == len(calls)
    for _ in range(2):
        check({})  # what cannot be remembered is checked
    assert len(checked) == len(calls) + 2


def test_a_check_does_not_remember_without_end(monkeypatch):
    monkeypatch.setattr(checks, "REMEMBERED", 3)
    checked = []
    check = remembered(checked.append)
    for size in (1, 2, 3, 4, 4, 1):
        check(torch.empty(size))
    assert [len(t) for t in checked] == [1, 2, 3, 4, 1]
