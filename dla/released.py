"""The authors' DLA and MRLA modules on the fused ops, see :mod:`dla.fuse`.

A fused module is the eager module itself under a class that has another ``forward`` and is a subclass of its own. It
holds what it held, so state-dict keys, Parameters, hooks and modes are those of the eager model, and optimisers and
checkpoints of one form serve the other.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dla.attention import BaseLayerAttention, LightLayerAttention
from dla.cells import DSU
from dla.checkpoints import ATTENTION, CARRY_CONV, NORM
from dla.config import RELEASED, Config
from dla.conv_norm import conv_norm, owns_output
from dla.stage import BaseStage, LightStage, Stage, on_backend
from dla_kernels import BatchNorm, norm_residual
from dla_kernels.common import accumulate_dtype, gap


class Settings(NamedTuple):
    backend: str = "auto"
    config: Config = RELEASED
    followers: int = 0
    note: str = ""


class Fused(nn.Module):
    """Base of the fused forms; a fused module's class has two bases, the form and the module's own class."""

    _fusion: Settings

    @property
    def backend(self) -> str:
        return self._fusion.backend

    @property
    def note(self) -> str:
        return self._fusion.note

    def __reduce_ex__(self, protocol):
        return _restored, type(self).__bases__, self.__dict__


@functools.cache
def _fused_class(form: type, eager: type) -> type:
    return type(f"Fused{eager.__name__}", (form, eager), {"__doc__": f"{eager.__qualname__} on the fused ops."})


def _restored(form: type, eager: type) -> nn.Module:
    cls = _fused_class(form, eager)
    return cls.__new__(cls)


def become(module: nn.Module, form: type, settings: Settings) -> None:
    """Gives a module its fused form, in place."""
    module._fusion = settings
    module.__class__ = _fused_class(form, type(module))


def restore(module: Fused) -> None:
    """Undoes :func:`become`."""
    module.__class__ = eager_class(module)
    del module._fusion


def eager_class(module: nn.Module) -> type:
    """The class of a module, of a fused one that which it had."""
    return type(module).__bases__[1] if isinstance(module, Fused) else type(module)


def child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The child that has one of the names."""
    for name in names:
        if name in module._modules:
            return module._modules[name]
    return None


class _FusedAttention(Fused):
    """The authors' layer attention of one block, by the names of :class:`dla.attention._LayerAttention`."""

    @property
    def projections(self) -> nn.Module:
        return child(child(self, ATTENTION), ATTENTION)

    @property
    def query(self) -> nn.Conv1d:
        return self.projections.Wq

    @property
    def key(self) -> nn.Conv1d:
        return self.projections.Wk

    @property
    def value(self) -> nn.Conv2d:
        return self.projections.Wv

    @property
    def bn(self) -> nn.Module:
        return child(self, NORM)

    @property
    def lambda_(self) -> Tensor:
        return child(self, ATTENTION).lambda_t.flatten()

    @property
    def head_dim(self) -> int:
        return self.value.out_channels // self.projections.heads

    def keep(self, x: Tensor) -> Tensor | None:
        module = self._modules.get("drop_path")
        if not (module is not None and module.training and getattr(module, "drop_prob", None)):
            return None
        return module(x.new_ones(x.shape[0], 1, 1, 1, dtype=accumulate_dtype(x))).flatten()

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}"


class FusedLightAttention(_FusedAttention, LightLayerAttention):
    """DLA-L's, beside its block."""


class FusedBaseAttention(_FusedAttention, BaseLayerAttention):
    """DLA-B's, beside its block."""


class FusedDsu(Fused, DSU):
    """The authors' cell: one branch each for the features and the hidden state, from zeros."""

    form, activation, initial_context = "split", "sigmoid", None

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return (*self.w_ih.parameters(), *self.w_hh.parameters())

    @property
    def channels(self) -> int:
        return self.w_ih[0].seq[0].in_features

    def extra_repr(self) -> str:
        return ""


class FusedBlock(Fused):
    """The authors' residual block, before its layer attention."""

    def output(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :mod:`dla.stage`."""
        branch, _ = conv_norm(self.conv1, self.bn1, x, relu="branch")
        conv, norm = self.conv2, self.bn2
        if "conv3" in self._modules:
            branch, _ = conv_norm(conv, norm, branch, relu="branch")
            conv, norm = self.conv3, self.bn3
        branch = conv(branch)
        shortcut = x if self.downsample is None else self.downsample(x)
        # Autocast's convolutions give its dtype, the network before may not have.
        shortcut = shortcut.to(branch.dtype)
        channel_attention = [m for m in (child(self, ("se",)), child(self, ("eca",))) if m is not None]
        if not channel_attention:
            out = norm_residual(shortcut, branch, BatchNorm.of(norm), relu="sum", inplace=owns_output(conv))
            return *out, shortcut
        branch = norm(branch)
        for module in channel_attention:
            branch = module(branch)
        x = self.relu(branch + shortcut)
        return x, gap(x), shortcut


class FusedLightBlock(FusedBlock, FusedLightAttention):
    """A block of MRLA-L: the residual block and its layer attention in one module."""

    def forward(self, x: Tensor) -> Tensor:
        with on_backend(self.backend):
            x, y, shortcut = self.output(x)
            return LightLayerAttention.forward(self, x, y, shortcut, None, None, need_o=False)[0]


class FusedBaseBlock(FusedBlock, FusedBaseAttention):
    """A block of MRLA-B. The network hands on the keys [B, T, C] and the list of the layers from block to block."""

    def forward(self, x: Tensor, keys: Tensor | None, layers: list | None) -> tuple[Tensor, Tensor, list]:
        with on_backend(self.backend):
            x, y, _ = self.output(x)
            layers = [] if self.mrla.init_cell else layers
            features = torch.cat([keys, y[:, None]], dim=1) if layers else y[:, None]
            x, layer = BaseLayerAttention.forward(
                self, x, features, torch.ones_like(features), self.key.weight, layers, self._fusion.followers
            )
            key = layer.key[:, None]
            return x, torch.cat([keys, key], dim=1) if layers else key, [*layers, layer]


class _FusedStage(Fused, Stage):
    """A stage of the authors' DLA, by the names of :class:`dla.stage._AttentionStage`."""

    @property
    def blocks(self) -> nn.Module:
        return self.layers

    @property
    def cell(self) -> nn.Module:
        return self.lstm

    @property
    def config(self) -> Config:
        return self._fusion.config

    def output_of(self, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(block, FusedBlock):
            return block.output(x)
        # The blocks of DLA-L return their shortcut too.
        x = block(x)
        x, shortcut = x if isinstance(x, tuple) else (x, None)
        return x, gap(x), shortcut


class FusedLightStage(_FusedStage, LightStage):
    @property
    def carry_conv(self) -> nn.Conv2d:
        return child(self, CARRY_CONV)


class FusedBaseStage(_FusedStage, BaseStage):
    pass
