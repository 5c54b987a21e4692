"""This package's models in timm's registry, under their own names; imported as soon as timm is, see :mod:`dla`.

The plain ResNets for ImageNet are timm's own and stay so.
"""

import contextlib
from collections.abc import Callable

import torch
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from torch import nn

from dla.attention import DropPath
from dla.resnet import (
    CIFAR_MEAN,
    CIFAR_STD,
    IMAGENET_MEAN,
    IMAGENET_STAGES,
    IMAGENET_STD,
    check_images,
    create_model,
    list_models,
)
from dla.stage import Stage
from dla_kernels.common import gap

__all__ = []


def _on_imagenet(name: str) -> bool:
    return name.removeprefix("resnet").split("_")[0] in map(str, IMAGENET_STAGES)


def _default_cfg(name: str) -> dict:
    imagenet = _on_imagenet(name)
    return {
        "url": "",
        "num_classes": 1000 if imagenet else 10,
        "input_size": (3, 224, 224) if imagenet else (3, 32, 32),
        "pool_size": (7, 7) if imagenet else (8, 8),
        "crop_pct": 0.875 if imagenet else 1.0,
        "interpolation": "bilinear",
        "mean": IMAGENET_MEAN if imagenet else CIFAR_MEAN,
        "std": IMAGENET_STD if imagenet else CIFAR_STD,
        "first_conv": "conv1",
        "classifier": "fc",
    }


def _create(name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **arguments):
    with contextlib.nullcontext() if device is None else torch.device(device):
        return create_model(name, **arguments).to(dtype=dtype)


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs) -> nn.Module:
        levels = range(5 if _on_imagenet(name) else 4)
        return build_model_with_cfg(
            lambda **arguments: _create(name, **arguments), name, pretrained,
            feature_cfg={"out_indices": tuple(levels)}, **kwargs,
        )  # fmt: skip

    build.__name__ = build.__qualname__ = name
    return build


_names = [name for name in list_models() if not is_model(name)]
default_cfgs = generate_default_cfgs({name: _default_cfg(name) for name in _names})
for _name in _names:
    register_model(_entry_point(_name))

# What torch.fx takes as one node, for timm's features by graph.
for _module in (Stage, DropPath):
    register_notrace_module(_module)
for _function in (gap, check_images):
    register_notrace_function(_function)
