"""Layer interaction inside a stage: a run of residual blocks with equal map size.

A block offers ``branches(x) -> (residual branch, shortcut)`` and ``act``; its plain output is act(branch + shortcut).
Layer-wise information integration also takes its ``drop_path``. One that has ``output(x) -> (that output, its GAP,
shortcut)`` saves layer attention a pass over the map; with ``owns_output = True`` nobody else has that output, and it
may be written over.
"""

import contextlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dla.attention import BaseLayerAttention, LightLayerAttention
from dla.cells import Cell, State, create_cell
from dla.config import PAPER, Config
from dla.conv_norm import has_hooks
from dla_kernels import use_backend
from dla_kernels.common import gap


class Stage(nn.Module):
    """Base of the stages with a layer interaction, which define ``run(x)``.

    Attributes:
        backend: that the ops of this stage run on, see :mod:`dla_kernels.backend`; "auto" leaves it to them.
    """

    backend: str = "auto"

    def forward(self, x: Tensor) -> Tensor:
        with on_backend(self.backend):
            return self.run(x)


def on_backend(name: str) -> contextlib.AbstractContextManager:
    """Inside it the ops run on the backend ``name``; "auto" leaves an outer choice as it is."""
    return contextlib.nullcontext() if name == "auto" else use_backend(name)


class LIIStage(Stage):
    """Layer-wise information integration (the paper's section 5.3; DIANet where the cell is DIA).

    y = GAP(branch), (h, c) <- cell(y, (h, c)), x = act(shortcut + branch * h), from a state of zeros.
    """

    gain: float = 1.0  # a constant factor of h, for :func:`dla.insert`

    def __init__(self, blocks: Iterable[nn.Module], cell: Cell):
        super().__init__()
        self.blocks = _blocks(blocks)
        self.cell = cell

    def run(self, x: Tensor) -> Tensor:
        state = None
        for block in self.blocks:
            x, state = self.step(block, x, state)
        return x

    def step(self, block: nn.Module, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """One block: its input and the state before it -> its output and the state after it."""
        branch, shortcut = block.branches(x)
        branch, state = self.gate(branch, state)
        return block.act(shortcut + block.drop_path(branch)), state

    def gate(self, branch: Tensor, state: State | None) -> tuple[Tensor, State]:
        """The gated branch and the new state."""
        _, state = self.cell.observe(branch, state or self.cell.initial_state(branch))
        hidden = state.hidden if self.gain == 1 else state.hidden * self.gain
        return branch * hidden.to(branch.dtype)[..., None, None], state


class _AttentionStage(Stage):
    """What both forms of layer attention share. Without a cell nothing is refreshed: MRLA."""

    def __init__(self, blocks: Iterable[nn.Module], attention: Iterable[nn.Module], cell: Cell | None, config: Config):
        super().__init__()
        self.blocks = _blocks(blocks)
        self.attention = nn.ModuleList(attention)
        self.cell = cell
        self.config = config

    def output_of(self, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A block's plain output [B, C, H, W], its GAP [B, C] and its shortcut [B, C, H, W]."""
        if hasattr(block, "output"):
            return block.output(x)
        branch, shortcut = block.branches(x)
        x = block.act(branch + shortcut)
        return x, gap(x), shortcut

    def refresh(self, features: Tensor, gates: Tensor, state: State) -> Tensor:
        """Cumulative gates [B, T, C] of T prior layers by the current state."""
        if self.config.context == "first":
            state = state.of_first_sample()
        return self.cell.refresh(features, gates, state, self.config.gate)


class BaseStage(_AttentionStage):
    """Each block attends over all blocks so far (MRLA-B; with a cell DLA-B, Eq. 2 and 6).

    The maps are never rewritten: a prior layer is its value map V^m, its pooled features as they were first computed
    (those of x^m, or under ``cache="key_value"`` K^m and GAP(V^m)), and the product of its gates. Saved maps grow
    linearly in the blocks, and the refresh moves vectors only.
    """

    def run(self, x: Tensor) -> Tensor:
        state, own_gate, layers, cell = None, None, [], self.cell
        key_value = self.config.cache == "key_value"
        # [B, T, C] each: one set of features and gates for a layer, or one for its key and one for its value.
        features, gates = ([None] * (2 if key_value else 1) for _ in range(2))
        key_weights = None if key_value else torch.cat([attention.key.weight for attention in self.attention])
        for block, attention in zip(self.blocks, self.attention, strict=True):
            x, y = self.output_of(block, x)[:2]
            if cell is not None:
                state = cell(y, state or cell.initial_state(y))
                if layers:
                    refreshed = self.refresh(_joined(features), _joined(gates), state)
                    gates = refreshed.chunk(2, dim=1) if key_value else [refreshed]
            own_gate = torch.ones_like(y) if own_gate is None else own_gate
            gates = [_append(g, own_gate) for g in gates]
            own, followers = len(layers), len(self.blocks) - len(layers) - 1
            inplace = _owns_output(block) and not has_hooks(attention)
            if not key_value:
                features[0] = _append(features[0], y)
                x, layer = attention(x, features[0], gates[0], key_weights[: own + 1], layers, followers, inplace)
            else:
                keys = None if features[0] is None else features[0] * gates[0][:, :-1]
                x, layer = attention(x, _append(keys, y), gates[1], attention.key.weight, layers, followers, inplace)
                features = [_append(features[0], layer.key), _append(features[1], layer.pooled)]
            layers.append(layer)
        return x


class LightStage(_AttentionStage):
    """Each block updates the attention carried from the one before (MRLA-L; with a cell DLA-L, Eq. 3)."""

    def __init__(self, blocks: Iterable[nn.Module], attention: Iterable[nn.Module], cell: Cell | None, config: Config):
        super().__init__(blocks, attention, cell, config)
        self.carry_conv = None
        if cell is not None and config.carry_conv:
            channels = cell.channels
            self.carry_conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)

    def run(self, x: Tensor) -> Tensor:
        state = carried = carried_gap = x_gap = None
        carries_output = self.config.carry == "output"
        carry_weight = None if self.carry_conv is None else self.carry_conv.weight
        hooked = any(map(has_hooks, self.attention))  # a hook may keep what the next layer would write over
        for block, attention in zip(self.blocks, self.attention, strict=True):
            before, last = x, block is self.blocks[-1]
            x, y, shortcut = self.output_of(block, x)
            if not carries_output:
                carried, carried_gap = shortcut, x_gap if shortcut is before else None
            del before, shortcut  # the caches still hold their memory, for the next map
            state, gate = self.observe(y, carried, carried_gap, state)
            need_o, inplace = carries_output and not last, _owns_output(block) and not hooked
            x, x_gap, carried, carried_gap = attention(
                x, y, carried, gate, None if carried is None else carry_weight, need_o, inplace
            )
        return x

    def observe(
        self, y: Tensor, carried: Tensor | None, carried_gap: Tensor | None, state: State | None
    ) -> tuple[State | None, Tensor | None]:
        """The state after a block whose map has the GAP y [B, C], and the gate [B, C] of what it carries on."""
        if self.cell is None:
            return None, None
        state = state or self.cell.initial_state(y)
        if carried is None:
            return self.cell(y, state), None
        carried_gap = gap(carried) if carried_gap is None else carried_gap
        if self.config.context == "own":
            return self.cell.observe_and_gate(y, carried_gap, state, self.config.gate)
        state, pooled = self.cell(y, state), carried_gap[:, None]
        return state, self.refresh(pooled, torch.ones_like(pooled), state)[:, 0]


INTERACTIONS = ("lii", "mrla_b", "mrla_l", "dla_b", "dla_l")


def create_stage(
    blocks: Iterable[nn.Module],
    channels: int,
    interaction: str | None = None,
    cell: str = "dsu",
    config: Config = PAPER,
    reduction: int = 4,
    head_dim: int = 32,
    drop_path: float = 0.0,
) -> nn.Module:
    """Puts a layer interaction over a stage's blocks.

    Args:
        blocks: the residual blocks, in order, each with ``branches`` and ``act``, see :mod:`dla.stage`.
        channels: C of their outputs.
        interaction: None, "lii", "mrla_b", "mrla_l", "dla_b" or "dla_l".
        cell: "rnn", "lstm", "dia" or "dsu"; unused where nothing is refreshed (None, MRLA).
        config: the reading.
        reduction: r of the squeezed cells.
        head_dim: channels of an attention head.
        drop_path: drop path's probability on the attention output.

    Raises:
        ValueError: no block, or an unknown name or choice.
    """
    blocks = _blocks(blocks)
    if interaction is None:
        return nn.Sequential(*blocks)
    if interaction not in INTERACTIONS:
        raise ValueError(f"`interaction` must be None or one of {', '.join(INTERACTIONS)}, got {interaction!r}")

    def build_cell(initial_state: str) -> Cell:
        return create_cell(cell, channels, reduction, config.dsu, config.activation, initial_state)

    if interaction == "lii":
        return LIIStage(blocks, build_cell("zeros"))
    light = interaction.endswith("_l")
    has_carry = [light and (config.carry == "shortcut" or l > 0) for l in range(len(blocks))]
    # A stage of one block may have nothing to refresh; a cell there would never get a gradient.
    refreshes = interaction.startswith("dla") and (any(has_carry) if light else len(blocks) > 1)
    stage_cell = build_cell(config.initial_state) if refreshes else None
    if light:
        attention = [LightLayerAttention(channels, head_dim, drop_path, carry) for carry in has_carry]
        return LightStage(blocks, attention, stage_cell, config)
    attention = [BaseLayerAttention(channels, head_dim, drop_path) for _ in blocks]
    return BaseStage(blocks, attention, stage_cell, config)


def layer_attention_maps(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The attention over layers that a model computes for ``x`` [B, in_chans, H, W].

    Returns:
        One tensor for each stage with a softmax over its layers, [B, heads, L, L]: entry [b, head, l, m] is the
        weight of layer m in layer l, zero for m > l.

    Raises:
        ValueError: the model has no such stage.
    """
    stages = [m for m in model.modules() if isinstance(m, BaseStage)]
    if not stages:
        raise ValueError("`model` has no softmax over layers: build it with interaction mrla_b or dla_b")
    rows: dict[nn.Module, Tensor] = {}
    hooks = [
        attention.register_forward_pre_hook(lambda m, args: rows.update({m: m.weights(*args[1:4])}))
        for stage in stages
        for attention in stage.attention
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    maps = []
    for stage in stages:
        depth = len(stage.attention)
        # [B, T, heads] -> [B, heads, L] each, padded to the stage's depth
        stage_rows = [rows[a].transpose(1, 2) for a in stage.attention]
        maps.append(torch.stack([nn.functional.pad(r, (0, depth - r.shape[-1])) for r in stage_rows], dim=2))
    return maps


def _blocks(blocks: Iterable[nn.Module]) -> nn.ModuleList:
    blocks = nn.ModuleList(blocks)
    if not blocks:
        raise ValueError("`blocks` must hold at least one residual block, got an empty stage")
    return blocks


def _owns_output(block: nn.Module) -> bool:
    return getattr(block, "owns_output", False)


def _append(stack: Tensor | None, item: Tensor) -> Tensor:
    """[B, T, C] and [B, C] -> [B, T + 1, C]."""
    item = item[:, None]
    return item if stack is None else torch.cat([stack, item], dim=1)


def _joined(sets: Sequence[Tensor]) -> Tensor:
    """S of [B, T, C] -> [B, S T, C]."""
    return sets[0] if len(sets) == 1 else torch.cat(list(sets), dim=1)
