"""The ops of Dynamic Layer Attention for PyTorch."""

from importlib.metadata import version

from dla_kernels.backend import backends, use_backend
from dla_kernels.batch_norm import BatchNorm
from dla_kernels.native import build_info
from dla_kernels.ops import gap_dsu, layer_attention, light_update, norm_residual, refresh_gates
from dla_kernels.ops.gap_dsu import pack_dsu

__version__ = version("dla-kernels")

__all__ = [
    "BatchNorm",
    "backends",
    "build_info",
    "gap_dsu",
    "layer_attention",
    "light_update",
    "norm_residual",
    "pack_dsu",
    "refresh_gates",
    "use_backend",
]
