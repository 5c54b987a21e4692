"""What a block costs beyond the plain one: dispatched ops, and bytes kept for the backward."""

import pytest
import torch

import dla
from dla.benchmarks.depth import saved_bytes
from dla.benchmarks.launches import CHANNELS, dispatched, of_one_block
from dla.resnet import Bottleneck
from dla.stage import create_stage
from dla_kernels import native

pytestmark = pytest.mark.skipif(native.ERROR is not None, reason=str(native.ERROR))

WIDTH = CHANNELS // Bottleneck.expansion


def build(depth, interaction, config=dla.PAPER):
    return create_stage([Bottleneck(CHANNELS, WIDTH) for _ in range(depth)], CHANNELS, interaction, config=config)


def per_block(interaction, config, training):
    """What one more block dispatches, forward and backward."""
    return of_one_block(lambda n: build(n, interaction, config).train(training), dispatched)


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
