import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

import dla

CASES = {
    "dla_b": ("resnet20_dla_b", {}),
    "dla_l": ("resnet20_dla_l", {}),
    "imagenet": ("resnet50_dla_l", {"reduction": 16, "num_classes": 3}),
    "mrla_l": ("resnet20_mrla_l", {}),
    "mrla_b": ("resnet20_mrla_b", {}),
    "dianet": ("resnet20_lii", {"cell": "dia"}),
    "plain": ("resnet20", {}),
}


def released_name(case, key):
    """The name that the authors' code gives to a parameter of ours."""
    attention = "mrla" if case == "imagenet" else "layer_attention"
    projections = {"query": "Wq", "key": "Wk", "value": "Wv"}
    if case in ("dla_b", "dla_l", "mrla_b"):
        key = re.sub(r"^layer(\d)", lambda m: f"stages.{int(m[1]) - 1}", key)
    if case.startswith("mrla"):
        key = re.sub(r"\.blocks\.", ".", key)
        key = re.sub(r"\.attention\.(\d+)\.bn\.", r".\1.bn_mrla.", key)
        key = re.sub(r"\.attention\.(\d+)\.lambda_", r".\1.mrla.lambda_t", key)
        key = re.sub(
            r"\.attention\.(\d+)\.(\w+)\.weight", lambda m: f".{m[1]}.mrla.mrla.{projections[m[2]]}.weight", key
        )
    elif case == "dianet":
        key = key.replace(".blocks.", ".ModuleList.")
    else:
        key = key.replace(".blocks.", ".layers.").replace(".bn.", ".bn_layer_attention.")
        key = key.replace(".lambda_", ".layer_attention.lambda_t")
        key = re.sub(
            r"(\.attention\.\d+)\.(query|key|value)\.",
            lambda m: f"{m[1]}.layer_attention.{attention}.{projections[m[2]]}.",
            key,
        )
    key = key.replace(".carry_conv.", ".extict." if case == "imagenet" else ".excite.")
    return key.replace(".cell.input.", ".lstm.w_ih.0.seq.").replace(".cell.hidden.", ".lstm.w_hh.0.seq.")


def released(case):
    """A state dict as the authors' code writes it, and our model that computed it."""
    name, arguments = CASES[case]
    model = dla.create_model(name, config=dla.RELEASED, **arguments)
    state = {
        released_name(case, key): value[:, None, None] if key.endswith("lambda_") else value
        for key, value in model.state_dict().items()
    }
    return model, state


def test_names_are_those_of_the_authors():
    """The names as they stand in the released files, so that `released_name` cannot be wrong in the same way."""
    assert {
        "stages.0.layers.0.conv1.weight",
        "stages.2.layers.1.bn3.running_var",
        "stages.1.layers.0.downsample.1.num_batches_tracked",
        "stages.0.attention.1.layer_attention.layer_attention.Wq.weight",
        "stages.0.attention.1.layer_attention.lambda_t",
        "stages.0.attention.1.bn_layer_attention.weight",
        "stages.0.lstm.w_ih.0.seq.0.bias",
        "stages.0.lstm.w_hh.0.seq.2.weight",
        "stages.0.excite.weight",
    } <= released("dla_l")[1].keys()
    assert {
        "layer4.layers.2.conv3.weight",
        "layer1.attention.0.layer_attention.mrla.Wv.weight",
        "layer1.attention.0.layer_attention.lambda_t",
        "layer3.extict.weight",
    } <= released("imagenet")[1].keys()
    assert {"layer1.0.mrla.mrla.Wk.weight", "layer1.0.mrla.lambda_t", "layer1.0.bn_mrla.bias"} <= {
        k for k in released("mrla_l")[1]
    }
    assert "stages.0.1.mrla.mrla.Wq.weight" in released("mrla_b")[1]
    assert {"layer1.ModuleList.0.conv1.weight", "layer1.lstm.w_ih.0.seq.0.weight"} <= released("dianet")[1].keys()
    assert "layer1.0.conv1.weight" in released("plain")[1]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("data_parallel", [False, True])
def test_every_tensor_arrives(case, data_parallel):
    source, state = released(case)
    if data_parallel:
        state = {f"module.{key}": value for key, value in state.items()}
    name, arguments = CASES[case]
    model = dla.create_model(name, config=dla.OFFICIAL, **arguments)
    assert dla.load_released(model, state) is model
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.state_dict().items())


def test_from_a_file(tmp_path):
    source, state = released("dla_l")
    torch.save({"epoch": 3, "state_dict": state, "best_acc": 0.5}, tmp_path / "model.pth.tar")
    model = dla.load_released(dla.create_model("resnet20_dla_l", config=dla.RELEASED), tmp_path / "model.pth.tar")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in source.state_dict().items())


def test_from_safetensors(tmp_path):
    source, state = released("dla_l")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    model = dla.load_released(dla.create_model("resnet20_dla_l", config=dla.RELEASED), tmp_path / "model.safetensors")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize("name", ["resnet20_dla_b", "resnet20", "resnet29_dla_l"])
def test_left_over_keys_are_listed_and_nothing_is_loaded(name):
    _, state = released("dla_l")
    model = dla.create_model(name, config=dla.RELEASED)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"`state_dict` does not fit the model: no place for .*; no value for"):
        dla.load_released(model, state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_both_sides_of_what_is_left_over():
    _, state = released("dla_l")
    state["stages.0.surplus"] = state.pop("stages.1.excite.weight")
    with pytest.raises(ValueError, match=r"no place for stages\.0\.surplus; no value for layer2\.carry_conv\.weight$"):
        dla.load_released(dla.create_model("resnet20_dla_l", config=dla.RELEASED), state)


def test_other_shapes():
    _, state = released("dla_l")
    model = dla.create_model("resnet20_dla_l", config=dla.RELEASED, num_classes=100)
    with pytest.raises(
        ValueError, match=r"other shapes than the model: fc.weight \(10, 256\) for \(100, 256\), fc.bias"
    ):
        dla.load_released(model, state)


class Payload:
    """Pickled code: reading it must not run it."""

    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_unreadable_files(tmp_path):
    model = dla.create_model("resnet20_dla_l", config=dla.RELEASED)
    with pytest.raises(FileNotFoundError, match=r"`path` must be a checkpoint file, there is none at .*missing\.pth"):
        dla.load_released(model, tmp_path / "missing.pth")
    good = tmp_path / "good.pth"
    torch.save(released("dla_l")[1], good)
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:1000])
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"state_dict": Payload()}, protocol=2))
    for name in ("cut.pth", "text.pth", "text.safetensors", "code.pth"):
        with pytest.raises(ValueError, match=f"{name} is no readable checkpoint of tensors and plain values: \\w"):
            dla.load_released(model, tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth must hold a dictionary, got list"):
        dla.load_released(model, tmp_path / "list.pth")
