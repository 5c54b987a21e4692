"""The five ops. Each has a folder of its name: the public function in ``__init__``, one module for each backend."""

from dla_kernels.ops.gap_dsu import gap_dsu
from dla_kernels.ops.layer_attention import layer_attention
from dla_kernels.ops.light_update import light_update
from dla_kernels.ops.norm_residual import norm_residual
from dla_kernels.ops.refresh_gates import refresh_gates

__all__ = ["gap_dsu", "layer_attention", "light_update", "norm_residual", "refresh_gates"]
