"""A small set in COCO's layout: coloured squares, discs and triangles on noise, in images of different sizes."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"square": (230, 60, 50), "disc": (60, 200, 80), "triangle": (70, 90, 240)}
#: Not 1, 2, 3: COCO's ids have gaps too.
IDS = {"square": 2, "disc": 5, "triangle": 11}


def write_shapes(root: Path, train: int, val: int, short_side: int = 96, seed: int = 0) -> Path:
    """Writes ``train`` and ``val`` images of one to three shapes each, 1 : 1 to 2 : 3 in shape."""
    rng = np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train2017", train), ("val2017", val)):
        (root / split).mkdir()
        images, annotations = [], []
        for image_id in range(1, count + 1):
            sides = [short_side, int(short_side * rng.uniform(1, 1.5))]
            width, height = rng.permutation(sides).tolist()
            picture = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
            for _ in range(rng.integers(1, 4)):
                kind = str(rng.choice(list(COLOURS)))
                side = int(rng.uniform(0.2, 0.5) * short_side)
                x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
                corners = _draw(ImageDraw.Draw(picture), kind, x, y, side)
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": image_id, "category_id": IDS[kind], "iscrowd": 0,
                        "bbox": [x, y, side, side], "area": side * side, "segmentation": [corners],
                    }
                )  # fmt: skip
            name = f"{image_id:012}.png"
            picture.save(root / split / name)
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        listed = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": key, "name": name} for name, key in IDS.items()],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(listed))
    return root


def _draw(draw: ImageDraw.ImageDraw, kind: str, x: int, y: int, side: int) -> list[float]:
    """Draws the shape, and returns its outline, x and y in turn."""
    if kind == "disc":
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        radius = side / 2
        points = [(x + radius + radius * np.cos(a), y + radius + radius * np.sin(a)) for a in angles]
    elif kind == "square":
        points = [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]
    else:
        points = [(x + side / 2, y), (x + side, y + side), (x, y + side)]
    draw.polygon(points, fill=COLOURS[kind])
    return [float(value) for point in points for value in point]
