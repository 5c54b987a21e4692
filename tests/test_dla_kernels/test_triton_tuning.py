"""Which tile a Triton kernel takes, with a clock of our own."""

import json
from types import SimpleNamespace

import pytest
import torch

from dla_kernels import triton

pytestmark = pytest.mark.skipif(triton._import_error() is not None, reason=str(triton._import_error()))

KERNEL = SimpleNamespace(fn=lambda: None)


class Map:
    """What the chooser asks a map on a GPU."""

    is_cuda, device, dtype = True, torch.device("cuda"), torch.bfloat16

    def __init__(self, *shape, channels_last=False):
        self.shape, self.channels_last = shape, channels_last

    def stride(self, dim):
        return 1 if self.channels_last else self.shape[2] * self.shape[3]


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    from dla_kernels.triton import tuning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DLA_KERNELS_AUTOTUNE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_time", lambda function: function())  # a launch returns its time
    tuning._fastest.cache_clear()
    yield tuning
    tuning._fastest.cache_clear()


def chosen(tuning, x, times=None):
    """The tile that was launched last, and all that were."""
    launched = []
    tiles = [(512, 4), (1024, 4), (2048, 8)]
    tuning.run(KERNEL, x, tiles, lambda tile: launched.append(tile) or (times or {}).get(tile, 1.0))
    return launched[-1], launched


def test_the_fastest_is_timed_once_and_kept_on_disk(tuning, tmp_path):
    times = {(1024, 4): 0.5}
    assert chosen(tuning, Map(8, 64, 32, 32), times) == (
        (1024, 4),
        [(512, 4), (1024, 4), (2048, 8), (1024, 4)],  # each once, then the best
    )
    assert list(json.loads((tmp_path / "dla_kernels" / "triton-tiles.json").read_text()).values()) == [1]
    tuning._fastest.cache_clear()  # another process
    assert chosen(tuning, Map(8, 64, 32, 32)) == ((1024, 4), [(1024, 4)])


def test_key_holds_size_class_layout_and_variant_but_no_batch(tuning):
    key = tuning.key_of(KERNEL, Map(8, 64, 32, 32), [(512, 4)])
    assert key == tuning.key_of(KERNEL, Map(1, 60, 31, 30), [(512, 4)])
    others = [
        tuning.key_of(KERNEL, Map(8, 64, 32, 32, channels_last=True), [(512, 4)]),
        tuning.key_of(KERNEL, Map(8, 64, 32, 32), [(512, 4)], variant=16),
        tuning.key_of(KERNEL, Map(8, 128, 32, 32), [(512, 4)]),
        tuning.key_of(KERNEL, Map(8, 64, 16, 16), [(512, 4)]),
        tuning.key_of(KERNEL, Map(8, 64, 32, 32), [(1024, 4)]),
    ]
    assert len({key, *others}) == 6


def test_default_where_nothing_may_be_timed(tuning, monkeypatch, tmp_path):
    default = ((512, 4), [(512, 4)])
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert chosen(tuning, Map(8, 64, 32, 32)) == default
    with monkeypatch.context() as environment:
        environment.setenv("DLA_KERNELS_AUTOTUNE", "0")
        assert chosen(tuning, Map(8, 64, 32, 32)) == default
    assert chosen(tuning, torch.zeros(2, 3, 4, 4)) == default  # on the CPU
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", b"\xff\xfe", "unwritable", "no home"])
def test_a_broken_or_unwritable_cache_is_no_error(tuning, tmp_path, monkeypatch, text):
    folder = tmp_path / "dla_kernels"
    if text == "unwritable":
        folder.write_text("not a folder")
    elif text == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    else:
        folder.mkdir()
        (folder / "triton-tiles.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert chosen(tuning, Map(8, 64, 32, 32), {(2048, 8): 0.1})[0] == (2048, 8)
    assert chosen(tuning, Map(8, 64, 32, 32)) == ((2048, 8), [(2048, 8)])
    assert not [f for f in tmp_path.rglob("tmp*")]  # none left behind


@pytest.mark.parametrize("value", [3, -1, "1", None, 1.5])
def test_a_choice_that_is_none_of_the_candidates_is_made_again(tuning, tmp_path, value):
    times = {(1024, 4): 0.5}
    chosen(tuning, Map(8, 64, 32, 32), times)
    file = tmp_path / "dla_kernels" / "triton-tiles.json"
    file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), value)))
    tuning._fastest.cache_clear()
    assert chosen(tuning, Map(8, 64, 32, 32), times)[0] == (1024, 4)
    assert list(json.loads(file.read_text()).values()) == [1]


def test_processes_keep_each_others_choices(tuning, tmp_path):
    """Two that began with no file, and wrote in turn."""
    chosen(tuning, Map(8, 64, 32, 32))
    other = json.loads((tmp_path / "dla_kernels" / "triton-tiles.json").read_text())
    tuning._fastest.cache_clear()
    tuning._fastest().clear()  # began before the first had written
    chosen(tuning, Map(8, 64, 8, 8))
    assert other.items() < json.loads((tmp_path / "dla_kernels" / "triton-tiles.json").read_text()).items()
