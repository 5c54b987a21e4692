"""The equations of the paper and of the authors' code, literally: a prior layer's map is rewritten at every layer.

They take a stage of ours for its parameters and compute what it must compute.
"""

import torch
from torch import Tensor

from dla.cells import State
from dla.stage import BaseStage, LightStage
from dla_kernels.common import accumulate_dtype


def pooled(x: Tensor) -> Tensor:
    """GAP, in the state's dtype, which autocast leaves alone: [B, C, H, W] -> [B, C]."""
    return x.mean((2, 3), dtype=accumulate_dtype(x))


def gate(stage: BaseStage | LightStage, y: Tensor, state: State) -> Tensor:
    """d = Dyn(y, c^l), Eq. 6, for one layer: [B, C] -> [B, C]."""
    if stage.config.context == "first":
        state = State(state.hidden[:1].repeat(len(y), 1), state.context[:1].repeat(len(y), 1))
    refreshed = stage.cell(y.to(state.hidden.dtype), state)
    return refreshed.context if stage.config.gate == "context" else refreshed.hidden


def softmax_attention(q: Tensor, keys: Tensor, values: Tensor, head_dim: int) -> Tensor:
    """Eq. 2: q [B, C], keys [B, T, C], values [B, T, C, H, W] -> [B, C, H, W]."""
    heads = (-1, head_dim)
    scores = torch.einsum("bgd,btgd->bgt", q.unflatten(1, heads), keys.unflatten(2, heads)) / head_dim**0.5
    return torch.einsum("bgt,btgdhw->bgdhw", scores.softmax(-1), values.unflatten(2, heads)).flatten(1, 2)


def finish(attention, x: Tensor, o: Tensor, relu: bool) -> Tensor:
    normed = attention.bn(o)
    return x + (normed.relu() if relu else normed)


def base_stage(stage: BaseStage, x: Tensor) -> Tensor:
    """DLA-B and MRLA-B."""
    inputs, keys, values, state = [], [], [], None
    for block, attention in zip(stage.blocks, stage.attention, strict=True):
        x = block(x)
        y = pooled(x)
        if stage.cell is not None:
            state = stage.cell(y, state or stage.cell.initial_state(x))
        if stage.config.cache == "input":
            # x^m <- x^m * d^m; keys and values are made anew from the rewritten maps.
            if stage.cell is not None:
                inputs = [p * gate(stage, pooled(p), state)[:, :, None, None] for p in inputs]
            inputs.append(x)
            made = list(zip(inputs, stage.attention, strict=False))
            keys = [a.key(pooled(p)[:, None])[:, 0] for p, a in made]
            values = [a.value(p) for p, a in made]
        else:
            if stage.cell is not None:
                keys = [k * gate(stage, k, state) for k in keys]
                values = [v * gate(stage, pooled(v), state)[:, :, None, None] for v in values]
            keys.append(attention.key(y[:, None])[:, 0])
            values.append(attention.value(x))
        q = attention.query(y[:, None])[:, 0]
        o = softmax_attention(q, torch.stack(keys, 1), torch.stack(values, 1), attention.head_dim)
        x = finish(attention, x, o, relu=True)
    return x


def light_stage(stage: LightStage, x: Tensor) -> Tensor:
    """DLA-L and MRLA-L."""
    o = state = None
    for block, attention in zip(stage.blocks, stage.attention, strict=True):
        branch, shortcut = block.branches(x)
        carried = shortcut if stage.config.carry == "shortcut" else o
        x = block.act(branch + shortcut)
        y = pooled(x)
        if stage.cell is not None:
            state = stage.cell(y, state or stage.cell.initial_state(x))
        q, k = attention.query(y[:, None])[:, 0], attention.key(y[:, None])[:, 0]
        heads = (-1, attention.head_dim)
        score = torch.sigmoid((q * k).unflatten(1, heads).sum(-1) / attention.head_dim**0.5)
        o = (attention.value(x).unflatten(1, heads) * score[..., None, None, None]).flatten(1, 2)
        if carried is not None:
            refreshed = carried
            if stage.cell is not None:
                refreshed = carried * gate(stage, pooled(carried), state)[:, :, None, None]
                if stage.carry_conv is not None:
                    refreshed = refreshed + stage.carry_conv(carried)
            o = o + attention.lambda_[:, None, None] * refreshed
        x = finish(attention, x, o, relu=False)
    return x
