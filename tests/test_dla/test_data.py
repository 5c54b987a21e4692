import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torchvision import datasets

from dla.data import IMAGENET_MEAN, IMAGENET_STD, ImageData, ImageSets, SeededImages, TensorImages, open_sets


def train_batches(sets, batch_size=8, epoch=0, rank=0, processes=1, **options):
    data = ImageData(sets, batch_size, processes=processes, **options)
    progress = SimpleNamespace(current=SimpleNamespace(processed=epoch))
    data.trainer = SimpleNamespace(
        world_size=processes, global_rank=rank, fit_loop=SimpleNamespace(epoch_progress=progress)
    )
    return list(data.train_dataloader())


@pytest.fixture(scope="module")
def digits():
    return open_sets("digits:8")


@pytest.fixture
def numbered():
    """Forty images, each filled with its own index: a batch shows what was drawn."""
    images = torch.arange(40.0)[:, None, None, None].expand(-1, 1, 2, 2)
    noisy = TensorImages(images, torch.zeros(40), lambda image: image + torch.rand(()) / 2)
    return ImageSets(noisy, noisy, num_classes=1, in_chans=1)


def test_digits_are_the_scans(digits):
    # At 8 pixels nothing is upsampled: every held-out image is a scan, up to one shift and one scale for all.
    scans = torch.from_numpy(load_digits().images).float().flatten(1)
    images = torch.stack([image for image, _ in digits.test]).flatten(1)
    labels = torch.tensor([label for _, label in digits.test])
    slope = 16 / (images.max() - images.min())
    distance, index = torch.cdist((images - images.min()) * slope, scans, p=1).min(1)
    assert distance.max() < 1e-3
    assert torch.equal(labels, torch.from_numpy(load_digits().target)[index])


def test_digits_split_is_stratified_disjoint_and_the_same_every_time(digits):
    again = open_sets("digits:8")
    assert torch.equal(digits.test.images, again.test.images)
    assert torch.equal(digits.train.images, again.train.images)
    assert (len(digits.train), len(digits.test)) == (1347, 450)
    train, test = ({tuple(x.flatten().tolist()) for x in part.images} for part in (digits.train, digits.test))
    assert not train & test
    shares = [torch.bincount(part.labels, minlength=10) / len(part) for part in (digits.train, digits.test)]
    assert torch.allclose(*shares, atol=0.003)


def test_digits_are_upsampled_bilinearly_and_normalised():
    small, large = open_sets("digits:8"), open_sets("digits")
    assert large.test[0][0].shape == (1, 16, 16)
    expected = F.interpolate(small.test.images, size=(16, 16), mode="bilinear")
    assert torch.equal(large.test.images, expected)
    normalised = large.test.transform(large.train.images)
    assert abs(normalised.mean()) < 1e-5
    assert abs(normalised.std() - 1) < 1e-5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("mnist", "unknown name 'mnist'; expected one of digits, cifar10, cifar100, imagenet"),
        ("", "unknown name ''; expected one of digits"),
        ("digits:4", "digits:4: expected an image size in pixels, at least 8"),
        ("digits:big", "digits:big: expected an image size"),
        ("imagenet", "expected imagenet:FOLDER"),
        ("imagenet:/nowhere", "no folder /nowhere/train; expected train/ and val/"),
        ("cifar10:/nowhere", "no folder /nowhere/cifar-10-batches-py; expected .* or --download"),
        ("cifar100:/nowhere", "no folder /nowhere/cifar-100-python; expected"),
    ],
)
def test_bad_data_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        open_sets(data)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder of CIFAR-10's layout with ten training images a batch. torchvision's checksums are set aside."""
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(10))}))
    meta = {"label_names": [str(i) for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    return tmp_path


def test_cifar_training_images_are_flipped_crops_of_padded_ones(cifar):
    sets = open_sets(f"cifar10:{cifar}")
    assert (len(sets.train), len(sets.test), sets.num_classes, sets.in_chans) == (50, 10, 10, 3)
    plain = torch.stack([sets.test.transform(Image.fromarray(image)) for image in sets.train.data])
    black = sets.test.transform(Image.new("RGB", (32, 32)))[:, :1, :1]
    padded = black.expand(3, 40, 40).clone()
    padded[:, 4:36, 4:36] = plain[7]
    windows = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    drawn = set()
    for epoch in range(40):
        image, label = SeededImages(sets.train, seed=0)[epoch, 7]
        assert label == 7
        plain_at, flipped_at = ((windows - x).abs().amax((1, 2, 3)) < 1e-6 for x in (image, image.flip(2)))
        assert plain_at.any() or flipped_at.any()
        drawn.add((bool(flipped_at.any()), int((plain_at | flipped_at).nonzero()[0])))
    assert {flipped for flipped, _ in drawn} == {False, True}
    assert len({window for _, window in drawn}) > 20


def test_cifar_is_fetched_only_when_asked(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(datasets.CIFAR10, "download", lambda self: fetched.append(self.root))
    with pytest.raises(ValueError, match="--download"):
        open_sets(f"cifar10:{tmp_path}")
    assert not fetched
    with pytest.raises(ValueError, match="damaged"):  # nothing has really arrived
        open_sets(f"cifar10:{tmp_path}", download=True)
    assert fetched == [tmp_path]


def test_damaged_cifar_is_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"half of it")
    with pytest.raises(ValueError, match=rf"cifar10:{tmp_path}: the files in .* are incomplete or damaged"):
        open_sets(f"cifar10:{tmp_path}")


@pytest.fixture
def folders(tmp_path):
    """ImageNet's layout: two classes, red and blue, of 300 x 260 pixels."""
    for split, color in [(s, c) for s in ("train", "val") for c in ("red", "blue")]:
        (tmp_path / split / color).mkdir(parents=True)
        Image.new("RGB", (300, 260), color).save(tmp_path / split / color / "0.png")
    return tmp_path


def test_imagenet_folders(folders):
    sets = open_sets(f"imagenet:{folders}")
    assert (len(sets.train), len(sets.test), sets.num_classes, sets.in_chans) == (2, 2, 2, 3)
    for images in (sets.train, sets.test):
        image, label = images[1]  # classes are sorted: blue, red
        assert label == 1
        assert image.shape == (3, 224, 224)
        red = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
        assert torch.allclose(image, red[:, None, None].expand_as(image), atol=0.02)


def test_imagenet_held_out_images_are_cropped_in_the_centre(folders):
    # 520 x 512 pixels are halved to 260 x 256; the centre crop then begins at pixel 18 and row 16.
    pixels = np.zeros((512, 520, 3), dtype=np.uint8)
    pixels[32 : 32 + 448, 36 : 36 + 448] = 255
    Image.fromarray(pixels).save(folders / "val" / "red" / "0.png")
    image, _ = open_sets(f"imagenet:{folders}").test[1]
    assert image[0, 2:-2, 2:-2].min() == pytest.approx((1 - IMAGENET_MEAN[0]) / IMAGENET_STD[0], abs=1e-5)


def test_imagenet_classes_must_agree(folders):
    (folders / "val" / "blue").rename(folders / "val" / "green")
    with pytest.raises(ValueError, match="the same classes; only one of them has blue, green"):
        open_sets(f"imagenet:{folders}")


def test_imagenet_class_without_images_is_named(folders):
    (folders / "train" / "red" / "0.png").unlink()
    with pytest.raises(ValueError, match=rf"imagenet:{folders}: .* red"):
        open_sets(f"imagenet:{folders}")


def test_an_epoch_draws_every_image_once_in_its_own_order(numbered):
    first, again, second = (
        torch.cat([x[:, 0, 0, 0] for x, _ in train_batches(numbered, epoch=e, seed=5)]) for e in (0, 0, 1)
    )
    assert torch.equal(first, again)
    for values in (first, second):
        assert sorted(values.floor().int().tolist()) == list(range(40))
    assert not torch.equal(first.floor(), second.floor())
    # The augmentation, too, changes from epoch to epoch.
    assert not torch.equal(first.sort()[0].frac(), second.sort()[0].frac())


def test_seed_changes_order_and_augmentation(numbered):
    a, b = (torch.cat([x[:, 0, 0, 0] for x, _ in train_batches(numbered, seed=s)]) for s in (0, 1))
    assert not torch.equal(a.floor(), b.floor())
    assert not torch.equal(a.sort()[0].frac(), b.sort()[0].frac())


def test_workers_change_nothing(digits):
    inside, outside = train_batches(digits, 256, epoch=3), train_batches(digits, 256, epoch=3, workers=2)
    assert len(inside) == len(outside) == 5
    for (a, label_a), (b, label_b) in zip(inside, outside, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(label_a, label_b)


def test_two_processes_share_the_batches_of_one(numbered):
    whole = train_batches(numbered, 8, epoch=2)
    shares = [train_batches(numbered, 8, epoch=2, rank=rank, processes=2) for rank in (0, 1)]
    for (batch, _), (a, _), (b, _) in zip(whole, *shares, strict=True):
        assert len(a) == len(b) == 4
        assert torch.equal(torch.cat([a, b])[:, 0, 0, 0].sort()[0], batch[:, 0, 0, 0].sort()[0])


def test_loading_leaves_the_training_process_its_random_state(digits):
    before = torch.random.get_rng_state()
    train_batches(digits, 256)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be 1 to 40, the training images, got 0"),
        ({"batch_size": 41}, "`batch_size` must be 1 to 40, the training images, got 41"),
        ({"batch_size": 9, "processes": 2}, "`batch_size` must be a multiple of the 2 processes, got 9"),
        ({"batch_size": 8, "workers": -1}, "`workers` must be 0 or more, got -1"),
    ],
)
def test_bad_loader_options_are_refused(numbered, options, message):
    with pytest.raises(ValueError, match=message):
        ImageData(numbered, **options)
