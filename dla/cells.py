"""Recurrent cells over the layers of a stage, with one interface: ``cell(y, state) -> state`` over (B, C)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_kernels import gap_dsu, pack_dsu, refresh_gates
from dla_kernels.common import ACTIVATIONS, accumulate_dtype, gap, without_autocast
from dla_kernels.dsu import DsuWeights


class State(NamedTuple):
    """The state of a cell, in float32 (float64 beside float64 maps)."""

    hidden: Tensor  # [B, C]
    context: Tensor  # [B, C]
    weights: DsuWeights | None = None  # a DSU's, packed once for all steps from this state on

    def of_first_sample(self) -> "State":
        """The first sample's state for the whole batch."""
        return State(*(s[:1].expand_as(s) for s in self[:2]), self.weights)


class Cell(nn.Module):
    """Base of the cells, which define ``forward(y, state) -> State``: one step on pooled features y [B, C].

    Args:
        channels: C.
        activation: sigma, from the context to what of it is seen: "identity", "tanh", "relu" or "sigmoid".
        initial_state: "zeros", or "random": a context drawn from N(0, 1) once, kept as a buffer.
    """

    def __init__(self, channels: int, activation: str = "sigmoid", initial_state: str = "zeros"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"`activation` must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if initial_state not in ("zeros", "random"):
            raise ValueError(f"`initial_state` must be zeros or random, got {initial_state!r}")
        self.channels = channels
        self.activation = activation
        context = torch.randn(channels) if initial_state == "random" else None
        self.register_buffer("initial_context", context)

    def initial_state(self, x: Tensor) -> State:
        """The state before a stage's first layer, for a batch like ``x`` ([B, C, ...])."""
        if self.initial_context is None:
            # Two tensors: compilers do not take one for both.
            return State(*(x.new_zeros(x.shape[0], self.channels, dtype=accumulate_dtype(x)) for _ in range(2)))
        context = self.initial_context.to(accumulate_dtype(x)).expand(x.shape[0], -1)
        return State(ACTIVATIONS[self.activation](context), context)

    def observe(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step on a map: [B, C, H, W] and the state -> its GAP [B, C] and the new state."""
        y = gap(x)
        return y, self(y, state)

    def observe_and_gate(self, y: Tensor, carried: Tensor, state: State, gate: str) -> tuple[State, Tensor]:
        """One step on pooled features, and the gate of what is carried, given its GAP: both [B, C]."""
        state = self(y, state)
        return state, getattr(self(carried, state), gate)

    def refresh(self, features: Tensor, gates: Tensor, state: State, gate: str) -> Tensor:
        """Cumulative gates of T prior layers (Eq. 6), see :func:`dla_kernels.refresh_gates`: [B, T, C]."""
        y = features * gates
        expanded = State(*(s[:, None].expand_as(y).flatten(0, 1) for s in state[:2]))
        return gates * getattr(self(y.flatten(0, 1), expanded), gate).view_as(y)

    def extra_repr(self) -> str:
        return f"{self.channels}, activation={self.activation!r}"


class RNN(Cell):
    """Elman's network: h' = c' = sigma(W_y y + W_h h + b), sigma = tanh where none is named. 2 C^2 weights."""

    def __init__(self, channels: int, activation: str = "tanh", initial_state: str = "zeros"):
        super().__init__(channels, activation, initial_state)
        self.input = nn.Linear(channels, channels)
        self.hidden = nn.Linear(channels, channels, bias=False)

    def forward(self, y: Tensor, state: State) -> State:
        h = ACTIVATIONS[self.activation](_linear(y, self.input) + _linear(state.hidden, self.hidden))
        return State(h, h)


class LSTM(Cell):
    """i, f, c~, o = W_y y + W_h h + b; c' = f * c + i * c~; h' = o * sigma(c'). 8 C^2 weights."""

    def __init__(self, channels: int, activation: str = "tanh", initial_state: str = "zeros"):
        super().__init__(channels, activation, initial_state)
        self.input = nn.Linear(channels, 4 * channels)
        self.hidden = nn.Linear(channels, 4 * channels, bias=False)

    def forward(self, y: Tensor, state: State) -> State:
        return _lstm(_linear(y, self.input) + _linear(state.hidden, self.hidden), state, self.activation)


class DIA(Cell):
    """The cell of DIANet (Huang et al. 2020): an LSTM whose two weights are squeezed. 10 C^2 / r weights.

    i, f, c~, o = W2_y ReLU(W1_y y) + W2_h ReLU(W1_h h), with biases; c' = f * c + i * c~; h' = o * sigma(c').
    """

    def __init__(self, channels: int, reduction: int = 4, activation: str = "sigmoid", initial_state: str = "zeros"):
        super().__init__(channels, activation, initial_state)
        self.input = _squeeze(channels, 4 * channels, reduction)
        self.hidden = _squeeze(channels, 4 * channels, reduction)

    def forward(self, y: Tensor, state: State) -> State:
        gates = (_linear(torch.relu(_linear(v, b[0])), b[2]) for v, b in ((y, self.input), (state.hidden, self.hidden)))
        return _lstm(sum(gates), state, self.activation)


class DSU(Cell):
    """The paper's Dynamic Sharing Unit (Eq. 7, 8, 9), see :func:`dla_kernels.gap_dsu`.

    Args:
        channels: C.
        reduction: r; the hidden layer has C / r channels.
        form: "joint", one W1 over [h, y], 5 C^2 / r weights; "split", one branch each, 8 C^2 / r weights.
        activation, initial_state: as of every cell.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 4,
        form: str = "joint",
        activation: str = "sigmoid",
        initial_state: str = "zeros",
    ):
        super().__init__(channels, activation, initial_state)
        if form == "joint":
            reduced = _reduced(channels, reduction)
            self.reduce = nn.Linear(2 * channels, reduced, bias=False)
            self.expand = nn.Linear(reduced, 3 * channels)
        elif form == "split":
            self.input = _squeeze(channels, 3 * channels, reduction)
            self.hidden = _squeeze(channels, 3 * channels, reduction)
        else:
            raise ValueError(f"`form` must be joint or split, got {form!r}")
        self.form = form

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The weights in the order of :func:`dla_kernels.gap_dsu`."""
        if self.form == "joint":
            return self.reduce.weight, self.expand.weight, self.expand.bias
        return tuple(p for branch in (self.input, self.hidden) for p in branch.parameters())

    def initial_state(self, x: Tensor) -> State:
        return super().initial_state(x)._replace(weights=pack_dsu(self.weights))

    def forward(self, y: Tensor, state: State) -> State:
        return self.observe(y, state)[1]

    def observe(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        weights = state.weights or pack_dsu(self.weights)
        y, hidden, context, _ = gap_dsu(x, *state[:2], weights, self.activation)
        return y, State(hidden, context, weights)

    def observe_and_gate(self, y: Tensor, carried: Tensor, state: State, gate: str) -> tuple[State, Tensor]:
        weights = state.weights or pack_dsu(self.weights)
        _, hidden, context, d = gap_dsu(y, *state[:2], weights, self.activation, carried, gate)
        return State(hidden, context, weights), d

    def refresh(self, features: Tensor, gates: Tensor, state: State, gate: str) -> Tensor:
        weights = state.weights or pack_dsu(self.weights)
        return refresh_gates(features, gates, *state[:2], weights, self.activation, gate)


CELLS = ("rnn", "lstm", "dia", "dsu")


def create_cell(
    name: str,
    channels: int,
    reduction: int = 4,
    form: str = "joint",
    activation: str | None = None,
    initial_state: str = "zeros",
) -> Cell:
    """Builds a cell by name, "rnn", "lstm", "dia" or "dsu"; options that a cell does not have are not used by it.

    ``activation=None`` takes the cell's own, sigmoid for the squeezed cells and tanh for the others.

    Raises:
        ValueError: an unknown name or choice, or a reduction larger than the channels.
    """
    options = {"initial_state": initial_state} | ({} if activation is None else {"activation": activation})
    match name:
        case "rnn":
            return RNN(channels, **options)
        case "lstm":
            return LSTM(channels, **options)
        case "dia":
            return DIA(channels, reduction, **options)
        case "dsu":
            return DSU(channels, reduction, form, **options)
    raise ValueError(f"`cell` must be one of {', '.join(CELLS)}, got {name!r}")


def _reduced(channels: int, reduction: int) -> int:
    if not 1 <= reduction <= channels:
        raise ValueError(f"`reduction` must be between 1 and the {channels} channels, got {reduction}")
    return channels // reduction


def _squeeze(in_features: int, out_features: int, reduction: int) -> nn.Sequential:
    reduced = _reduced(in_features, reduction)
    return nn.Sequential(nn.Linear(in_features, reduced), nn.ReLU(), nn.Linear(reduced, out_features))


@without_autocast
def _linear(y: Tensor, layer: nn.Linear) -> Tensor:
    """The layer in the state's precision, whatever its weights' dtype."""
    return F.linear(y, layer.weight.to(y.dtype), None if layer.bias is None else layer.bias.to(y.dtype))


def _lstm(gates: Tensor, state: State, activation: str) -> State:
    i, f, candidate, o = gates.chunk(4, dim=-1)
    context = torch.sigmoid(f) * state.context + torch.sigmoid(i) * torch.tanh(candidate)
    return State(torch.sigmoid(o) * ACTIVATIONS[activation](context), context)
