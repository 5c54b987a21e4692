"""The readings of Dynamic Layer Attention: every point on which the paper and its authors' code differ."""

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args, get_type_hints


@dataclass(frozen=True)
class Config:
    """One reading. ``docs/paper-vs-code.md`` explains each field; the presets are PAPER, OFFICIAL and RELEASED.

    Attributes:
        dsu: "joint", one W1 over [h, y], 5 C^2 / r weights (Eq. 7); "split", one branch for y and one for h,
            8 C^2 / r weights.
        initial_state: "random", c^0 drawn once at construction and kept in the state dict; "zeros", h = c = 0.
        gate: what refreshes a prior layer, the new "context" c' = Dyn(y, c^l) or the new "hidden" state sigma(c').
        carry: what DLA-L carries on, the "output" o^{l-1} of the attention before, or the block's "shortcut".
        carry_conv: whether DLA-L adds depthwise3x3(carried), one filter for a stage, to the gated carry.
        cache: what DLA-B keeps of a layer and gates, its "input" x^m, so that key and value share a gate, or its
            "key_value" pair, each with a gate of its own.
        context: whose context refreshes a sample's layers, its "own" or the "first" sample's of the batch.
        activation: sigma, from context to hidden state (the paper's Table 5); None for the cell's own, sigmoid in
            DSU and DIA, tanh in LSTM and RNN.
    """

    dsu: Literal["joint", "split"] = "joint"
    initial_state: Literal["random", "zeros"] = "random"
    gate: Literal["context", "hidden"] = "context"
    carry: Literal["output", "shortcut"] = "output"
    carry_conv: bool = False
    cache: Literal["input", "key_value"] = "input"
    context: Literal["own", "first"] = "own"
    activation: Literal[None, "identity", "tanh", "relu", "sigmoid"] = None

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, allowed = getattr(self, field.name), get_args(hints[field.name]) or (True, False)
            if value not in allowed:
                raise ValueError(f"`{field.name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}")


PAPER = Config()
"""The paper's equations."""

OFFICIAL = Config(
    dsu="split", initial_state="zeros", gate="hidden", carry="shortcut", carry_conv=True, cache="key_value"
)
"""What the authors' code computes for one sample."""

RELEASED = replace(OFFICIAL, context="first")
"""What the authors' code computes for a batch, to the bit: every sample refreshed by the first one's context."""

CONFIGS = {"paper": PAPER, "official": OFFICIAL, "released": RELEASED}
