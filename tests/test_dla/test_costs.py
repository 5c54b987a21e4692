"""What a block costs beyond the plain one: dispatched ops, and bytes kept for the backward."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dla
from dla.resnet import Bottleneck
from dla.stage import create_stage
from dla_kernels import native

pytestmark = pytest.mark.skipif(native.ERROR is not None, reason=str(native.ERROR))

WIDTH, CHANNELS = 8, 32


class Ops(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def build(depth, interaction, config=dla.PAPER):
    return create_stage([Bottleneck(CHANNELS, WIDTH) for _ in range(depth)], CHANNELS, interaction, config=config)


def dispatched(depth, interaction, config, training):
    """Ops of a stage, forward and backward; parameters take their gradients without an op of their own."""
    stage = build(depth, interaction, config).train(training)
    x = torch.randn(2, CHANNELS, 4, 4, requires_grad=training)
    with torch.set_grad_enabled(training):
        with Ops() as forward:
            out = stage(x)
        with Ops() as backward:
            if training:
                torch.autograd.grad(out.sum(), [x, *stage.parameters()])
    return len(forward.seen), len(backward.seen)


def per_block(interaction, config, training):
    """What one more block adds to a stage, forward and backward."""
    return [b - a for a, b in zip(*(dispatched(n, interaction, config, training) for n in (4, 5)), strict=True)]


@pytest.mark.parametrize("config", [dla.PAPER, dla.OFFICIAL], ids=["paper", "official"])
def test_calls_of_a_dla_l_block(config):
    """In training at most 4 more than the plain block's forward, and 8 more backward; in inference at most 3."""
    forward, backward = (
        ours - plain
        for ours, plain in zip(per_block("dla_l", config, True), per_block(None, config, True), strict=True)
    )
    assert forward <= 4
    assert backward <= 8
    inference, plain = per_block("dla_l", config, False)[0], per_block(None, config, False)[0]
    assert inference - plain <= 3


def saved_bytes(stage, x):
    """Bytes that autograd keeps for backward, each storage counted once."""
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage()  # the storage too, or its address may be reused
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = stage(x)
    assert output.requires_grad
    return sum(s.nbytes() for s in saved.values())


@pytest.mark.parametrize("config", [dla.PAPER, dla.OFFICIAL], ids=["paper", "official"])
@pytest.mark.parametrize(("interaction", "maps"), [("dla_l", 2), ("dla_b", 3)])
def test_maps_kept_for_the_backward(interaction, maps, config):
    """Beyond the plain block's a fixed number, however deep the stage."""
    x = torch.randn(2, CHANNELS, 32, 32)

    def maps_per_block(interaction, few, many):
        more = saved_bytes(build(many, interaction, config), x) - saved_bytes(build(few, interaction, config), x)
        return more / (many - few) / x.nbytes

    for few, many in ((4, 8), (8, 16)):
        # Beside maps of 1024 pixels about ten vectors of (B, T, C), which do grow with the depth, and the weights.
        assert maps_per_block(interaction, few, many) - maps_per_block(None, few, many) <= maps + 0.2
