import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from test_dla.test_checkpoints import Payload

import dla
from dla.stage import INTERACTIONS

OWN = replace(dla.OFFICIAL, dsu="joint", carry_conv=False, activation="tanh")


def same(model, other):
    assert type(other) is dla.ResNet
    assert model.arguments == other.arguments
    state = other.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    x = torch.randn(2, model.in_chans, 16, 16)
    assert torch.equal(other(x), model.eval()(x))


@pytest.mark.parametrize("interaction", [None, *INTERACTIONS])
def test_round_trip(interaction, tmp_path):
    """Arguments of every kind: a reading of one's own, a number that is not the default's, a name."""
    model = dla.resnet_cifar(20, interaction, "dsu", OWN, 7, 1, drop_path_rate=0.1, reduction=8)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded = dla.ResNet.from_pretrained(tmp_path)
    same(model, loaded)
    assert not loaded.training
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()
    assert "dla-kernels" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("cell", "config"), [("dia", dla.PAPER), ("lstm", dla.OFFICIAL), ("dsu", dla.RELEASED)])
def test_config_json_holds_the_reading(cell, config, tmp_path):
    model = dla.resnet_cifar(20, "dla_l", cell, config)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert dla.Config(**written["config"]) == config
    assert dla.ResNet.from_pretrained(tmp_path).layer1.config == config


def test_imagenet_model_and_its_changed_classifier(tmp_path):
    model = dla.resnet(50, "dla_l", num_classes=5)
    model.reset_classifier(3)
    model.save_pretrained(tmp_path)
    loaded = dla.ResNet.from_pretrained(tmp_path)
    assert loaded.fc.out_features == loaded.num_classes == 3
    assert loaded.conv1.stride == (2, 2)


def test_what_is_written_is_tensors_alone(tmp_path):
    model = dla.resnet_cifar(20, "dla_l")
    model.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert state.keys() == model.state_dict().keys()


def test_push_to_hub(tmp_path, monkeypatch):
    """What would be uploaded, and that it loads again."""
    model = dla.resnet_cifar(20, "dla_b", config=OWN)
    uploads = []

    class Api:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            assert private
            return huggingface_hub.RepoUrl(f"https://hub.example/{repo_id}", endpoint="https://hub.example")

        def upload_folder(self, repo_id, folder_path, **kwargs):
            uploads.append(repo_id)
            same(model, dla.ResNet.from_pretrained(folder_path))
            return f"https://hub.example/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    url = model.push_to_hub("me/resnet20_dla_b", private=True, token="secret")
    assert url.endswith("/me/resnet20_dla_b/commit/1")
    assert uploads == ["me/resnet20_dla_b"]


def test_from_the_hub(tmp_path, monkeypatch):
    model = dla.resnet_cifar(20, "dla_l")
    model.save_pretrained(tmp_path)

    def download(repo_id, filename, revision, **kwargs):
        assert (repo_id, revision) == ("me/model", "v1")
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", download)
    same(model, dla.ResNet.from_pretrained("me/model", revision="v1"))


def test_pickled_code_on_the_hub_is_not_run(tmp_path, monkeypatch):
    """A repository without safetensors may hold pickles."""
    dla.resnet_cifar(20).save_pretrained(tmp_path)
    torch.save({"fc.weight": Payload()}, tmp_path / "pytorch_model.bin")

    def download(repo_id, filename, **kwargs):
        if filename == "model.safetensors":
            raise huggingface_hub.errors.EntryNotFoundError("none")
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", download)
    with pytest.raises(ValueError, match=r"me/model holds no ResNet that .*: Weights only load failed"):
        dla.ResNet.from_pretrained("me/model")


def broken(folder: Path, what: str) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    arguments = json.loads(config.read_text())
    match what:
        case "no config":
            config.unlink()
        case "other reading":
            config.write_text(json.dumps(arguments | {"config": {"dsu": "split"}}))
        case "bad reading":
            config.write_text(json.dumps(arguments | {"config": {"dsu": "triple"}}))
        case "no json":
            config.write_text("{")
        case "no weights":
            weights.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "pickle":
            torch.save({}, weights)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", "missing 3 required positional arguments: 'stem', 'depths', and 'widths'"),
        ("other reading", "Missing key"),
        ("bad reading", "`dsu` must be one of 'joint', 'split', got 'triple'"),
        ("no json", "Expecting property name"),
        ("no weights", r"model\.safetensors"),
        ("truncated", "deserializing header"),
        ("pickle", "deserializing header"),
    ],
)
def test_bad_folders_are_refused(what, message, tmp_path):
    dla.resnet_cifar(20, "dla_l").save_pretrained(tmp_path)
    broken(tmp_path, what)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dla.ResNet.from_pretrained(tmp_path)


def test_without_huggingface_hub_models_work():
    code = """
import sys
sys.modules["huggingface_hub"] = None
import dla, torch
model = dla.create_model("resnet20_dla_l")
model(torch.randn(2, 3, 8, 8))
for share in (model.save_pretrained, model.push_to_hub, dla.ResNet.from_pretrained):
    try:
        share("somewhere")
    except ImportError as error:
        print(error)
"""
    job = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert job.stdout.splitlines() == ["to share models, install huggingface_hub and safetensors"] * 3
