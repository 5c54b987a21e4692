"""Training of detectors on Lightning: the paper's recipe, the module and its checkpoints.

sets = open_coco("coco")
detector = Detector("fasterrcnn_resnet50_dla_l_fpn", COCO, sets.train.categories, {"weights": "best.ckpt"})
trainer = make_trainer(COCO.epochs, out="runs/coco", monitor="val_ap")
trainer.fit(detector, CocoData(sets, COCO.batch_size, workers=4))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR
from torchmetrics.detection import MeanAveragePrecision

from dla.detection import create_detector
from dla.training import Module, Recipe, load_module, named_config

#: What is logged of COCO's measures: the names of torchmetrics and the ends of ours.
MEASURES = {
    "map": "", "map_50": "50", "map_75": "75", "map_small": "_small", "map_medium": "_medium", "map_large": "_large"
}  # fmt: skip


@dataclass(frozen=True)
class DetectionRecipe(Recipe):
    """A recipe for detectors. Images are scaled to `short_side` pixels, but their long side to at most 5/3 of it.

    Over the first `warmup_steps` the rate rises in equal steps, from lr / (warmup_steps + 1).
    """

    short_side: int = 800
    warmup_steps: int = 500

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("short_side", 1), ("warmup_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}")


COCO = DetectionRecipe(epochs=12, batch_size=8, milestones=(8, 11), lr=0.01)
"""The paper's; the warm-up, of which it does not speak, is that of the authors' configuration."""


class Detector(Module):
    """A model of `dla.detection.create_detector` with its training, measured by COCO's average precision.

    All arguments are plain values and travel in every checkpoint, so that `load_detector` needs the file alone.

    Args:
        model: one of `dla.detection.list_detectors()`.
        recipe: a DetectionRecipe, or its fields as a dict.
        categories: the names of the classes, without the background.
        model_args: arguments of `create_detector`; `config` as `named_config` takes it. For `weights` the checkpoints
            note what came with them.
        data: the folder of the images.
        seed: of the weights, of drop path, and of the boxes drawn to train on.

    Raises:
        FileNotFoundError: there are no such weights.
        ValueError: an unknown model, an unknown or unfit argument.
    """

    def __init__(
        self,
        model: str,
        recipe: DetectionRecipe | dict,
        categories: Sequence[str],
        model_args: dict[str, Any] | None = None,
        data: str = "",
        seed: int = 0,
    ):
        super().__init__()
        self.recipe = recipe = recipe if isinstance(recipe, DetectionRecipe) else DetectionRecipe(**recipe)
        options = dict(model_args or {})
        if "config" in options:
            options["config"] = named_config(options["config"])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.net = create_detector(
                model,
                len(categories) + 1,
                min_size=recipe.short_side,
                max_size=recipe.short_side * 5 // 3,
                drop_path_rate=recipe.drop_path_rate,
                **options,
            )
        noted = dict(model_args or {}) | self.net.backbone.arguments
        noted.pop("weights", None)
        plain = {"model": model, "recipe": recipe.as_dict(), "categories": list(categories), "model_args": noted}
        self.save_hyperparameters(plain | {"data": data, "seed": seed})
        masks = model.startswith("maskrcnn")
        self.ap = MeanAveragePrecision(iou_type=("bbox", "segm") if masks else "bbox")
        self.scores = {"bbox_": "val_ap", "segm_": "val_mask_ap"} if masks else {"": "val_ap"}

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Images [3, H, W] -> for each its boxes [N, 4], labels [N] and scores [N], with Mask R-CNN masks too."""
        return self.net(images)

    def training_step(self, batch: tuple[tuple[Tensor, ...], tuple[dict, ...]], batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.net(images, targets)
        loss = sum(losses.values())
        if not loss.isfinite():
            parts = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
            raise FloatingPointError(f"the loss is not finite ({parts}): try a lower `lr` or more `warmup_steps`")
        self.log("loss", loss, prog_bar=True, logger=False, batch_size=len(images))
        for name, value in {"loss": loss, **losses}.items():
            self.log(f"train_{name}", value, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[tuple[Tensor, ...], tuple[dict, ...]], batch_idx: int) -> None:
        images, targets = batch
        predictions = self(images)
        for found in predictions:
            if "masks" in found:
                found["masks"] = found["masks"][:, 0] > 0.5
        self.ap.update(predictions, list(targets))

    def on_validation_epoch_end(self) -> None:
        # Lightning would log one number of a metric; this one computes a dictionary.
        measured = self.ap.compute()
        self.ap.reset()
        for prefix, name in self.scores.items():
            for key, end in MEASURES.items():
                self.log(f"{name}{end}", measured[prefix + key], prog_bar=key == "map", sync_dist=True)

    def configure_optimizers(self) -> dict | tuple[list, list]:
        optimizers = super().configure_optimizers()
        steps = self.recipe.warmup_steps
        if not steps:
            return optimizers
        warmup = LinearLR(optimizers["optimizer"], start_factor=1 / (steps + 1), total_iters=steps)
        by_step = {"scheduler": warmup, "interval": "step"}
        return [optimizers["optimizer"]], [optimizers["lr_scheduler"], by_step]


def load_detector(checkpoint: str | Path, epochs: int | None = None) -> Detector:
    """Rebuilds the detector of a checkpoint, weights included; see `dla.training.load_classifier`."""
    return load_module(Detector, "dla train-detection", checkpoint, epochs)
