"""Dynamic Layer Attention: cells, layer attention, and the ResNets built on them."""

from dla.checkpoints import load_released
from dla.config import CONFIGS, OFFICIAL, PAPER, RELEASED, Config
from dla.resnet import ResNet, create_model, list_models, resnet, resnet_cifar
from dla.stage import create_stage, layer_attention_maps

__all__ = [
    "CONFIGS",
    "OFFICIAL",
    "PAPER",
    "RELEASED",
    "Config",
    "ResNet",
    "create_model",
    "create_stage",
    "layer_attention_maps",
    "list_models",
    "load_released",
    "resnet",
    "resnet_cifar",
]
