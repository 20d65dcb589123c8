"""Images with one label each: formats, checks, augmentation, mixed batches, lengths in epochs, accuracy."""

import itertools
import json
import logging
import math
import os
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import config
from PIL import Image
from runs import in_two_processes, read_checkpoint, run_training, tool

from d2kd.config_reader import read_config
from d2kd.data.classes import check_classes, class_names
from d2kd.data.classification import ClassificationMapper, Cub200, ImageFolders, RepeatAugmentation
from d2kd.data.classification import samplers as samplers_module
from d2kd.data.datasets import DatasetError, check_datasets, register_datasets
from d2kd.data.loader import build_test_loader, build_train_loader
from d2kd.data.mapper import build_mapper, wrap_mapper
from d2kd.engine.epochs import resolve_epochs, with_iterations
from d2kd.engine.scaling import scale_to_processes
from d2kd.errors import ConfigError
from d2kd.evaluation.build import EvaluatorError, build_evaluator, check_evaluators
from d2kd.evaluation.classification import ClassificationEvaluator
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

pytestmark = pytest.mark.usefixtures("forget_datasets")

CLASSIFIER = {
    "MODEL.META_ARCHITECTURE": "ImageClassifier",
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res5"],
    "MODEL.CLASSIFIER.NUM_CLASSES": 3,
    "INPUT.CLASSIFICATION.SIZE": 16,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 4,
}
MIXED = {
    "INPUT__CLASSIFICATION__AUTO_AUGMENT": "rand-m9-mstd0.5-inc1",
    "INPUT__CLASSIFICATION__MIXUP": 0.8,
    "INPUT__CLASSIFICATION__CUTMIX": 1.0,
    "INPUT__CLASSIFICATION__ERASING__PROB": 0.5,
}


def picture(path: Path, size: tuple[int, int] = (30, 20), seed: int = 0) -> None:
    """Writes an image of (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`train` with the classes ant, bee and cat, of 3, 2 and 2 images; `val` with one of each."""
    for split, counts in (("train", (3, 2, 2)), ("val", (1, 1, 1))):
        for name, count in zip(("ant", "bee", "cat"), counts):
            for i in range(count):
                picture(tmp_path / split / name / f"{name}{i}.png", seed=10 * i + count)
    return tmp_path


def classifier(root: Path, **changes: Any) -> Any:
    """The configuration of a classifier on these folders, registered."""
    sets = [{"NAME": s, "FORMAT": "folders", "IMAGES": str(root / s)} for s in ("train", "val")]
    keys = {"DATASETS__REGISTER": sets, "DATASETS__TRAIN": ("train",), "DATASETS__TEST": ("val",), **changes}
    cfg = config(CLASSIFIER, **keys)
    register_datasets(cfg)
    return cfg


def checked(cfg: Any) -> None:
    check_datasets(cfg)
    check_classes(cfg)


# --- Class folders -----------------------------------------------------------------


def test_folders_are_classes_in_the_order_of_their_names(root):
    checked(cfg := classifier(root))
    records = DatasetCatalog.get("train")
    assert [r["label"] for r in records] == [0, 0, 0, 1, 1, 2, 2]
    assert [r["image_id"] for r in records] == [1, 2, 3, 4, 5, 6, 7]
    assert records[3] == {"file_name": str(root / "train/bee/bee0.png"), "image_id": 4, "label": 1}
    meta = MetadataCatalog.get("train")
    assert (meta.thing_classes, meta.evaluator_type) == (["ant", "bee", "cat"], "classification")
    assert meta.image_root == str(root / "train") and class_names(cfg) == {"thing_classes": ["ant", "bee", "cat"]}


def test_what_is_no_image_is_left_out_and_counted(root, caplog):
    caplog.set_level(logging.INFO, "d2kd")
    for name in ("Thumbs.db", "notes.txt", ".hidden.png", ".DS_Store"):
        (root / "train/ant" / name).write_text("?")
    (root / "train/.cache").mkdir()
    (root / "train/LICENSE").write_text("free")
    picture(root / "train/bee/UPPER.PNG")
    picture(root / "train/bee/more/deep.jpeg")
    checked(classifier(root))
    names = [os.path.relpath(r["file_name"], root / "train") for r in DatasetCatalog.get("train")]
    assert names[3:7] == ["bee/UPPER.PNG", "bee/bee0.png", "bee/bee1.png", "bee/more/deep.jpeg"] and len(names) == 9
    assert "left out 3 files that are no images" in caplog.text


def test_links_are_followed_but_not_into_circles(root, tmp_path_factory, caplog):
    elsewhere = tmp_path_factory.mktemp("disk")
    picture(elsewhere / "dog" / "dog.png")
    (root / "train/dog").symlink_to(elsewhere / "dog")
    (root / "train/ant/again").symlink_to(root / "train")
    for one, other in (("ant", "bee"), ("bee", "ant")):  # a circle of two links
        (root / "train" / one / "other").symlink_to(elsewhere / other)
        (elsewhere / other).mkdir()
        (elsewhere / other / "back").symlink_to(elsewhere / one)
    (root / "train/bee/itself").symlink_to(root / "train/bee/itself")
    source = ImageFolders("linked", str(root / "train"))
    assert source.class_names() == ["ant", "bee", "cat", "dog"]
    assert [r["label"] for r in source()] == [0, 0, 0, 1, 1, 2, 2, 3]
    (root / "train/bee/same.png").symlink_to(root / "train/ant/ant0.png")
    source.examine("error")
    assert "1 images are links to others of them" in caplog.text
    (root / "train/cat/gone.png").symlink_to(root / "nothing.png")
    (root / "train/cat/itself.png").symlink_to(root / "train/cat/itself.png")
    with pytest.raises(DatasetError, match=r"2 links of .* lead nowhere, first cat/gone.png"):
        source.examine("error")
    source.examine("warn")
    assert len(source()) == 9 and "They are left out" in caplog.text


@pytest.mark.parametrize("asked, there", [("val", "valid"), ("valid", "val"), ("validation", "val")])
def test_the_other_name_of_a_split_is_taken(root, asked, there, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "d2kd")
    if there != "val":
        (root / "val").rename(root / there)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    sets = [{"NAME": "mine", "FORMAT": "folders", "IMAGES": asked}]
    checked(classifier(root, DATASETS__REGISTER=sets, DATASETS__TRAIN=(), DATASETS__TEST=("mine",)))
    assert DatasetCatalog.get("mine")[0]["file_name"] == str(root / there / "ant/ant0.png")
    assert f"there is no {asked}, and {root / there} is taken" in caplog.text
    assert len(ImageFolders("built-in", str(root / asked))()) == 3


def test_builtin_datasets_are_registered():
    assert {"imagenet_train", "imagenet_val", "cub200_train", "cub200_test"} <= set(DatasetCatalog.list())
    assert MetadataCatalog.get("imagenet_val").image_root.endswith(os.path.join("imagenet", "val"))
    assert isinstance(DatasetCatalog["cub200_test"], Cub200)


def test_a_name_keeps_its_folder(root):
    register_datasets(classifier(root))  # the same again
    with pytest.raises(DatasetError, match=r"dataset 'train' exists already, as folders .*train; it cannot become"):
        classifier(root, DATASETS__REGISTER=[{"NAME": "train", "FORMAT": "folders", "IMAGES": str(root / "val")}])
    with pytest.raises(DatasetError, match="'cub200_test' exists already, as cub .*CUB_200_2011 test"):
        entry = {"NAME": "cub200_test", "FORMAT": "cub", "ROOT": str(root), "SPLIT": "test"}
        classifier(root, DATASETS__REGISTER=[entry])


def flatten(root: Path, prefix: str = "") -> None:
    for i, file in enumerate(sorted((root / "train").rglob("*.png"))):
        file.rename(root / "train" / f"{prefix}{i}.png")
    for folder in (root / "train").iterdir():
        if folder.is_dir():
            folder.rmdir()


def nest(root: Path, names: Sequence[str] = ()) -> None:
    (root / "train").rename(root / "moved")
    for name in names:
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / name).symlink_to(root / "moved")


def empty(root: Path) -> None:
    for file in (root / "train").rglob("*.png"):
        file.rename(file.with_suffix(".npy"))


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lambda root: (root / "train").rename(root / "gone"), r"IMAGES of dataset 'train' .*does not exist"),
        (flatten, r"7 images lie directly in .*train, first 0.png, and there must be one folder for each class\.$"),
        (partial(flatten, prefix="ILSVRC2012_val_"), r"first ILSVRC2012_val_0.png.*sort them.*datasets/README.md"),
        (empty, r"the 3 class folders of .* hold no images .*There is .*\.npy"),
        (
            partial(nest, names=("train", "val")),
            r"holds no class folders, but train, val .*IMAGES must be .*train/train or ",
        ),
        (partial(nest, names=("images",)), r"holds no class folders, but images .*IMAGES must be .*train/images"),
        (lambda root: nest(root) or (root / "train").mkdir(), "train has no folders in it"),
        (lambda root: (root / "train/bee/bee0.png").write_bytes(b""), r"Image .*bee0.png cannot be read .*is empty"),
        (lambda root: (root / "train/bee").rename(root / "train/wasp"), r"classes \(ant, cat, wasp\).*\(ant, bee, cat"),
    ],
)
def test_folders_that_are_no_dataset_are_told_in_one_line(root, spoil, match):
    spoil(root)
    with pytest.raises(DatasetError, match=match) as error:
        checked(classifier(root))
    assert "\n" not in str(error.value)


def test_a_folder_that_may_not_be_read_is_named(root, monkeypatch):
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(DatasetError, match=r"folder .*train/bee cannot be read \(Permission denied\)"):
        checked(classifier(root))


def test_what_may_be_meant_is_a_warning(root, caplog):
    (root / "train/dodo").mkdir()
    (root / "val/dodo").mkdir()
    picture(root / "train/stray.jpg")
    checked(classifier(root, MODEL__CLASSIFIER__NUM_CLASSES=4, INPUT__CLASSIFICATION__SIZE=64))
    assert "'train': 1 images lie beside the class folders" in caplog.text
    assert "1 of 4 classes have no images: dodo. Nothing is learned of them." in caplog.text
    assert "'val': 1 of 4 classes have no images: dodo. Their own accuracy is nan." in caplog.text
    assert "'train': 7 of 7 images that were looked at have a side shorter than 64 pixels" in caplog.text
    assert "side shorter than 73 pixels" in caplog.text  # 64 / 0.875
    caplog.clear()
    checked(classifier(root, MODEL__CLASSIFIER__NUM_CLASSES=4))
    assert "shorter" not in caplog.text


def test_bad_images_may_be_left_out_of_training_only(root, caplog):
    (root / "train/bee/bee0.png").write_bytes((root / "train/bee/bee0.png").read_bytes()[:-300])
    cfg = classifier(root, DATASETS__ON_BAD_IMAGE="skip")
    checked(cfg)
    assert "bee0.png cannot be read" in caplog.text
    seen = [x["file_name"] for batch in itertools.islice(build_train_loader(cfg), 8) for x in batch]
    assert len(seen) == 32 and not any("bee0" in name for name in seen)
    cfg.DATASETS.TEST = ("train",)
    with pytest.raises(DatasetError, match=r"bee0.png cannot be read"):
        check_datasets(cfg, ["TEST"])


def test_datasets_and_models_must_be_of_one_kind(root, digits):
    cfg = classifier(root)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    for split in ("TRAIN", "TEST"):
        with pytest.raises(DatasetError, match=rf"of DATASETS\.{split} has images with one label each.*is RetinaNet"):
            check_datasets(cfg, [split])
    coco = {"NAME": "boxes", "JSON": str(digits / "annotations/instances_val.json"), "IMAGES": str(digits / "val")}
    cfg = classifier(root, DATASETS__REGISTER=[coco], DATASETS__TRAIN=("boxes",), DATASETS__TEST=("boxes",))
    for split in ("TRAIN", "TEST"):
        with pytest.raises(DatasetError, match=rf"'boxes' of DATASETS\.{split} has the evaluator type 'coco'"):
            check_datasets(cfg, [split])
    DatasetCatalog.register("unlabeled", lambda: [{"file_name": "a.png", "image_id": 1}])
    cfg.DATASETS.TRAIN = ("unlabeled",)
    with pytest.raises(DatasetError, match=r"'unlabeled': record 0 \(a.png\) has label = None"):
        check_datasets(cfg, ["TRAIN"])


def test_all_sets_have_the_same_classes(root):
    picture(root / "train/dog/a.png")
    with pytest.raises(DatasetError, match=r"cat, dog\), and .*\(ant, bee, cat\): they differ from class 3 on"):
        checked(classifier(root, MODEL__CLASSIFIER__NUM_CLASSES=4))


def test_the_number_of_classes_is_the_models(root):
    with pytest.raises(DatasetError, match=r"3 classes \(ant, bee, cat\), but MODEL\.CLASSIFIER\.NUM_CLASSES is 4"):
        checked(classifier(root, MODEL__CLASSIFIER__NUM_CLASSES=4))


# --- CUB-200-2011 ------------------------------------------------------------------

CUB = {
    "images.txt": "1 001.Auk/a.jpg\n2 001.Auk/b.jpg\n3 002.Tern/c.jpg\n",
    "image_class_labels.txt": "1 1\n2 1\n3 2\n",
    "train_test_split.txt": "1 1\n2 0\n3 1\n",
    "classes.txt": "1 001.Auk\n2 002.Tern\n",
}


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    """CUB-200-2011 with three images of two birds."""
    for name, content in CUB.items():
        (tmp_path / name).write_text(content)
    for name in ("001.Auk/a.jpg", "001.Auk/b.jpg", "002.Tern/c.jpg"):
        picture(tmp_path / "images" / name)
    return tmp_path


def test_cub_is_read_from_its_archive(cub):
    sets = [{"NAME": f"birds_{s}", "FORMAT": "cub", "ROOT": str(cub), "SPLIT": s} for s in ("train", "test")]
    keys = {"DATASETS__REGISTER": sets, "DATASETS__TRAIN": ("birds_train",), "DATASETS__TEST": ("birds_test",)}
    checked(classifier(cub, MODEL__CLASSIFIER__NUM_CLASSES=2, **keys))
    assert [(r["image_id"], r["label"]) for r in DatasetCatalog.get("birds_train")] == [(1, 0), (3, 1)]
    assert DatasetCatalog.get("birds_test") == [
        {"file_name": str(cub / "images/001.Auk/b.jpg"), "image_id": 2, "label": 0}
    ]
    assert MetadataCatalog.get("birds_test").thing_classes == ["001.Auk", "002.Tern"]
    with pytest.raises(ConfigError, match=r"DATASETS\.REGISTER\[0\]\.SPLIT is 'val'; it must be one of train, test"):
        classifier(cub, DATASETS__REGISTER=[{**sets[0], "SPLIT": "val"}])


@pytest.mark.parametrize(
    "file, content, match",
    [
        ("images.txt", None, r"images.txt cannot be read .*ROOT must be the folder CUB_200_2011"),
        ("images.txt", "", "images.txt is empty"),
        ("images.txt", "1 a.jpg\ntwo b.jpg\n", "images.txt, line 2, is 'two b.jpg'; it must be a number and a value"),
        ("images.txt", "1 a.jpg\n1 b.jpg\n", "images.txt, line 2, has number 1 again"),
        ("image_class_labels.txt", "1 1\n2 1\n", "image_class_labels.txt has no image 3"),
        ("train_test_split.txt", CUB["train_test_split.txt"] + "9 1\n", "images.txt has no image 9"),
        ("image_class_labels.txt", "1 1\n2 1\n3 7\n", "line 3, gives image 3 a class '7'; it must be of classes.txt"),
        ("train_test_split.txt", "1 1\n2 0\n3 2\n", r"line 3, has '2'; it must be 1 \(train\) or 0 \(test\)"),
        ("train_test_split.txt", "1 0\n2 0\n3 0\n", "puts no image into train"),
    ],
)
def test_broken_files_of_cub_are_named(cub, file, content, match):
    (cub / file).unlink() if content is None else (cub / file).write_text(content)
    with pytest.raises(DatasetError, match=f"Dataset 'birds': .*{match}"):
        Cub200("birds", str(cub), "train")()


# --- From a file to an input -------------------------------------------------------


def test_evaluation_cuts_out_the_center_of_the_resized_image(root):
    cfg = classifier(root, INPUT__FORMAT="RGB", INPUT__CLASSIFICATION__CROP_PCT=0.8)
    record = DatasetCatalog.get("val")[0]
    out = build_mapper(cfg, is_train=False)(record)
    resized = Image.open(record["file_name"]).resize((30, 20), Image.Resampling.BICUBIC)  # 16 / 0.8 = 20
    want = np.asarray(resized)[2:18, 7:23].transpose(2, 0, 1)
    np.testing.assert_array_equal(out["image"].numpy(), want)
    assert {k: v for k, v in out.items() if k != "image"} == {**record, "height": 20, "width": 30}
    cfg.INPUT.FORMAT = "BGR"
    assert torch.equal(build_mapper(cfg, is_train=False)(record)["image"], out["image"].flip(0))
    cfg.INPUT.CLASSIFICATION.TEST_SIZE, cfg.INPUT.CLASSIFICATION.INTERPOLATION = 12, "random"
    assert build_mapper(cfg, is_train=False)(record)["image"].shape == (3, 12, 12)
    assert build_mapper(cfg, is_train=True)(record)["image"].shape == (3, 16, 16)


@pytest.mark.parametrize("format", ["RGB", "BGR"])
def test_training_augments_as_timm_does_on_rgb(root, format):
    from timm.data import create_transform

    policy, mean = "rand-m5-n3-inc1", [120.0, 110.0, 100.0]
    cfg = classifier(root, INPUT__CLASSIFICATION__AUTO_AUGMENT=policy, INPUT__FORMAT=format)
    cfg.MODEL.PIXEL_MEAN = mean if format == "RGB" else mean[::-1]
    timms = create_transform(
        16,
        is_training=True,
        use_prefetcher=True,
        interpolation="bicubic",
        auto_augment=policy,
        mean=tuple(value / 255 for value in mean),
    )
    record, mapper = DatasetCatalog.get("train")[0], build_mapper(cfg, is_train=True)
    for seed in range(10):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        ours = mapper(record)["image"]
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        want = timms(Image.open(record["file_name"]))
        assert torch.equal(ours, want if format == "RGB" else want.flip(0)) and ours.dtype == torch.uint8


def test_the_strongest_posterization_is_black(root):
    cfg = classifier(root, INPUT__CLASSIFICATION__AUTO_AUGMENT="rand-m10-n20-p1-inc1")
    mapper = build_mapper(cfg, is_train=True)
    (randaugment,) = [part for part in mapper.transform.transforms if hasattr(part, "ops")]
    (posterize,) = [op for op in randaugment.ops if "Posterize" in op.name]
    assert posterize.aug_fn(Image.new("RGB", (2, 2), "red"), 0).getextrema() == ((0, 0),) * 3
    assert posterize.aug_fn(Image.new("RGB", (2, 2), "red"), 1).getextrema() == ((128, 128), (0, 0), (0, 0))


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK"])
def test_every_kind_of_color_becomes_rgb(root, mode):
    path = root / ("train/ant/x.tif" if mode == "CMYK" else "train/ant/x.png")
    Image.new("RGB", (24, 24), (200, 30, 60)).convert(mode).save(path)
    out = build_mapper(classifier(root), is_train=False)({"file_name": str(path), "label": 0, "image_id": 1})
    assert out["image"].shape == (3, 16, 16) and out["image"].dtype == torch.uint8


def test_images_are_upright(root):
    image, exif = Image.new("RGB", (30, 20)), Image.Exif()
    image.paste((255, 255, 255), (0, 0, 15, 20))
    exif[0x0112] = 6
    image.save(root / "train/ant/turned.jpg", exif=exif)
    out = build_mapper(classifier(root), is_train=False)({"file_name": str(root / "train/ant/turned.jpg"), "label": 0})
    assert (out["height"], out["width"]) == (30, 20)
    assert out["image"][:, :4].min() > 200 and out["image"][:, -4:].max() < 50


@pytest.mark.parametrize("damage", ["truncated", "gone", "16-bit"])
def test_images_that_cannot_be_used_are_named_where_they_are_read(root, damage):
    path = root / "train/ant/ant0.png"
    if damage == "16-bit":
        Image.fromarray(np.zeros((20, 30), np.uint16)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:-300]) if damage == "truncated" else path.unlink()
    mapper = wrap_mapper(build_mapper(classifier(root), is_train=True), "error")
    assert isinstance(mapper.mapper, ClassificationMapper)
    with pytest.raises(DatasetError, match=r"Image .*ant0.png .*(cannot be read|16-bit).*DATASETS\.ON_BAD_IMAGE"):
        mapper({"file_name": str(path), "label": 0, "image_id": 1})


@pytest.mark.parametrize(
    "key, value, match",
    [
        ("INPUT.CLASSIFICATION.AUTO_AUGMENT", "randaug", r"'randaug'; a policy begins with.*Did you mean rand"),
        ("INPUT.CLASSIFICATION.AUTO_AUGMENT", "rand-m9-std0.5", r"after 'rand', 'std0.5' means nothing"),
        ("INPUT.CLASSIFICATION.AUTO_AUGMENT", "rand-m9.5", "which timm does not take"),
        ("INPUT.CLASSIFICATION.AUTO_AUGMENT", "augmix-n3", "after 'augmix', 'n3' means nothing"),
        ("INPUT.CLASSIFICATION.INTERPOLATION", "bicubc", "Did you mean bicubic"),
        ("INPUT.CLASSIFICATION.SCALE", [0.5, 0.1], "two numbers, the smaller one first"),
        ("INPUT.CLASSIFICATION.RATIO", [1.0], "two numbers"),
        ("INPUT.CLASSIFICATION.CROP_PCT", 0.0, "above 0"),
        ("INPUT.CLASSIFICATION.MIX_MODE", "half", "one of batch, pair, elem"),
        ("INPUT.CLASSIFICATION.MIX_PROB", 1.5, "at most 1"),
        ("INPUT.CLASSIFICATION.MIXUP", -0.1, "at least 0"),
        ("INPUT.CLASSIFICATION.ERASING.MODE", "black", "one of const, rand, pixel"),
        ("INPUT.FORMAT", "YCbCr", "an image classifier takes RGB or BGR"),
        ("TEST.IMS_PER_BATCH", 0, "at least 1"),
        ("SOLVER.MAX_EPOCHS", -1.0, "at least 0"),
        ("DATALOADER.REPEATS", 0, "at least 1"),
        ("SOLVER.IMS_PER_BATCH", 5, r"is 5; with INPUT\.CLASSIFICATION\.MIXUP or CUTMIX .*even number"),
    ],
)
def test_wrong_values_are_told_when_the_configuration_is_read(key, value, match):
    options = {"MODEL.META_ARCHITECTURE": "ImageClassifier", "INPUT.CLASSIFICATION.MIXUP": 0.2, key: value}
    with pytest.raises(ConfigError, match=match) as error:
        read_config("", [item for pair in options.items() for item in pair])
    assert key in str(error.value)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-tweights", "augmix-m5-w4-d2", "v0", "3a", ""])
def test_policies_of_timm_are_taken(policy):
    options = ["MODEL.META_ARCHITECTURE", "ImageClassifier", "INPUT.CLASSIFICATION.AUTO_AUGMENT", policy]
    assert read_config("", options).INPUT.CLASSIFICATION.AUTO_AUGMENT == policy


# --- Batches -----------------------------------------------------------------------


def train_batches(cfg: Any, count: int, start: int = 0) -> list[Any]:
    loader = build_train_loader(cfg)
    loader.start = start
    return list(itertools.islice(iter(loader), count))


def assert_same_batches(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(itertools.chain(*ours), itertools.chain(*theirs)):
        assert one.keys() == other.keys() and one["image_id"] == other["image_id"]
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["target"], other["target"])


def test_mixed_batches_do_not_depend_on_workers_or_on_the_start(root):
    cfg = classifier(root, **MIXED)
    whole = train_batches(cfg, 5)
    cfg.DATALOADER.NUM_WORKERS = 2
    assert_same_batches(train_batches(cfg, 3, start=2), whole[2:])
    images = [x["image"] for batch in whole for x in batch if x["image_id"] == whole[0][0]["image_id"]]
    assert len(images) > 1 and not torch.equal(images[0], images[1])


def test_mixing_leaves_the_random_states_of_the_model_alone(root):
    stream = iter(build_train_loader(classifier(root, **MIXED)))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    want = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    next(stream)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == want


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_images_and_labels_are_mixed_as_timm_does(root, mode, loss):
    from timm.data import FastCollateMixup

    keys = {"INPUT__CLASSIFICATION__MIX_MODE": mode, "MODEL__CLASSIFIER__LABEL_SMOOTHING": 0.1}
    keys |= {"INPUT__CLASSIFICATION__MIXUP": 0.3, "INPUT__CLASSIFICATION__CUTMIX": 1.0}
    loader = build_train_loader(classifier(root, **keys, MODEL__CLASSIFIER__LOSS=loss))
    inputs = [{"image": torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8), "label": i % 3} for i in range(6)]
    timms = FastCollateMixup(0.3, 1.0, mode=mode, label_smoothing=0.1, num_classes=3)
    for seed in range(6):
        np.random.seed(seed)
        mixed = loader.mix([{**x, "image": x["image"].clone()} for x in inputs])
        np.random.seed(seed)
        images, targets = timms([(x["image"].clone(), x["label"]) for x in inputs])
        assert torch.equal(torch.stack([x["image"] for x in mixed]), images) and images.dtype == torch.uint8
        assert torch.equal(torch.stack([x["target"] for x in mixed]), targets)
        assert [x["label"] for x in mixed] == [0, 1, 2, 0, 1, 2]
        torch.testing.assert_close(targets.sum(1), torch.ones(6))


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erased_rectangles_have_colors_around_the_mean_and_nothing_else_changes(root, mode):
    keys = {"INPUT__CLASSIFICATION__ERASING__PROB": 1.0, "INPUT__CLASSIFICATION__ERASING__MODE": mode}
    cfg = classifier(root, **keys, MODEL__PIXEL_MEAN=[10.0, 20.0, 30.0], MODEL__PIXEL_STD=[2.0, 3.0, 4.0])
    inputs = [{"image": torch.full((3, 16, 16), 200, dtype=torch.uint8), "label": 0} for _ in range(40)]
    erased = torch.stack([x["image"] for x in build_train_loader(cfg).mix(inputs)])
    kept = (erased - 200).abs() < 1e-3
    assert erased.dtype == torch.float32 and torch.equal(kept[:, 0], kept[:, 1]) and inputs[0]["image"].min() == 200
    share = 1 - kept.float().mean((1, 2, 3))
    assert (share > 0).float().mean() > 0.9 and 0.05 < share.mean() < 0.3
    for channel, mean, std in zip(range(3), (10, 20, 30), (2, 3, 4)):
        colors = erased[:, channel][~kept[:, channel]]
        if mode == "const":
            torch.testing.assert_close(colors, torch.full_like(colors, mean))
        elif mode == "pixel":
            assert colors.mean() == pytest.approx(mean, abs=0.5) and colors.std() == pytest.approx(std, rel=0.2)
        else:
            assert (colors - mean).abs().max() < 6 * std and len(colors.unique()) > 20


def test_labels_are_not_touched_where_nothing_is_mixed(root):
    (batch,) = train_batches(classifier(root), 1)
    assert all("target" not in x and x["image"].dtype == torch.uint8 for x in batch)
    (batch,) = train_batches(classifier(root, INPUT__CLASSIFICATION__ERASING__PROB=0.1), 1)
    assert all("target" not in x and x["image"].dtype == torch.float32 for x in batch)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_in_a_mixed_batch_is_told(root, workers):
    cfg = classifier(root, DATALOADER__NUM_WORKERS=workers, **MIXED)
    for file in (root / "train").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"Image .*png cannot be read \(the file is empty\)"):
        train_batches(cfg, 1)


def test_each_process_needs_pairs_to_mix(root, monkeypatch):
    cfg = classifier(root, SOLVER__IMS_PER_BATCH=6, **MIXED)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match=r"SOLVER\.IMS_PER_BATCH is 6, 3 on each of 2 processes; .*MIXUP or CUTMIX"):
        build_train_loader(cfg)


def test_evaluation_takes_batches(root):
    cfg = classifier(root, TEST__IMS_PER_BATCH=3, DATASETS__TEST=("train",))
    loader = build_test_loader(cfg, "train")
    assert [[x["image_id"] for x in batch] for batch in loader] == [[1, 2, 3], [4, 5, 6], [7]] and len(loader) == 3


# --- Samplers and epochs -----------------------------------------------------------


def drawn(size: int, epochs: int, processes: int, monkeypatch: Any) -> list[list[list[int]]]:
    """Indices by process and epoch."""
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(samplers_module.comm, "get_world_size", lambda: processes)
        monkeypatch.setattr(samplers_module.comm, "get_rank", lambda rank=rank: rank)
        sampler = RepeatAugmentation(size, 3, seed=7)
        stream, length = iter(sampler), len(sampler._sampler)
        parts.append([list(itertools.islice(stream, length)) for _ in range(epochs)])
    return parts


def test_repeated_augmentation_gives_processes_other_views_of_the_same_images(monkeypatch):
    parts = drawn(300, 3, 3, monkeypatch)
    for epoch in range(3):
        first, second, third = (parts[rank][epoch] for rank in range(3))
        assert first == second == third and len(set(first)) == len(first) == 85  # 256 of 300, by three processes
    assert parts[0][0] != parts[0][1] != parts[0][2]
    (alone,) = drawn(300, 1, 1, monkeypatch)
    assert len(alone[0]) == 256 and alone[0][:6] == [alone[0][0]] * 3 + [alone[0][3]] * 3
    assert parts == drawn(300, 3, 3, monkeypatch)


def test_the_sampler_is_chosen_by_its_name(root):
    cfg = classifier(root, DATALOADER__SAMPLER_TRAIN="RepeatAugSampler", DATALOADER__REPEATS=2)
    ids = [x["image_id"] for batch in train_batches(cfg, 3) for x in batch]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD = "RepeatFactorTrainingSampler", 0.9
    labels = [x["label"] for batch in train_batches(cfg, 60) for x in batch]
    assert labels.count(1) / labels.count(0) > 2 / 3 * 1.1  # of 2 images, and of 3


def test_lengths_in_epochs_become_iterations(root):
    cfg = classifier(root, SOLVER__MAX_EPOCHS=10.0, SOLVER__STEP_EPOCHS=[6.0, 8.5], SOLVER__WARMUP_EPOCHS=0.5)
    cfg.SOLVER.CHECKPOINT_EPOCHS, cfg.TEST.EVAL_EPOCHS, cfg.SOLVER.IMS_PER_BATCH = 0.01, 2.0, 2
    line = resolve_epochs(cfg)  # 7 images in batches of 2
    solver = cfg.SOLVER
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (40, (24, 34), 2)
    assert (solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (1, 8)
    assert "An epoch is 4 iterations, 7 images in batches of 2: SOLVER.MAX_ITER 40 (10 epochs)" in line
    assert resolve_epochs(cfg) == "" and cfg.SOLVER.MAX_ITER == 40


def test_an_epoch_counts_accumulated_batches_and_repeated_images(root):
    cfg = classifier(root, SOLVER__MAX_EPOCHS=0.5, SOLVER__ACCUMULATE=3, SOLVER__IMS_PER_BATCH=1)
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatAugSampler"
    assert with_iterations(cfg).SOLVER.MAX_ITER == 2 and cfg.SOLVER.MAX_EPOCHS == 0.5  # 7 images: 3 iterations
    for i in range(300):
        picture(root / f"train/ant/many{i}.png", (2, 2))
    assert with_iterations(cfg).SOLVER.MAX_ITER == 43  # of 86, for 256 images


def test_epochs_of_a_detector_are_of_the_images_with_objects(write_config, digits):
    path = digits / "annotations/instances_train.json"
    content = json.loads(path.read_text())
    lost = {image["id"] for image in content["images"][:5]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in lost]
    (few := path.with_name("few.json")).write_text(json.dumps(content))
    register = [{"NAME": "few", "JSON": str(few), "IMAGES": str(digits / "train")}]
    cfg = read_config(str(write_config(DATASETS__REGISTER=register, DATASETS__TRAIN=["few"], SOLVER__MAX_EPOCHS=2.0)))
    register_datasets(cfg)
    assert "19 images in batches of 4" in resolve_epochs(cfg) and cfg.SOLVER.MAX_ITER == 10


def test_epochs_and_scaling_to_processes_go_together(root):
    keys = {"SOLVER__MAX_EPOCHS": 10.0, "SOLVER__STEP_EPOCHS": [5.0, 9.9], "TEST__EVAL_EPOCHS": 1.0}
    cfg = classifier(root, SOLVER__REFERENCE_WORLD_SIZE=1, SOLVER__IMS_PER_BATCH=2, **keys)
    scaled = scale_to_processes(with_iterations(cfg), 4)
    assert (scaled.SOLVER.IMS_PER_BATCH, scaled.SOLVER.MAX_ITER, scaled.SOLVER.STEPS) == (8, 10, (5,))
    assert scaled.TEST.EVAL_PERIOD == 1
    assert scale_to_processes(with_iterations(cfg), 32).TEST.EVAL_PERIOD == 1  # an eighth of it would be never
    cfg.TEST.EVAL_EPOCHS = 0.0
    assert scale_to_processes(with_iterations(cfg), 4).TEST.EVAL_PERIOD == 0


@pytest.mark.parametrize(
    "train, match",
    [
        ((), "DATASETS.TRAIN is empty"),
        (("trian",), "'trian' of DATASETS.TRAIN is not registered.*Did you mean"),
        (("coco_2017_train",), r"instances_train2017.json does not exist|evaluator type 'coco'"),
        (("imagenet_train",), "'imagenet_train': image folder .* does not exist"),
    ],
)
def test_epochs_of_what_is_not_there_are_told_in_one_line(root, train, match, monkeypatch):
    with pytest.raises(DatasetError, match=match):
        resolve_epochs(classifier(root, DATASETS__TRAIN=train, SOLVER__MAX_EPOCHS=1.0))


# --- Accuracy ----------------------------------------------------------------------


def scored(evaluator: Any, rows: list[tuple[int, list[float]]], batch: int = 2) -> Any:
    evaluator.reset()
    inputs = [{"image_id": i, "file_name": f"{i}.png", "label": label} for i, (label, _) in enumerate(rows, 1)]
    outputs = [{"scores": torch.tensor(scores)} for _, scores in rows]
    for i in range(0, len(rows), batch):
        evaluator.process(inputs[i : i + batch], outputs[i : i + batch])
    return evaluator.evaluate()


def register_classes(number: int) -> None:
    DatasetCatalog.register("scored", lambda: [])
    names = [f"c{i}" for i in range(number)]
    MetadataCatalog.get("scored").set(thing_classes=names, evaluator_type="classification")


def test_accuracy_of_known_scores(tmp_path):
    register_classes(7)
    rows = [
        (0, [7, 6, 5, 4, 3, 2, 1]),
        (0, [1, 2, 3, 4, 5, 6, 7]),
        (1, [2, 1, 3, 4, 5, 6, 0]),
        (2, [0, 0, 9, 0, 0, 0, 0]),
    ]
    rows = [(label, [s / 10 for s in scores]) for label, scores in rows]
    (result,) = scored(ClassificationEvaluator("scored", str(tmp_path)), rows).values()
    assert list(result) == ["top1", "top5", *(f"top1-c{i}" for i in range(7))]
    assert (result["top1"], result["top5"]) == (50.0, 50.0)
    assert [result[f"top1-c{i}"] for i in range(3)] == [50.0, 0.0, 100.0] and math.isnan(result["top1-c3"])
    first, *_ = written = json.loads((tmp_path / "classification_predictions.json").read_text())
    assert [w["image_id"] for w in written] == [1, 2, 3, 4] and first.keys() >= {"file_name", "label"}
    assert first["classes"] == [0, 1, 2, 3, 4] and first["scores"] == pytest.approx([0.7, 0.6, 0.5, 0.4, 0.3])
    for batch in (1, 3, 4):
        (again,) = scored(ClassificationEvaluator("scored"), rows, batch).values()
        assert again == pytest.approx(result, nan_ok=True)


def test_few_classes_have_no_top5_and_ties_go_to_the_first(tmp_path):
    register_classes(5)
    result = scored(ClassificationEvaluator("scored"), [(0, [0.2] * 5), (4, [0.2] * 5)])["classification"]
    assert "top5" not in result and (result["top1"], result["top1-c0"], result["top1-c4"]) == (50.0, 100.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_mistakes(tmp_path, caplog, bad):
    register_classes(6)
    rows = [(0, [bad] * 6), (0, [1.0, 0, 0, 0, 0, bad]), (0, [1.0, 0, 0, 0, 0, 0])]
    result = scored(ClassificationEvaluator("scored", str(tmp_path)), rows)["classification"]
    assert (result["top1"], result["top5"]) == pytest.approx((100 / 3, 100 / 3))
    assert "The scores of 2 of 3 images of scored are not finite: these count as mistakes" in caplog.text
    assert json.loads((tmp_path / "classification_predictions.json").read_text())[0]["classes"] == []


def test_nothing_to_score_gives_nothing(caplog):
    register_classes(6)
    assert scored(ClassificationEvaluator("scored"), []) == {} and "no predictions on scored" in caplog.text


def evaluate_in_part(folder: str) -> None:
    register_classes(9)
    scores = torch.rand(13, 9, generator=torch.Generator().manual_seed(0))
    rows = [(i % 9, row.tolist()) for i, row in enumerate(scores)]
    evaluator = ClassificationEvaluator("scored", folder)
    evaluator.reset()
    world, rank = comm.get_world_size(), comm.get_rank()
    for i in range(rank, 13, world):
        evaluator.process(
            [{"image_id": i, "file_name": f"{i}.png", "label": rows[i][0]}], [{"scores": torch.tensor(rows[i][1])}]
        )
    result = evaluator.evaluate()
    assert bool(result) == (rank == 0)
    if result:
        Path(folder, "result.json").write_text(json.dumps(result))


def test_accuracy_is_the_same_over_any_number_of_processes(tmp_path):
    evaluate_in_part(str(tmp_path / "one"))
    in_two_processes(evaluate_in_part, tmp_path / "two")
    for name in ("result.json", "classification_predictions.json"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


def test_metrics_of_a_classifier_may_choose_the_checkpoint(root):
    cfg = classifier(root, SOLVER__EMA__ENABLED=True)
    assert isinstance(build_evaluator(cfg, "val"), ClassificationEvaluator)
    checked(cfg)
    for metric in ("classification/top1", "classification_EMA/top1", "classification/top1-bee"):
        cfg.TEST.BEST_CHECKPOINT.METRIC = metric
        check_evaluators(cfg)
    for metric in ("classification/top5", "bbox/AP"):  # of three classes
        cfg.TEST.BEST_CHECKPOINT.METRIC = metric
        with pytest.raises(EvaluatorError, match=f"is '{metric}', which the evaluation will not give"):
            check_evaluators(cfg)


# --- Whole runs --------------------------------------------------------------------


def write(root: Path, **changes: Any) -> Path:
    keys = {"OUTPUT_DIR": str(root / "out"), "SOLVER__CHECKPOINT_PERIOD": 2, "SOLVER__STEPS": [], **changes}
    cfg = classifier(root, **{"SOLVER__WARMUP_ITERS": 1, **keys})
    (path := root / "run.yaml").write_text(cfg.dump())
    return path


def test_a_resumed_run_ends_as_one_that_was_not(root):
    path = write(root, SOLVER__MAX_ITER=4, **MIXED)
    whole = run_training(path, OUTPUT_DIR=str(root / "whole"))
    assert whole.evaluation.results["classification"]["top1"] >= 0
    run_training(path, OUTPUT_DIR=str(root / "parts"), stop_at=2)
    run_training(path, OUTPUT_DIR=str(root / "parts"), resume=True)
    one, other = (read_checkpoint(root / name)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_epochs_from_the_command_line_and_an_evaluation_without_training_data(root):
    path = write(root, SOLVER__MAX_EPOCHS=1.0, TEST__EVAL_EPOCHS=0.5, SOLVER__STEPS=[1, 90])
    log = tool("train_net", "--config-file", path).stdout
    assert "An epoch is 2 iterations, 7 images in batches of 4: SOLVER.MAX_ITER 2 (1 epochs)" in log
    assert "SOLVER.STEPS (1, 90): those not below MAX_ITER, 2, have no effect" in log
    kept = read_config(str(root / "out/config.yaml"))
    assert (kept.SOLVER.MAX_ITER, kept.SOLVER.MAX_EPOCHS, kept.TEST.EVAL_PERIOD) == (2, 0.0, 1)
    assert "Nothing to do" in tool("train_net", "--config-file", path, "--resume").stdout
    (root / "train").rename(root / "elsewhere")
    options = ["MODEL.WEIGHTS", root / "out/model_final.pth", "OUTPUT_DIR", root / "evaluated", "TEST.IMS_PER_BATCH", 2]
    tool("train_net", "--config-file", path, "--eval-only", *options)
    assert (root / "evaluated/inference/classification_predictions.json").is_file()
