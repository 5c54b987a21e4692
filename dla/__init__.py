"""Dynamic Layer Attention: cells, layer attention, and the ResNets built on them."""

from dla.checkpoints import load_released
from dla.config import CONFIGS, OFFICIAL, PAPER, RELEASED, Config
from dla.fuse import fuse, fusion_report, unfuse
from dla.insert import insert, remove
from dla.memory import keep_memory
from dla.resnet import ResNet, create_model, list_models, resnet, resnet_cifar
from dla.stage import create_stage, layer_attention_maps
from dla.when_imported import import_with

__all__ = [
    "CONFIGS",
    "OFFICIAL",
    "PAPER",
    "RELEASED",
    "Config",
    "ResNet",
    "create_model",
    "create_stage",
    "fuse",
    "fusion_report",
    "insert",
    "keep_memory",
    "layer_attention_maps",
    "list_models",
    "load_released",
    "remove",
    "resnet",
    "resnet_cifar",
    "unfuse",
]

# timm's registry has our models, and importing timm takes longer than all the rest.
import_with("timm", "dla.registry")
