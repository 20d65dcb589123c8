"""Folders of images and label maps: what pairs, what is told, how images are varied, and how results are drawn."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from models import config
from pycocotools import mask as mask_util
from segmentors import PSP

from d2kd.data.classes import check_classes
from d2kd.data.datasets import DatasetError, check_datasets, register_datasets
from d2kd.data.folders import near_name
from d2kd.data.mapper import build_mapper
from d2kd.data.segmentation import PhotometricDistortion, build_augmentations
from d2kd.data.segmentation.resized_crop import ResizedCropTransform
from d2kd.errors import ConfigError
from d2kd.evaluation.build import build_evaluator
from d2kd.visualization import NO_LABEL, label_map_grid, read_label_predictions
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T

CLASSES = ["road", "car", "sky"]


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), array)


@pytest.fixture
def folders(tmp_path, forget_datasets):
    """Three images, one of them in a folder, and their label maps."""
    random = np.random.default_rng(0)
    for name in ("a", "b", "town/c"):
        write(tmp_path / f"images/{name}.jpg", random.integers(0, 256, (40, 60, 3), np.uint8))
        labels = random.integers(0, 3, (40, 60)).astype(np.uint8)
        labels[0] = 255
        write(tmp_path / f"labels/{name}.png", labels)
    return tmp_path


def cfg_of(folder, entry=None, **changes):
    images, labels = str(folder / "images"), str(folder / "labels")
    entry = {"NAME": "mine", "FORMAT": "labelmaps", "IMAGES": images, "LABELS": labels, "CLASSES": CLASSES} | (
        entry or {}
    )
    keys = {"DATASETS__REGISTER": [{k: v for k, v in entry.items() if v is not None}], **changes}
    return config(
        {**PSP, "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3, "DATASETS.TRAIN": ["mine"], "DATASETS.TEST": ["mine"]}, **keys
    )


def checked(folder, entry=None, **changes):
    cfg = cfg_of(folder, entry, **changes)
    register_datasets(cfg)
    check_datasets(cfg)
    return cfg


def test_images_and_label_maps_pair_by_their_paths(folders):
    checked(folders)
    records = DatasetCatalog.get("mine")
    assert [r["image_id"] for r in records] == ["a", "b", "town/c"]
    for record in records:
        assert record["file_name"].removesuffix("jpg") == record["sem_seg_file_name"].replace(
            "/labels/", "/images/"
        ).removesuffix("png")
    meta = MetadataCatalog.get("mine")
    assert (meta.stuff_classes, meta.ignore_label, meta.evaluator_type) == (CLASSES, 255, "sem_seg")


def test_a_suffix_classes_in_a_file_and_another_ignored_label(folders):
    for path in list((folders / "labels").rglob("*.png")):
        path.rename(path.with_name(f"{path.stem}_gt.png"))
    (folders / "names.txt").write_text("road\ncar\n\nsky\n")
    entry = {"LABEL_SUFFIX": "_gt", "CLASSES": str(folders / "names.txt"), "IGNORE": 7}
    checked(folders, entry)
    assert len(DatasetCatalog.get("mine")) == 3
    assert (MetadataCatalog.get("mine").stuff_classes, MetadataCatalog.get("mine").ignore_label) == (CLASSES, 7)
    register_datasets(cfg_of(folders, entry))  # the same again
    with pytest.raises(DatasetError, match="exists already"):
        register_datasets(cfg_of(folders, {**entry, "IGNORE": 8}))


def resized(folder):
    write(folder / "labels/b.png", np.zeros((40, 61), np.uint8))


def colored(folder):
    write(folder / "labels/b.png", np.zeros((40, 60, 3), np.uint8))


def cut(folder):
    path = folder / "labels/b.png"
    path.write_bytes(path.read_bytes()[:200])


def without_label_map(folder):
    (folder / "labels/b.png").unlink()


def without_image(folder):
    (folder / "images/b.jpg").unlink()


def named_otherwise(folder):
    for path in list((folder / "labels").rglob("*.png")):
        path.rename(path.with_name(f"{path.stem}_labels.png"))


def twice(folder):
    write(folder / "images/b.png", np.zeros((40, 60, 3), np.uint8))


def empty(folder):
    for path in list((folder / "images").rglob("*.jpg")):
        path.unlink()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (resized, r"Label map .*b.png is 61 x 40 \(width x height\), but its image is 60 x 40"),
        (colored, r"Label map .*b.png has colors or floats \(mode RGB\)"),
        (cut, r"Label map .*b.png cannot be read"),
        (without_label_map, r"1 images have no label map of the same name in .*labels, first .*b.jpg"),
        (without_image, r"1 label maps have no image of the same name in .*images, first .*b.png"),
        (named_otherwise, r"3 images have no label map .*There is a_labels: set LABEL_SUFFIX to '_labels'"),
        (twice, r"b.jpg and b.png in .*images have one name"),
        (empty, r"images holds no images \(\.jpg"),
    ],
)
def test_what_does_not_pair_or_fit_is_one_line(folders, spoil, message):
    spoil(folders)
    with pytest.raises(DatasetError, match=message) as error:
        checked(folders)
    assert "Dataset 'mine'" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "image, label_maps, hint",
    [
        ("000001", ["000071", "000080"], ""),
        ("scene_1", ["scen_1", "scene_2"], " Did you mean scen_1?"),
        ("scene_1", ["scene_01", "scene_2"], " Did you mean scene_01?"),
        ("scene", ["scen", "scene_2"], " Did you mean scen?"),
    ],
)
def test_numbers_near_are_no_typing_errors(image, label_maps, hint):
    assert near_name(image, label_maps) == hint


def test_a_missing_number_is_not_told_with_its_neighbors(folders):
    for kind, name in (("images", "b.jpg"), ("labels", "b.png")):
        path = folders / kind / name
        for number in ("000001", "000002"):
            shutil.copy(path, path.with_name(f"{number}{path.suffix}"))
    (folders / "labels/000001.png").unlink()
    with pytest.raises(DatasetError, match=r"first 000001.jpg. Add or remove them."):
        checked(folders)


def test_training_may_leave_out_what_cannot_be_used(folders, caplog):
    without_label_map(folders)
    checked(folders, DATASETS__ON_BAD_IMAGE="skip", DATASETS__TEST=[])
    assert "1 images have no label map" in caplog.text and "left out" in caplog.text
    assert [r["image_id"] for r in DatasetCatalog.get("mine")] == ["a", "town/c"]


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"CLASSES": None}, r"REGISTER\[0\].CLASSES is None; it must list the names"),
        ({"CLASSES": []}, r"CLASSES is \[\]; it must list the names"),
        ({"CLASSES": ["road", "road"]}, r"CLASSES has road more than once"),
        ({"CLASSES": "nowhere.txt"}, r"CLASSES is 'nowhere.txt', and there is no such file"),
        ({"IGNORE": "x"}, r"IGNORE is 'x'; it must be a label"),
        ({"LABEL_SUFFIX": 3}, r"LABEL_SUFFIX is 3; it must be the end of the names"),
        ({"LABLES": "x"}, r"unknown key 'LABLES'; it takes NAME, IMAGES, LABELS, CLASSES, IGNORE, LABEL_SUFFIX"),
        ({"LABELS": "nowhere"}, r"LABELS of dataset 'mine' \(DATASETS.REGISTER\) does not exist"),
    ],
)
def test_a_wrong_entry_is_one_line(folders, entry, message):
    with pytest.raises(DatasetError, match=message):
        checked(folders, entry)


def test_labels_beyond_the_classes_are_told_with_their_file(folders):
    write(folders / "labels/b.png", np.full((40, 60), 3, np.uint8))
    cfg = checked(folders)
    record = DatasetCatalog.get("mine")[1]
    with pytest.raises(Exception, match=r"b.png has the label 3, and there are 3 classes, from 0 on; 255 is ignored"):
        build_mapper(cfg, is_train=True)(record)


# ---- augmentation ----

CROPS = {"INPUT__CROP__ENABLED": True, "INPUT__CROP__TYPE": "absolute", "INPUT__CROP__SIZE": [32, 48]}


def test_crops_are_cut_out_of_the_resized_image(folders):
    cfg = checked(folders, **CROPS, INPUT__MIN_SIZE_TRAIN=[80], INPUT__MAX_SIZE_TRAIN=500)
    mapper = build_mapper(cfg, is_train=True)
    for record in DatasetCatalog.get("mine"):
        data = mapper(record)
        assert data["image"].shape == (3, 32, 48) and data["sem_seg"].shape == (32, 48)
        # enlarged twofold, and labels are not mixed
        assert set(data["sem_seg"].unique().tolist()) <= {0, 1, 2, 255}
        assert (data["height"], data["width"]) == (40, 60)
    names = [type(a).__name__ for a in build_augmentations(cfg, True)]
    assert names == ["ResizedCrop", "RandomFlip"]
    assert [type(a).__name__ for a in build_augmentations(cfg, False)] == ["ResizeShortestEdge"]


@pytest.mark.parametrize("size", [(80, 131), (23, 31), (40, 60)])
def test_a_resized_crop_is_a_crop_of_the_resized_image(size):
    random = np.random.default_rng(1)
    image, labels = random.integers(0, 256, (40, 60, 3), np.uint8), random.integers(0, 5, (40, 60)).astype(np.uint8)
    whole = T.ResizeTransform(40, 60, *size)
    corner, crop = (7, 5), (12, 20)
    part = ResizedCropTransform(40, 60, size, corner, crop)
    cut = np.s_[7:19, 5:25]
    difference = part.apply_image(image).astype(int) - whole.apply_image(image)[cut]
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01  # by the rounding of the box
    assert np.array_equal(part.apply_segmentation(labels), whole.apply_segmentation(labels)[cut])
    assert np.allclose(part.apply_image(image.astype(np.float32)), whole.apply_image(image.astype(np.float32))[cut])
    gray = part.apply_image(image[..., :1])
    assert gray.shape == (12, 20, 1) and np.array_equal(gray[..., 0], part.apply_image(image[..., 0]))
    points = np.array([[12.0, 8.0], [59.5, 39.5]])
    assert np.allclose(part.apply_coords(points), whole.apply_coords(points) - (5, 7))


def test_a_crop_larger_than_the_image_takes_all_of_it(folders):
    cfg = checked(folders, **{**CROPS, "INPUT__CROP__SIZE": [512, 512]}, INPUT__MIN_SIZE_TRAIN=[40])
    data = build_mapper(cfg, is_train=True)(DatasetCatalog.get("mine")[0])
    assert data["image"].shape == (3, 40, 60)


def test_one_class_does_not_fill_a_crop(folders):
    labels = np.zeros((40, 60), np.uint8)
    labels[:, :10] = 1
    write(folders / "labels/a.png", labels)
    keys = {**CROPS, "INPUT__CROP__SIZE": [40, 20], "INPUT__MIN_SIZE_TRAIN": [40]}
    cfg = checked(folders, **keys, INPUT__CROP__SINGLE_CATEGORY_MAX_AREA=0.75)
    mapper, record = build_mapper(cfg, is_train=True), DatasetCatalog.get("mine")[0]
    np.random.seed(0)
    both = sum(len(mapper(record)["sem_seg"].unique()) == 2 for _ in range(20))
    np.random.seed(0)
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    either = sum(len(build_mapper(cfg, is_train=True)(record)["sem_seg"].unique()) == 2 for _ in range(20))
    assert both > either


def test_colors_are_distorted_and_nothing_else():
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    seen = set()
    for seed in range(40):
        np.random.seed(seed)
        changed = PhotometricDistortion("BGR").get_transform(image).apply_image(image)
        assert changed.dtype == np.uint8 and changed.shape == image.shape
        seen.add(changed.tobytes())
    assert len(seen) > 30 and image.tobytes() in seen  # once in sixteen nothing happens
    none = PhotometricDistortion("RGB", 0.0, (1.0, 1.0), (1.0, 1.0), 0.0).get_transform(image)
    assert np.array_equal(none.apply_image(image), image)


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_each_distortion_is_what_it_says(order):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    flip = image if order == "BGR" else np.ascontiguousarray(image[..., ::-1])
    distort = PhotometricDistortion(order)
    table = np.arange(256, dtype=np.float64)
    plain = table.astype(np.uint8)
    brighter = (table + 20).clip(0, 255).astype(np.uint8)
    assert np.array_equal(distort._distort(flip, brighter, 1.0, 0, plain), np.minimum(flip.astype(int) + 20, 255))
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
    turned = hsv.copy()
    turned[..., 0] = (hsv[..., 0].astype(int) + 12) % 180
    turned[..., 1] = (hsv[..., 1] * 0.5).astype(np.uint8)
    expected = cv2.cvtColor(turned, cv2.COLOR_HSV2BGR)
    found = distort._distort(flip, plain, 0.5, 12, plain)
    assert np.array_equal(found if order == "BGR" else found[..., ::-1], expected)


def test_colors_need_an_image_that_has_them(folders):
    cfg = cfg_of(folders, INPUT__COLOR_AUG_SSD=True, INPUT__FORMAT="L")
    with pytest.raises(ConfigError, match="COLOR_AUG_SSD distorts colors, and INPUT.FORMAT is L"):
        build_augmentations(cfg, True)
    cfg.INPUT.FORMAT = "RGB"
    assert isinstance(build_augmentations(cfg, True)[-1], PhotometricDistortion)
    with pytest.raises(ValueError, match="image_format is L"):
        PhotometricDistortion("L")


# ---- results ----


def test_predictions_are_read_and_drawn(folders, tmp_path):
    cfg = checked(folders)
    evaluator = build_evaluator(cfg, "mine", str(tmp_path / "out"))
    evaluator.reset()
    records = DatasetCatalog.get("mine")
    wrong = cv2.imread(records[0]["sem_seg_file_name"], cv2.IMREAD_UNCHANGED).astype(int)
    wrong[wrong == 255] = 0
    wrong[10:20, 10:20] = (wrong[10:20, 10:20] + 1) % 3
    scores = torch.nn.functional.one_hot(torch.from_numpy(wrong), 3).permute(2, 0, 1).float()
    evaluator.process([records[0]], [{"sem_seg": scores}])
    results = evaluator.evaluate()["sem_seg"]
    assert results["pACC"] == pytest.approx(100 * (1 - 100 / (39 * 60)))
    path = tmp_path / "out/sem_seg_predictions.json"
    assert all(set(entry) == {"file_name", "category_id", "segmentation"} for entry in json.loads(path.read_text()))
    metadata = MetadataCatalog.get("mine")
    maps = read_label_predictions(str(path), metadata)
    assert np.array_equal(maps[records[0]["file_name"]], wrong)
    truth = np.where(wrong >= 0, wrong, NO_LABEL)
    truth[0] = NO_LABEL
    truth[10:20, 10:20] = (truth[10:20, 10:20] + 2) % 3
    grid = label_map_grid(records[:1], [truth], CLASSES, {"student: 1.0 mIoU": maps, "other": {}})
    red = (grid == (60, 60, 235)).all(-1).sum()
    scale = 384 / 60
    assert red == pytest.approx(100 * scale**2, rel=0.1)
    assert grid.shape[1] == 3 * (384 + 6)


def test_category_ids_become_labels(tmp_path):
    mask = np.zeros((4, 5), np.uint8)
    mask[:2] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    entry = {"file_name": "x", "category_id": 92, "segmentation": {**rle, "counts": rle["counts"].decode()}}
    (tmp_path / "p.json").write_text(json.dumps([entry]))
    maps = read_label_predictions(str(tmp_path / "p.json"), {"stuff_dataset_id_to_contiguous_id": {92: 4}})
    assert maps["x"].tolist() == [[4] * 5] * 2 + [[NO_LABEL] * 5] * 2


@pytest.mark.parametrize("ignored, ours, fits", [(0, 255, False), (255, 2, False), (254, 255, True), (255, 255, True)])
def test_data_and_model_ignore_the_same_label(folders, ignored, ours, fits):
    cfg = cfg_of(folders, {"IGNORE": ignored}, MODEL__SEM_SEG_HEAD__IGNORE_VALUE=ours)
    register_datasets(cfg)
    if fits:
        check_classes(cfg)
        return
    with pytest.raises(DatasetError, match=rf"'mine' ignores the label {ignored} .*IGNORE_VALUE is {ours}; of both"):
        check_classes(cfg)
