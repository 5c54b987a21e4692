"""The ops of Dynamic Layer Attention for PyTorch."""

from importlib.metadata import version

from dla_kernels.backend import backends, use_backend
from dla_kernels.native import build_info
from dla_kernels.ops import gap_dsu, layer_attention, light_update, norm_residual, refresh_gates

__version__ = version("dla-kernels")

__all__ = [
    "backends",
    "build_info",
    "gap_dsu",
    "layer_attention",
    "light_update",
    "norm_residual",
    "refresh_gates",
    "use_backend",
]
