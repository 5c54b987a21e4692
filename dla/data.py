"""Image sets behind one string: `digits`, `cifar10:PATH`, `cifar100:PATH`, `imagenet:PATH`.

`open_sets` turns the string into a training set and a held-out set, or says at once what is wrong with it;
`ImageData` feeds them to a Lightning trainer. The randomness of a training image (its crop, its flip) is a function of
the seed, the epoch and the image's index alone: it does not depend on the number of workers or processes, nor on
whether the run was interrupted and resumed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import datasets
from torchvision.transforms import v2

from dla.resnet import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class ImageSets:
    """A training set and a held-out set of (image (C, H, W) float32, label int) pairs."""

    train: Dataset
    test: Dataset
    num_classes: int
    in_chans: int


class TensorImages(Dataset):
    """Images (N, C, H, W) held in memory with their labels (N,), each passed through `transform` when it is read."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor]):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def digits(image_size: int = 16) -> ImageSets:
    """scikit-learn's 1797 scanned handwritten digits (8 x 8, one channel), upsampled to `image_size`.

    A quarter of them, stratified by class, is held out; the split is the same in every run. Training images are
    shifted by up to an eighth of their size.
    """
    scans = load_digits()
    images = torch.from_numpy(scans.images).float().div(16).unsqueeze(1)
    images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(scans.target)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    normalize = v2.Normalize(mean=[images[train].mean().item()], std=[images[train].std().item()])
    shift = v2.RandomCrop(image_size, padding=image_size // 8)
    return ImageSets(
        train=TensorImages(images[train], labels[train], v2.Compose([shift, normalize])),
        test=TensorImages(images[test], labels[test], normalize),
        num_classes=10,
        in_chans=1,
    )


def cifar(num_classes: int, root: Path, download: bool = False) -> ImageSets:
    """CIFAR-10 or CIFAR-100 under `root`, as torchvision lays it out.

    Training images are flipped and cropped after padding by 4. Raises ValueError if the files are not there, or are
    damaged, and `download` is not set.
    """
    kind = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[num_classes]
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(CIFAR_MEAN, CIFAR_STD)]
    augment = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    if not download and not (root / kind.base_folder).is_dir():
        raise ValueError(
            f"`data` cifar{num_classes}:{root}: no folder {root / kind.base_folder}; expected the folder that holds "
            f"{kind.base_folder}/, or --download to fetch it there"
        )
    try:
        train = kind(root, train=True, transform=v2.Compose(augment + to_tensor), download=download)
        test = kind(root, train=False, transform=v2.Compose(to_tensor))
    except RuntimeError as error:  # torchvision's checksums
        raise ValueError(
            f"`data` cifar{num_classes}:{root}: the files in {root / kind.base_folder} are incomplete or damaged; "
            "expected those that torchvision downloads (--download fetches them again)"
        ) from error
    return ImageSets(train, test, num_classes=num_classes, in_chans=3)


def imagenet(root: Path) -> ImageSets:
    """Folders of images, one per class, under `root`/train and `root`/val: ImageNet or any set of its shape.

    Training images: a random resized crop of 224 and a flip; held-out ones: resized to 256, centre crop of 224.
    Raises ValueError if a folder is missing or empty, or if the two name different classes.
    """
    for folder in (root / "train", root / "val"):
        if not folder.is_dir():
            raise ValueError(
                f"`data` imagenet:{root}: no folder {folder}; expected train/ and val/, with a folder for each class"
            )
    to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    crops = {
        "train": [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()],
        "val": [v2.Resize(256), v2.CenterCrop(224)],
    }
    try:
        train, val = (
            datasets.ImageFolder(root / split, transform=v2.Compose(crop + to_tensor)) for split, crop in crops.items()
        )
    except FileNotFoundError as error:  # no class folder, or one without an image; torchvision names it
        raise ValueError(f"`data` imagenet:{root}: {error}") from error
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(
            f"`data` imagenet:{root}: train/ and val/ must hold the same classes; only one of them has "
            + ", ".join(differing[:5])
            + (", ..." if len(differing) > 5 else "")
        )
    return ImageSets(train, val, num_classes=len(train.classes), in_chans=3)


NAMES = ("digits", "cifar10", "cifar100", "imagenet")


def open_sets(data: str, download: bool = False) -> ImageSets:
    """Opens the sets that `data` names.

    Args:
        data: `digits` or `digits:SIZE` (pixels, default 16), `cifar10` or `cifar10:FOLDER` (default `data`),
            `cifar100` likewise, `imagenet:FOLDER`.
        download: fetch CIFAR into its folder if it is not there. Nothing is ever fetched without it.

    Raises:
        ValueError: an unknown name, a bad size, or a folder that does not hold what it should.
    """
    name, _, argument = data.partition(":")
    if name == "digits":
        if argument and not (argument.isdecimal() and int(argument) >= 8):
            raise ValueError(f"`data` digits:{argument}: expected an image size in pixels, at least 8")
        return digits(int(argument or 16))
    if name in ("cifar10", "cifar100"):
        return cifar(int(name.removeprefix("cifar")), Path(argument or "data"), download)
    if name == "imagenet":
        if not argument:
            raise ValueError("`data` imagenet: expected imagenet:FOLDER, where FOLDER holds train/ and val/")
        return imagenet(Path(argument))
    raise ValueError(f"`data` {data}: unknown name {name!r}; expected one of {', '.join(NAMES)}")


class SeededImages(Dataset):
    """Reads `images[index]` with torch's generator seeded by (seed, epoch, index); its keys are (epoch, index)."""

    def __init__(self, images: Dataset, seed: int):
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        # Without workers this runs in the training process, whose own random state must stay untouched.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            return self.images[index]


class EpochSampler(DistributedSampler):
    """A DistributedSampler that yields (epoch, index)."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in super().__iter__())


def mix_seed(*numbers: int) -> int:
    """One well-mixed 64-bit seed from several non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class ImageData(LightningDataModule):
    """Loaders over `sets` for a Lightning trainer.

    Args:
        sets: what `open_sets` returned.
        batch_size: images in one optimiser step, over all processes together, so that a recipe means the same on
            any number of devices.
        processes: the trainer's `world_size`, which share a batch.
        workers: loader processes for each training process; 0 loads in the training process.
        seed: of the order and the augmentation of the training images.

    Raises:
        ValueError: a batch larger than the training set, or one that the processes cannot share evenly.
    """

    def __init__(self, sets: ImageSets, batch_size: int, processes: int = 1, workers: int = 0, seed: int = 0):
        super().__init__()
        if not 1 <= batch_size <= len(sets.train):
            raise ValueError(f"`batch_size` must be 1 to {len(sets.train)}, the training images, got {batch_size}")
        if batch_size % processes:
            raise ValueError(f"`batch_size` must be a multiple of the {processes} processes, got {batch_size}")
        if workers < 0:
            raise ValueError(f"`workers` must be 0 or more, got {workers}")
        self.sets, self.seed = sets, seed
        self.loader_options = {
            "batch_size": batch_size // processes,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        images = SeededImages(self.sets.train, self.seed)
        sampler = EpochSampler(
            images, num_replicas=trainer.world_size, rank=trainer.global_rank, seed=self.seed, drop_last=True
        )
        # On a resume, Lightning creates the first iterator before it tells the sampler the epoch.
        sampler.set_epoch(trainer.fit_loop.epoch_progress.current.processed)
        # A new iterator draws a number; its own generator keeps that from shifting the training process's state.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(images, sampler=sampler, drop_last=True, generator=generator, **self.loader_options)

    def val_dataloader(self) -> DataLoader:
        """The held-out images, each once on one device; among several, padding repeats at most one per process."""
        return DataLoader(self.sets.test, **self.loader_options)

    test_dataloader = val_dataloader
