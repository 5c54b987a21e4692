"""Bad input: one clear sentence, naming the op, the argument, what was given and what is allowed."""

import pytest
import torch
from helpers import dsu_weights

import dla_kernels

B, T, C = 2, 3, 32
STATE = torch.randn(B, C)
MAP = torch.randn(B, C, 4, 4)
LAYERS = torch.randn(B, T, C)
WEIGHTS = dsu_weights("joint", C, 4, torch.float32)
STENCIL = torch.randn(C, 1, 3, 3)
VECTOR = torch.randn(C)

GOOD = {
    "gap_dsu": {"x": MAP, "h": STATE, "c": STATE, "weights": WEIGHTS},
    "refresh_gates": {"features": LAYERS, "gates": LAYERS, "h": STATE, "c": STATE, "weights": WEIGHTS},
    "layer_attention": {"q": STATE, "k": LAYERS, "values": [MAP] * T, "gates": LAYERS},
    "light_update": {
        "x": MAP, "q": STATE, "k": STATE, "value_weight": STENCIL,
        "carried": MAP, "carry_scale": VECTOR, "gate": STATE, "carry_weight": STENCIL,
    },
    "norm_residual": {"x": MAP, "o": MAP, "weight": VECTOR, "bias": VECTOR, "mean": STATE, "var": STATE},
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
    ("layer_attention", {"values": []}, r"`values` must hold the map of at least one layer, got none"),
    ("layer_attention", {"values": [MAP] * 2}, r"`k` must have shape \(B=2, T=2, C=32\), got \(2, 3, 32\)"),
    ("layer_attention", {"values": [MAP, MAP, MAP.half()]}, r"`values\[2\]` must have the dtype of `values\[0\]`"),
    ("layer_attention", {"values": [MAP, MAP[..., :3], MAP]}, r"`values\[1\]` must have shape .*W=4\), got"),
    ("layer_attention", {"head_dim": 24}, r"`head_dim` must divide the 32 channels, got 24"),
    ("light_update", {"carried": MAP.half()}, r"`carried` must have the dtype of `x`, torch.float32, got"),
    ("light_update", {"value_weight": STENCIL[:, :, :1]}, r"`value_weight` must have shape \(C=32, 1, 3, 3\), got"),
    ("light_update", {"carry_scale": None}, r"`carry_scale` must be a tensor, got NoneType"),
    ("light_update", NO_CARRY | {"gate": STATE}, r"`gate` goes with `carried`, which is None"),
    ("light_update", {"head_dim": 0}, r"`head_dim` must divide the 32 channels, got 0"),
    ("norm_residual", {"o": MAP[:1]}, r"`o` must have shape \(B=2, C=32, H=4, W=4\), got \(1, 32, 4, 4\)"),
    ("norm_residual", {"var": VECTOR}, r"`var` must have shape \(B=2, C=32\), got \(32,\)"),
    ("norm_residual", {"keep": torch.ones(3)}, r"`keep` must have shape \(B=2\), got \(3,\)"),
    ("norm_residual", {"mean": None}, r"`var` goes with `mean`, which is None"),
    ("norm_residual", {"relu": True}, r"`relu` must be one of None, 'branch', 'sum', got True"),
    (
        "norm_residual",
        {"x": MAP[:1, :, :1, :1], "o": MAP[:1, :, :1, :1], "mean": None, "var": None},
        r"`o` must have more than one value per channel to take statistics of, got \(1, 32, 1, 1\)",
    ),
    ("norm_residual", {"bias": VECTOR.int()}, r"`bias` must be floating point, got torch.int32"),
]  # fmt: skip


@pytest.mark.parametrize("op", GOOD)
def test_the_good_calls_pass(op):
    assert getattr(dla_kernels, op)(**GOOD[op]) is not None


@pytest.mark.parametrize(("op", "changed", "message"), BAD, ids=[f"{op}-{'-'.join(c)}" for op, c, _ in BAD])
def test_names_argument_value_and_what_is_allowed(op, changed, message):
    with pytest.raises(ValueError, match=rf"^{op}: {message}"):
        getattr(dla_kernels, op)(**GOOD[op] | changed)
