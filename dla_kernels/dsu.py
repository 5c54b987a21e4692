"""The weights of the Dynamic Sharing Unit, packed into one tensor."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class DsuWeights(NamedTuple):
    """All weights of a DSU one after the other; see :func:`dla_kernels.pack_dsu`.

    Attributes:
        packed: [n] in the order of the weights.
        joint: whether they are those of the joint form.
        channels, reduced: C and R.
    """

    packed: Tensor
    joint: bool
    channels: int
    reduced: int

    # No property: torch.compile of torch 2.10 sees none of a named tuple.
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The weights' shapes, in order."""
        c, r = self.channels, self.reduced
        return ((r, 2 * c), (3 * c, r), (3 * c,)) if self.joint else ((r, c), (r,), (3 * c, r), (3 * c,)) * 2

    def unpack(self) -> tuple[Tensor, ...]:
        """The single weights, as views."""
        sizes = [torch.Size(s).numel() for s in self.shapes()]
        return tuple(w.view(s) for w, s in zip(self.packed.split(sizes), self.shapes(), strict=True))


def packed(weights: Sequence[Tensor] | DsuWeights) -> DsuWeights:
    """The joint form's three tensors or the split form's eight, which must fit each other, in one, or what is so
    already."""
    if isinstance(weights, DsuWeights):
        return weights
    everything = torch.cat([w.flatten() for w in weights])
    return DsuWeights(everything, len(weights) == 3, weights[-1].numel() // 3, weights[0].shape[0])
