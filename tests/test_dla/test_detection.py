import copy
import json
import re
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import assert_close, gradients
from test_dla.shapes import IDS, write_shapes
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import dla
import dla_kernels
from dla import detection
from dla.detection import create_detector
from dla.detection.data import CocoData, CocoImages, open_coco
from dla.detection.training import COCO, DetectionRecipe, Detector, load_detector
from dla.training import DIGITS, Classifier, make_trainer
from dla_kernels import native

#: Options that make training quick on small images.
SMALL = {
    "fpn_channels": 48, "box_batch_size_per_image": 48, "box_detections_per_img": 10,
    "rpn_pre_nms_top_n_train": 300, "rpn_post_nms_top_n_train": 100,
    "rpn_pre_nms_top_n_test": 300, "rpn_post_nms_top_n_test": 60,
}  # fmt: skip
NAMES = ("square", "disc", "triangle")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("coco") / "shapes", train=6, val=4, short_side=32)


def small(name="fasterrcnn_resnet20_dla_l_fpn", **options):
    return create_detector(name, **({"num_classes": 4, "min_size": 32} | SMALL | options))


def batch(sets, count=3):
    return tuple(zip(*(sets.train[i] for i in range(count)), strict=True))


# Models


@pytest.mark.parametrize(("kind", "parameters"), [("fasterrcnn", 41_755_286), ("maskrcnn", 44_401_393)])
def test_without_attention_it_is_torchvisions(kind, parameters):
    """The published counts, which leave out the scales and shifts of the backbone's frozen BatchNorm."""
    with torch.device("meta"):
        model = create_detector(f"{kind}_resnet50_fpn", trainable_layers=5, frozen_norm=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    assert model.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert (model.transform.min_size, model.transform.max_size) == ((800,), 1333)


@pytest.mark.parametrize("kind", ["fasterrcnn", "maskrcnn"])
@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize("interaction", ["dla_l", "dla_b"])
def test_named_factories(kind, depth, interaction):
    with torch.device("meta"):
        model = getattr(detection, f"{kind}_resnet{depth}_{interaction}_fpn")(num_classes=7, config=dla.OFFICIAL)
        net = dla.resnet(depth, interaction, config=dla.OFFICIAL)
    assert type(model) is detection.KINDS[kind]
    assert model.roi_heads.box_predictor.cls_score.out_features == 7
    expected = {key: value.shape for key, value in net.state_dict().items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in model.backbone.body.state_dict().items()} == expected


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_dla_l_fpn", "maskrcnn_resnet50_dla_b_fpn"])
def test_imagenet_detector_trains_and_detects(name):
    """Images of different sizes, whose maps are odd in the last stages."""
    model = small(name, min_size=70, max_size=100)
    images = [torch.rand(3, 70, 90), torch.rand(3, 84, 71)]
    target = {"boxes": torch.tensor([[10.0, 10, 50, 60]]), "labels": torch.tensor([1])}
    masks = [{"masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8)} for image in images]
    sum(model(images, [target | mask for mask in masks]).values()).backward()
    idle = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not idle
    with torch.no_grad():
        found = model.eval()(images)
    assert [set(f) >= {"boxes", "labels", "scores"} for f in found] == [True, True]


@pytest.mark.skipif(native.ERROR is not None, reason=str(native.ERROR))
@pytest.mark.parametrize("frozen_norm", [False, True])
@pytest.mark.parametrize("name", ["resnet20_dla_l", "resnet20_dla_b"])
def test_native_backbone_against_the_reference(name, frozen_norm):
    """On odd maps, with BatchNorm that trains and that does not: the maps, and the gradient of every weight."""
    backbone = create_detector(
        f"fasterrcnn_{name}_fpn", 4, frozen_norm=frozen_norm, trainable_layers=4, fpn_channels=8, drop_path_rate=0.0
    ).backbone.double()
    with torch.no_grad():
        for module in backbone.body.modules():  # statistics that fit the maps
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.train()
        for _ in range(3):
            backbone.body(torch.randn(4, 3, 37, 29).double())
    x = torch.randn(2, 3, 37, 29, dtype=torch.float64)
    weights = [p for p in backbone.parameters() if p.requires_grad]
    maps, grads = {}, {}
    for backend in ("native", "reference"):
        model = copy.deepcopy(backbone).train()
        with dla_kernels.use_backend(backend):
            maps[backend] = list(model(x).values())
            grads[backend] = gradients(maps[backend], [p for p in model.parameters() if p.requires_grad])
    assert [tuple(m.shape[2:]) for m in maps["native"]] == [(37, 29), (19, 15), (10, 8), (5, 4)]
    assert len(grads["native"]) == len(weights)
    for i, (actual, expected) in enumerate(zip(maps["native"], maps["reference"], strict=True)):
        assert_close(actual, expected, 1e-10, f"map {i}")
    for i, (actual, expected) in enumerate(zip(grads["native"], grads["reference"], strict=True)):
        assert_close(actual, expected, 1e-8, f"gradient {i}")


def freeze(module: nn.Module) -> None:
    """Puts torchvision's FrozenBatchNorm2d in the place of every BatchNorm2d."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict({k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"})
            setattr(module, name, frozen)
        else:
            freeze(child)


def test_frozen_norm_is_torchvisions():
    model = small("fasterrcnn_resnet20_fpn", frozen_norm=True).backbone
    for module in model.body.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                nn.init.uniform_(tensor, 0.5, 2)
    other = copy.deepcopy(model)
    freeze(other.body)
    model.train()
    x = torch.randn(2, 3, 21, 17)
    expected = other(x)
    for key, value in model(x).items():
        assert_close(value, expected[key], 1e-5, key)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained == {key for key, _ in other.named_parameters()}


def step(model, sets):
    """One step of SGD on a few images; the names of the tensors of the state dict that it changed."""
    images, targets = batch(sets)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    before = copy.deepcopy(model.state_dict())
    sum(model.train()(list(images), list(targets)).values()).backward()
    optimizer.step()
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


@pytest.fixture(scope="module")
def sets(shapes):
    return open_coco(shapes)


@pytest.mark.parametrize("name", ["fasterrcnn_resnet20_dla_l_fpn", "fasterrcnn_resnet20_dla_b_fpn"])
def test_what_is_trained(name, sets, tmp_path):
    dla.create_model(name[11:-4]).save_pretrained(tmp_path)
    body = "backbone.body."
    # From scratch everything, from weights all but the stem, the first stage and every BatchNorm.
    changed = step(small(name), sets)
    # A softmax over the first layer alone does not depend on its query.
    idle = {f"{body}layer{i}.attention.0.query.weight" for i in (1, 2, 3)} if "dla_b" in name else set()
    assert {key for key, _ in small(name).named_parameters()} - idle <= changed
    assert f"{body}layer3.attention.1.bn.running_mean" in changed
    changed = step(small(name, weights=tmp_path), sets)
    assert {key for key in changed if key.startswith(body)} == {
        key
        for key, _ in small(name).named_parameters()
        if key.startswith((f"{body}layer2", f"{body}layer3")) and "bn" not in key and "downsample.1" not in key
    } - idle
    changed = step(small(name, weights=tmp_path, trainable_layers=0), sets)
    assert not any(key.startswith(body) for key in changed)
    # Live BatchNorm beside frozen layers: those of the frozen ones rest.
    changed = step(small(name, weights=tmp_path, frozen_norm=False), sets)
    assert f"{body}layer2.attention.0.bn.running_mean" in changed
    assert not any(key.startswith((f"{body}layer1", f"{body}bn1", f"{body}conv1")) for key in changed)


def test_train_and_eval_reach_what_is_not_frozen(tmp_path):
    dla.create_model("resnet20_dla_l").save_pretrained(tmp_path)
    model = small(weights=tmp_path)
    assert model.training
    training = {name for name, module in model.backbone.body.named_modules() if module.train and module.training}
    assert "layer2.attention.0" in training
    assert not any(name.startswith("layer1") or name.endswith("bn") for name in training)
    assert not any(module.training for module in model.eval().modules())
    assert {n for n, m in model.train().backbone.body.named_modules() if m.training} == training


def trained_classifier(path: Path, name="resnet20_dla_l", **model_args) -> Path:
    """A checkpoint as `dla train` writes it."""
    classifier = Classifier(name, DIGITS, {"num_classes": 10, **model_args}, "digits")
    trainer = make_trainer(1, progress=False, accelerator="cpu")
    trainer.strategy.connect(classifier)
    trainer.save_checkpoint(path)
    return path


@pytest.mark.parametrize("source", ["checkpoint", "folder"])
def test_weights_arrive_with_their_reading(source, tmp_path):
    path = trained_classifier(tmp_path / "best.ckpt", config="official", cell="dsu", reduction=8)
    net = dla.checkpoints.load_model(path)
    if source == "folder":
        net.save_pretrained(path := tmp_path / "folder")
    body = small(weights=path).backbone.body
    assert body["layer1"].config == dla.OFFICIAL
    state = body.state_dict()
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items() if not key.startswith("fc."))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "fasterrcnn_resnet29_dla_l_fpn"},
            r"another model: depths \[2, 2, 2\] where \[3, 3, 3\] is asked for$",
        ),
        ({"name": "fasterrcnn_resnet20_dla_b_fpn"}, "interaction dla_l where dla_b is asked for"),
        ({"reduction": 2}, "reduction 4 where 2 is asked for"),
        ({"config": dla.OFFICIAL}, "config .*'joint'.* where .*'split'.* is asked for"),
    ],
)
def test_weights_of_another_model_are_refused(options, message, tmp_path):
    dla.create_model("resnet20_dla_l").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`weights` .* are of another model: .*{message}|{message}"):
        small(**{"name": "fasterrcnn_resnet20_dla_l_fpn", "weights": tmp_path, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "fasterrcnn_resnet18_fpn"},
            "`name` must be fasterrcnn or maskrcnn, then _MODEL_fpn with a model of res",
        ),
        ({"num_classes": 1}, "`num_classes` must be at least 2, the background is one, got 1"),
        ({"trainable_layers": 5}, "`trainable_layers` must be 0 to 4, got 5"),
        ({"reduction": 0}, "`reduction` must be between 1"),
        ({"weights": "/nowhere"}, "there is none at /nowhere"),
    ],
)
def test_bad_detectors_are_refused(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        small(**options)


# Data


def annotate(root: Path, split: str, change) -> None:
    """Rewrites a split's annotations by ``change``."""
    file = root / "annotations" / f"instances_{split}.json"
    listed = json.loads(file.read_text())
    change(listed)
    file.write_text(json.dumps(listed))


def test_targets_are_the_annotations(shapes):
    images = CocoImages(shapes, "val2017", train=False, masks=True)
    listed = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    assert images.categories == list(NAMES)
    for (image, target), entry in zip(images, listed["images"], strict=True):
        own = [a for a in listed["annotations"] if a["image_id"] == entry["id"]]
        size = (entry["height"], entry["width"])
        assert image.shape == (3, *size)
        assert 0 <= image.min() < image.max() <= 1
        assert target["boxes"].tolist() == [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]
        assert target["labels"].tolist() == [list(IDS.values()).index(a["category_id"]) + 1 for a in own]
        assert target["masks"].shape == (len(own), *size)
        for (x1, y1, x2, y2), mask in zip(target["boxes"].int(), target["masks"], strict=True):
            assert mask[y1:y2, x1:x2].sum() == mask.sum() > 0


def test_training_images_are_flipped_with_boxes_and_masks(shapes):
    images = CocoImages(shapes, "train2017", train=True, masks=True)
    straight = CocoImages(shapes, "train2017", train=False, masks=True)[0]
    seen = set()
    for _ in range(20):
        image, target = images[0]
        flipped = not torch.equal(image, straight[0])
        seen.add(flipped)
        if flipped:
            assert torch.equal(image, straight[0].flip(-1))
            assert torch.equal(target["masks"], straight[1]["masks"].flip(-1))
            width = image.shape[-1]
            assert torch.equal(target["boxes"][:, [0, 2]], width - straight[1]["boxes"][:, [2, 0]])
    assert seen == {True, False}


def test_crowds_slivers_and_empty_images_are_not_trained_on(shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "set")

    def change(listed):
        first, second = listed["images"][:2]
        keep = [a for a in listed["annotations"] if a["image_id"] not in (first["id"], second["id"])]
        bad = {"category_id": 2, "area": 4, "iscrowd": 0, "bbox": [1, 1, 9, 9], "image_id": first["id"]}
        listed["annotations"] = [
            *keep, bad | {"id": 1000, "iscrowd": 1}, bad | {"id": 1001, "bbox": [1, 1, 0.5, 9]},
        ]  # fmt: skip

    for split in ("train2017", "val2017"):
        annotate(root, split, change)
    sets = open_coco(root)
    assert (len(sets.train), len(sets.test)) == (4, 4)
    assert sets.test[0][1]["iscrowd"].tolist() == [1, 0]
    assert sets.test[1][1]["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: shutil.rmtree(root), r"there is no .*instances_train2017\.json; expected annotations/inst"),
        (lambda root: (root / "annotations/instances_val2017.json").unlink(), r"there is no .*instances_val2017\.json"),
        (lambda root: shutil.rmtree(root / "val2017"), "there is no .*val2017; expected annotations/.* and val2017/"),
        (lambda root: (root / "train2017/000000000003.png").unlink(), "lists 1 images that are not there, .*0003"),
        (lambda root: (root / "annotations/instances_train2017.json").write_text("{"), "does not list images,"),
        (lambda root: (root / "annotations/instances_train2017.json").write_text("[]"), "does not list images,"),
        (lambda root: (root / "annotations/instances_train2017.json").write_text("{}"), "has no image with a box"),
        (
            lambda root: annotate(root, "val2017", lambda listed: listed["annotations"][0].update(category_id=7)),
            "annotation 1 must have `bbox` .*, got .*'category_id': 7",
        ),
        (
            lambda root: annotate(root, "val2017", lambda listed: listed["annotations"][0].pop("bbox")),
            "annotation 1 must have `bbox`",
        ),
        (
            lambda root: annotate(root, "train2017", lambda listed: listed["annotations"][0].pop("segmentation")),
            "annotation 1 must have .*`segmentation`",
        ),
        (
            lambda root: annotate(root, "val2017", lambda listed: listed["categories"].append({"id": 12, "name": "x"})),
            "must have the same categories",
        ),
    ],
)
def test_bad_folders_are_refused(spoil, message, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "set")
    spoil(root)
    with pytest.raises(ValueError, match=message):
        open_coco(root, masks=True)


def test_segmentation_is_asked_for_only_where_masks_are(shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "set")
    annotate(root, "train2017", lambda listed: [a.pop("segmentation") for a in listed["annotations"]])
    assert len(open_coco(root).train) == 6


# Training


def test_recipe_is_the_papers():
    paper = {"epochs": 12, "batch_size": 8, "milestones": (8, 11), "lr": 0.01, "gamma": 0.1, "momentum": 0.9}
    assert asdict(COCO).items() >= (paper | {"weight_decay": 1e-4, "short_side": 800}).items()


@pytest.mark.parametrize(("field", "value"), [("short_side", 0), ("warmup_steps", -1), ("lr", 0)])
def test_bad_recipe_fields_are_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be .*, got {value}"):
        replace(COCO, **{field: value})


def detector(recipe: DetectionRecipe | None = None, name="fasterrcnn_resnet20_dla_l_fpn", **options) -> Detector:
    recipe = recipe or replace(COCO, short_side=32, batch_size=2, warmup_steps=0)
    return Detector(name, recipe, NAMES, SMALL | options)


def test_rates_of_the_papers_schedule():
    """By step in the warm-up, by epoch afterwards."""
    module = detector(replace(COCO, warmup_steps=4))
    (optimizer,), (by_epoch, by_step) = module.configure_optimizers()
    assert by_step["interval"] == "step"
    rates = []
    for _ in range(12):
        for _ in range(2):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            by_step["scheduler"].step()
        by_epoch.step()
    assert rates == pytest.approx([0.002, 0.004, 0.006, 0.008] + [0.01] * 12 + [0.001] * 6 + [0.0001] * 2)


def test_images_are_scaled_as_the_recipe_says():
    transform = detector(replace(COCO, short_side=96)).net.transform
    assert (transform.min_size, transform.max_size) == ((96,), 160)


@pytest.mark.parametrize("kind", ["fasterrcnn", "maskrcnn"])
def test_ground_truth_scores_one(kind, shapes, monkeypatch):
    """Average precision of what is in the images, of nothing, and of boxes of the wrong class."""
    masks = kind == "maskrcnn"
    module = detector(name=f"{kind}_resnet20_dla_l_fpn").eval()
    images, targets = zip(*CocoImages(shapes, "val2017", train=False, masks=masks), strict=True)

    def found(shift):
        keys = ("boxes", "labels", "masks") if masks else ("boxes", "labels")
        answers = [{key: t[key] for key in keys} | {"scores": torch.ones(len(t["labels"]))} for t in targets]
        for answer in answers:
            answer["labels"] = (answer["labels"] - 1 + shift) % 3 + 1
            if masks:
                answer["masks"] = answer["masks"][:, None].float() * 0.9
        return answers

    def measured(answers):
        logged = {}
        monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value)}))
        monkeypatch.setattr(module.net, "forward", lambda images: answers)
        module.validation_step((images, targets), 0)
        module.on_validation_epoch_end()
        return logged

    names = {"val_ap", "val_ap50", "val_ap75"} | ({"val_mask_ap", "val_mask_ap50"} if masks else set())
    scores = measured(found(0))
    assert {name: scores[name] for name in names} == pytest.approx(dict.fromkeys(names, 1.0))
    assert scores["val_ap_large"] == -1  # COCO's for "there is none"
    scores = measured(found(1))
    assert scores["val_ap"] < 0.1


def test_crowds_do_not_count_against_a_detector(shapes, monkeypatch):
    module = detector().eval()
    image, target = CocoImages(shapes, "val2017", train=False)[0]
    box = torch.tensor([[1.0, 1, 21, 21]])
    other = {"boxes": box, "labels": torch.tensor([1]), "area": torch.tensor([400.0]), "iscrowd": torch.tensor([1])}
    target = {key: torch.cat([target[key], other[key]]) for key in other}
    # Higher scores for what lies in the crowd: were it wrong, precision would fall.
    answer = {
        "boxes": torch.cat([target["boxes"], box + 0.5]),
        "labels": torch.cat([target["labels"], other["labels"]]),
    }
    answer["scores"] = torch.linspace(0.5, 1, len(answer["labels"]))
    logged = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value)}))
    monkeypatch.setattr(module.net, "forward", lambda images: [answer])
    module.validation_step(((image,), (target,)), 0)
    module.on_validation_epoch_end()
    assert logged["val_ap"] == pytest.approx(1.0)


def test_a_loss_that_is_not_finite_stops_the_training(sets, monkeypatch):
    module = detector()
    losses = {"loss_classifier": torch.tensor(0.5), "loss_box_reg": torch.tensor(torch.inf)}
    monkeypatch.setattr(module.net, "forward", lambda images, targets: losses)
    with pytest.raises(FloatingPointError, match=r"not finite \(loss_classifier 0\.5, loss_box_reg inf\): try a lower"):
        module.training_step(batch(sets), 0)


@pytest.mark.parametrize("kind", ["fasterrcnn", "maskrcnn"])
def test_checkpoint_needs_the_file_alone(kind, shapes, tmp_path):
    """Even where the weights that it began with are gone; what they froze stays frozen."""
    dla.resnet_cifar(20, "dla_l", config=dla.OFFICIAL, reduction=8).save_pretrained(tmp_path / "weights")
    module = detector(name=f"{kind}_resnet20_dla_l_fpn", weights=tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights")
    sets = open_coco(shapes, masks=kind == "maskrcnn")
    options = {"progress": False, "accelerator": "cpu", "limit_train_batches": 2, "monitor": "val_ap"}
    make_trainer(1, tmp_path, **options).fit(module, CocoData(sets, 2))
    loaded = load_detector(tmp_path / "last.ckpt")
    assert loaded.hparams == module.hparams
    assert loaded.net.backbone.arguments == module.net.backbone.arguments
    assert loaded.hparams.model_args["config"] == asdict(dla.OFFICIAL)
    assert loaded.hparams.model_args["frozen_norm"] is True
    images = [torch.rand(3, 32, 40)]
    with torch.no_grad():
        expected, found = (m.eval()(images)[0] for m in (module, loaded))
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    with pytest.raises(ValueError, match="is no checkpoint of `dla train`"):
        dla.training.load_classifier(tmp_path / "last.ckpt")


def test_code_of_the_docs_runs(shapes, tmp_path, monkeypatch):
    """As it stands there, but for a small model, the paper's recipe cut short, and no loader processes."""
    text = (Path(__file__).parents[2] / "docs" / "detection.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("coco").symlink_to(shapes)
    dla.create_model("resnet20_dla_l").save_pretrained("resnet50_dla_l")
    monkeypatch.setattr(detection.training, "COCO", replace(COCO, epochs=1, batch_size=2, short_side=32))
    create = partial(create_detector, "fasterrcnn_resnet20_dla_l_fpn", min_size=32)
    monkeypatch.setattr(detection, "fasterrcnn_resnet50_dla_l_fpn", create)
    images, targets = batch(open_coco(shapes))
    names = {"images": list(images), "targets": list(targets)}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        exec(
            block.replace('Detector("fasterrcnn_resnet50', 'Detector("fasterrcnn_resnet20').replace(", workers=4", ""),
            names,
        )
    assert len(blocks) == 2
    assert names["losses"].keys() == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert load_detector("runs/coco/best.ckpt").hparams.recipe["epochs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("interaction", ["dla_l", "dla_b"])
def test_learns_to_detect(interaction, tmp_path):
    sets = open_coco(write_shapes(tmp_path / "shapes", train=96, val=32, short_side=64))
    recipe = replace(COCO, epochs=5, batch_size=4, milestones=(4,), short_side=64, warmup_steps=20, drop_path_rate=0.0)
    trainer = make_trainer(recipe.epochs, progress=False, accelerator="cpu", deterministic="warn")
    trainer.fit(detector(recipe, f"fasterrcnn_resnet20_{interaction}_fpn"), CocoData(sets, recipe.batch_size))
    assert trainer.callback_metrics["val_ap50"] >= 0.5
