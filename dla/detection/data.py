"""Images with boxes in COCO's layout: FOLDER/annotations/instances_{split}.json, and the images in FOLDER/{split}/."""

import contextlib
import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from dla.data import ImageData, ImageSets

try:
    from pycocotools.coco import COCO
except ImportError as error:
    raise ImportError("detection needs pycocotools: pip install 'dla-kernels[detection]'") from error


class CocoImages(Dataset):
    """One split: pairs of an image [3, H, W], float32 in [0, 1], and its target. Classes are numbered from 1 by id.

    A target holds ``boxes`` [N, 4] (x1, y1, x2, y2), ``labels`` [N], ``masks`` [N, H, W] where they are wanted, and
    ``area`` and ``iscrowd`` [N], which COCO's measure asks for. To train, half of the images are flipped; crowds, boxes
    of less than a pixel and images where nothing remains are passed over.

    Args:
        root: FOLDER.
        split: such as "train2017".
        train: whether it is to train.
        masks: whether targets have masks.

    Raises:
        ValueError: files that are missing or do not hold what they should.
    """

    def __init__(self, root: Path, split: str, train: bool, masks: bool = False):
        file, self.folder = root / "annotations" / f"instances_{split}.json", root / split
        for path, there in ((file, file.is_file()), (self.folder, self.folder.is_dir())):
            if not there:
                raise ValueError(
                    f"`data` {root}: there is no {path}; expected annotations/instances_{split}.json and {split}/"
                )
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.coco = COCO(file)
            self.files = {key: self.folder / image["file_name"] for key, image in self.coco.imgs.items()}
            self.categories = [self.coco.cats[key]["name"] for key in sorted(self.coco.cats)]
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} does not list images, annotations and categories as COCO does: {error}"
            ) from error
        self.labels = {key: label for label, key in enumerate(sorted(self.coco.cats), 1)}
        self._check(file, masks)
        self.train, self.masks = train, masks
        self.ids = [key for key in sorted(self.files) if not train or self._annotations(key)]
        if not self.ids:
            raise ValueError(f"{file} has no image{' with a box' if train else ''}")
        flip = [v2.RandomHorizontalFlip()] if train else []
        self.transform = v2.Compose([v2.ToImage(), *flip, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])

    def _check(self, file: Path, masks: bool) -> None:
        for key, annotation in self.coco.anns.items():
            if not (
                len(annotation.get("bbox", ())) == 4
                and annotation["category_id"] in self.labels
                and annotation["image_id"] in self.files
                and (not masks or annotation.get("segmentation"))
            ):
                raise ValueError(
                    f"{file}: annotation {key} must have `bbox` [x, y, width, height], `category_id` and `image_id` "
                    f"that the file lists{', `segmentation`' if masks else ''}, got {annotation}"
                )
        if missing := [path for path in self.files.values() if not path.is_file()]:
            raise ValueError(f"{file} lists {len(missing)} images that are not there, such as {missing[0]}")

    def _annotations(self, key: int) -> list[dict]:
        annotations = self.coco.imgToAnns[key]
        if not self.train:
            return annotations
        return [a for a in annotations if not a.get("iscrowd") and min(a["bbox"][2:]) >= 1]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        key = self.ids[index]
        image = Image.open(self.files[key]).convert("RGB")
        annotations, size = self._annotations(key), (image.height, image.width)
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([self.labels[a["category_id"]] for a in annotations], dtype=torch.int64),
            "area": torch.tensor([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in annotations]),
            "iscrowd": torch.tensor([a.get("iscrowd", 0) for a in annotations], dtype=torch.int64),
        }
        if self.masks:
            masks = [torch.from_numpy(self.coco.annToMask(a)) for a in annotations]
            target["masks"] = tv_tensors.Mask(torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8))
        return self.transform(image, target)


def open_coco(root: str | Path, masks: bool = False) -> ImageSets:
    """Opens train2017 and val2017 under ``root``; `num_classes` counts the background too.

    Raises:
        ValueError: see :class:`CocoImages`; or splits of different categories.
    """
    train, val = (CocoImages(Path(root), f"{split}2017", split == "train", masks) for split in ("train", "val"))
    if train.coco.cats.keys() != val.coco.cats.keys() or train.categories != val.categories:
        raise ValueError(f"`data` {root}: train2017 and val2017 must have the same categories")
    return ImageSets(train, val, num_classes=len(train.categories) + 1, in_chans=3)


class CocoData(ImageData):
    """Loaders over the sets of `open_coco`; a batch is a tuple of images, for they differ in size, and one of targets.

    The arguments are those of :class:`dla.data.ImageData`.
    """

    def __init__(self, sets: ImageSets, batch_size: int, processes: int = 1, workers: int = 0, seed: int = 0):
        super().__init__(sets, batch_size, processes, workers, seed)
        self.loader_options["collate_fn"] = _transpose


def _transpose(samples: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[tuple[Tensor, ...], tuple[dict, ...]]:
    return tuple(zip(*samples, strict=True))
