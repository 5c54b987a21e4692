"""Files of weights: models of ours, and weights of the authors' released models, read into ours."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dla.resnet import ResNet

#: What the authors' code calls an attention (twice, one inside the other), its BatchNorm and a stage's extra filter.
ATTENTION = ("layer_attention", "mrla")
NORM = ("bn_layer_attention", "bn_mrla")
CARRY_CONV = ("excite", "extict")

_ATTENTION, _NORM, _CARRY_CONV = (f"(?:{'|'.join(names)})" for names in (ATTENTION, NORM, CARRY_CONV))
#: From the released names to ours, in this order. They cover DLA, MRLA, DIANet and the plain networks of the release.
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^module\.", ""),
        (r"^stages\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}."),
        (r"^(layer\d+)\.ModuleList\.", r"\1.blocks."),
        (r"^(layer\d+)\.layers\.", r"\1.blocks."),
        (r"^(layer\d+)\.(\d+)\.(mrla|bn_mrla)\.", r"\1.attention.\2.\3."),
        (rf"\.{_ATTENTION}\.(?:{_ATTENTION}\.)?W([qkv])\.",
         lambda m: {"q": ".query.", "k": ".key.", "v": ".value."}[m[1]]),
        (rf"\.{_ATTENTION}\.lambda_t$", ".lambda_"),
        (rf"\.{_NORM}\.", ".bn."),
        (r"\.lstm\.w_ih\.0\.seq\.", ".cell.input."),
        (r"\.lstm\.w_hh\.0\.seq\.", ".cell.hidden."),
        (rf"\.{_CARRY_CONV}\.", ".carry_conv."),
    )
)  # fmt: skip


def load_checkpoint(path: str | Path) -> dict:
    """Reads a file of tensors and plain values, safetensors or torch's; nothing in it is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`path` must be a checkpoint file, there is none at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # optional

            return load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is no readable checkpoint of tensors and plain values: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} must hold a dictionary, got {type(checkpoint).__name__}")
    return checkpoint


def load_model(path: str | Path) -> ResNet:
    """The model of a checkpoint of ``dla train`` or of a folder that ``save_pretrained`` wrote, in eval mode.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: what is there does not hold a model.
    """
    if Path(path).is_dir():
        return ResNet.from_pretrained(path)
    from dla.training import load_classifier  # Lightning takes seconds to import

    return load_classifier(path).net.eval()


def load_released(model: nn.Module, state_dict: Mapping[str, Tensor] | str | Path) -> nn.Module:
    """Loads weights of the authors' released code into a model of ours, built with ``OFFICIAL`` or ``RELEASED``.

    Build the model as the release did: reduction 4 on CIFAR, 16 on ImageNet.

    Args:
        model: where to load; untouched unless everything fits.
        state_dict: the released model's, or the path of a checkpoint that holds it, plain or under "state_dict".

    Returns:
        The model.

    Raises:
        FileNotFoundError: the path leads to no file.
        ValueError: a file that is no checkpoint, keys that are left over on either side, or shapes that differ.
    """
    if isinstance(state_dict, (str, Path)):
        state_dict = load_checkpoint(state_dict)
    state_dict = state_dict.get("state_dict", state_dict)
    ours = model.state_dict()
    renamed, given = {}, {}
    for key, tensor in state_dict.items():
        name = _rename(key, ours)
        given[name] = key
        if isinstance(tensor, Tensor):
            renamed[name] = tensor.flatten() if name.endswith(".lambda_") else tensor
    unexpected = [given[name] for name in given if name not in ours or name not in renamed]
    missing = [name for name in ours if name not in renamed]
    if unexpected or missing:
        raise ValueError(
            "`state_dict` does not fit the model: "
            f"{_listed('no place for', unexpected)}; {_listed('no value for', missing)}"
        )
    shapes = [
        f"{given[name]} {tuple(tensor.shape)} for {tuple(ours[name].shape)}"
        for name, tensor in renamed.items()
        if tensor.shape != ours[name].shape
    ]
    if shapes:
        raise ValueError(f"`state_dict` has tensors of other shapes than the model: {_listed('', shapes)}")
    model.load_state_dict(renamed)
    return model


def _rename(key: str, ours: Mapping[str, Tensor]) -> str:
    for pattern, replacement in _RULES:
        key = pattern.sub(replacement, key)
    # Released MRLA has its blocks directly under the stage.
    with_blocks = re.sub(r"^(layer\d+)\.(\d+)\.", r"\1.blocks.\2.", key)
    return with_blocks if with_blocks in ours else key


def _listed(what: str, names: list[str]) -> str:
    return f"{what} {', '.join(names) if names else 'nothing'}".strip()
