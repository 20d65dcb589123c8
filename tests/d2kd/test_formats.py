"""YOLO and Pascal VOC files: what they mean is what the COCO file of the same data means; what is wrong is one line."""

import json
import logging
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from models import config, model
from photographs import CLASSES, entry, write_photographs, write_voc, write_yolo
from PIL import Image

from d2kd.data.class_list import class_names
from d2kd.data.classes import check_classes
from d2kd.data.conversion.source import plain_number
from d2kd.data.conversion.yolo import _box
from d2kd.data.datasets import DatasetError, check_datasets, register_datasets
from d2kd.data.folders import walk
from d2kd.data.loader import build_test_loader, build_train_loader
from d2kd.errors import UserError
from d2kd.evaluation.build import build_evaluator
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.utils.file_io import PathManager

pytest.importorskip("labelformat")
pytest.importorskip("defusedxml")
KINDS = ("coco", "yolo", "voc")


@pytest.fixture
def photographs(tmp_path, forget_datasets):
    """Boxes in the three formats: a training split and one to evaluate on."""
    for split, count, seed in (("train", 7, 1), ("val", 4, 2)):
        content = write_photographs(tmp_path, split, count, seed)
        write_yolo(tmp_path, split, content)
        write_voc(tmp_path, split, content)
    return tmp_path


def cfg_of(folder, kind, *, train="train", entries=None, **changes):
    """A configuration whose sets are KIND_train and KIND_val."""
    entries = entries or [entry(folder, kind, split, f"{kind}_{split}") for split in ("train", "val")]
    sizes = {"INPUT__MIN_SIZE_TRAIN": [64, 80], "INPUT__MAX_SIZE_TRAIN": 100, "INPUT__MIN_SIZE_TEST": 64}
    return config(
        **{
            "DATASETS__REGISTER": entries,
            "DATASETS__TRAIN": [f"{kind}_train"],
            "DATASETS__TEST": [f"{kind}_val"],
            "DATALOADER__NUM_WORKERS": 0,
            "SOLVER__IMS_PER_BATCH": 2,
            "SEED": 5,
            "MODEL__RETINANET__SCORE_THRESH_TEST": -1.0,
            "OUTPUT_DIR": str(folder / kind),
            **sizes,
            **changes,
        }
    )


def checked(cfg):
    register_datasets(cfg)
    check_datasets(cfg)
    check_classes(cfg)
    return cfg


def records(name, image_root):
    """Records with file names below the folder of images."""
    return [{**r, "file_name": r["file_name"].removeprefix(f"{image_root}/")} for r in DatasetCatalog.get(name)]


def records_of(folder, kind, split="train", **changes):
    name = f"{kind}_{split}"
    register_datasets(config(DATASETS__REGISTER=[entry(folder, kind, split, name, **changes)]))
    return records(name, MetadataCatalog.get(name).image_root)


@pytest.mark.parametrize("kind", ["yolo", "voc"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_records_are_those_of_the_coco_file(photographs, kind, split):
    assert records_of(photographs, kind, split) == records_of(photographs, "coco", split)
    meta, coco = (MetadataCatalog.get(f"{k}_{split}") for k in (kind, "coco"))
    assert meta.thing_classes == coco.thing_classes == CLASSES and meta.evaluator_type == "coco"


@pytest.mark.parametrize("decimals", [6, 9, 16])
def test_polygons_of_yolo_are_those_of_the_coco_file(tmp_path, forget_datasets, decimals):
    content = write_photographs(tmp_path, "train", 9, 3, polygons=True)
    write_yolo(tmp_path, "train", content, decimals)
    assert records_of(tmp_path, "yolo") == records_of(tmp_path, "coco")
    cfg = cfg_of(tmp_path, "yolo", MODEL__MASK_ON=True, DATASETS__TEST=[], INPUT__MASK_FORMAT="bitmask")
    checked(cfg)


def test_boxes_may_stand_beside_polygons(tmp_path, forget_datasets):
    write_yolo(tmp_path, "train", write_photographs(tmp_path, "train", 3, 3))
    label = tmp_path / "labels/train/train_01.txt"
    label.write_text("0 0.5 0.5 0.2 0.4\n\n1 0.1 0.1 0.3 0.1 0.2 0.5\n")
    first = records_of(tmp_path, "yolo")[0]
    assert [("segmentation" in a, a["category_id"]) for a in first["annotations"]] == [(False, 0), (True, 1)]
    with pytest.raises(DatasetError, match=r"no mask that can be used, first annotation \(id 1\) in train_01.jpg"):
        checked(cfg_of(tmp_path, "yolo", MODEL__MASK_ON=True, DATASETS__TEST=[]))


@pytest.mark.parametrize("shape", [(4, 2), (1, 2), (17, 3)])
def test_key_points_behind_boxes_are_left_out(photographs, caplog, shape):
    expected = records_of(photographs, "coco")
    edit(photographs / "data.yaml", "names:", f"kpt_shape: {list(shape)}\nnames:")
    for path in (photographs / "labels/train").iterdir():
        points = " 0.4 0.6" if shape[1] == 2 else " 0.4 0.6 2"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*(line + points * shape[0] for line in lines[:-1]), lines[-1]]))
    with caplog.at_level(logging.INFO):
        assert records_of(photographs, "yolo") == expected
    assert [r.getMessage() for r in caplog.records if "kpt_shape" in r.getMessage()] == [
        "Dataset 'yolo_train': CLASSES has a kpt_shape; boxes are read, and key points left out"
    ]


@pytest.mark.parametrize("size", [(640, 480), (6599, 4001), (37, 6600)])
def test_boxes_of_coco_come_out_exactly(size):
    random = np.random.default_rng(0)
    for decimals in (0, 1, 2):
        corners = np.sort(random.uniform(0, 1, (200, 2, 2)) * size, axis=1).round(decimals)
        for (x, y), (x1, y1) in corners.tolist():
            w, h = round(x1 - x, 2), round(y1 - y, 2)
            shares = [float(f"{v / side:.6f}") for v, side in zip((x + w / 2, y + h / 2, w, h), size * 2)]
            assert _box([tuple(shares[:2]), tuple(shares[2:])], size)["bbox"] == [x, y, w, h]


def test_shares_that_say_nothing_of_pixels_stay():
    assert plain_number(11.9998, 3e-4) == 12 and plain_number(12.3701, 2e-4) == 12.37
    assert plain_number(12.3456789, 1e-9) == 12.3456789 and plain_number(1234.567, 1.0) == 1234.567


def test_batches_are_those_of_the_coco_file(photographs):
    batches = {}
    for kind in KINDS:
        loader = iter(build_train_loader(checked(cfg_of(photographs, kind))))
        batches[kind] = [next(loader) for _ in range(6)]
    for kind in ("yolo", "voc"):
        for ours, theirs in zip(batches[kind], batches["coco"]):
            for a, b in zip(ours, theirs):
                assert a["image_id"] == b["image_id"] and torch.equal(a["image"], b["image"])
                assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
                assert torch.equal(a["instances"].gt_classes, b["instances"].gt_classes)
    assert all(len(x["instances"]) for batch in batches["coco"] for x in batch)


class Guesses(torch.nn.Module):
    """Finds the objects of the COCO file, some of them shifted, and things that are not there."""

    def __init__(self, network, truth):
        super().__init__()
        self.network, self.truth = network, truth

    def forward(self, inputs):
        outputs = self.network(inputs)
        for x, output in zip(inputs, outputs):
            found = output["instances"]
            for i, annotation in enumerate(self.truth[x["image_id"]][: len(found)]):
                left, top, w, h = annotation["bbox"]
                box = torch.tensor([left, top, left + w, top + h]) + 2 * (i % 3)
                found.pred_boxes.tensor[i], found.pred_classes[i] = box, annotation["category_id"]
                found.scores[i] = 0.5 + 0.1 * i
        return outputs


def test_ap_is_that_of_the_coco_file(photographs):
    network, results = model(cfg_of(photographs, "coco"), seed=3).eval(), {}
    for kind in KINDS:
        cfg = checked(cfg_of(photographs, kind))
        truth = {r["image_id"]: r["annotations"] for r in DatasetCatalog.get("coco_val")}
        loader = build_test_loader(cfg, f"{kind}_val")
        evaluator = build_evaluator(cfg, f"{kind}_val")
        results[kind] = inference_on_dataset(Guesses(network, truth), loader, evaluator)["bbox"]
    for kind in ("yolo", "voc"):
        np.testing.assert_equal(results[kind], results["coco"])  # of large objects, which there are not, nan
    assert 20 < results["coco"]["AP"] < 95


def test_difficult_objects_are_crowds_unless_they_are_used(tmp_path, forget_datasets):
    content = write_photographs(tmp_path, "train", 4, 1)
    content["annotations"][1]["iscrowd"] = 1
    (tmp_path / "train.json").write_text(json.dumps(content))
    write_voc(tmp_path, "train", content)
    found = records_of(tmp_path, "voc")
    assert found == records_of(tmp_path, "coco")
    name = "voc_used"
    register_datasets(config(DATASETS__REGISTER=[entry(tmp_path, "voc", "train", name, DIFFICULT="use")]))
    assert not any(a["iscrowd"] for r in DatasetCatalog.get(name) for a in r["annotations"])


def test_pixels_may_be_counted_from_0(tmp_path, forget_datasets):
    write_voc(tmp_path, "train", write_photographs(tmp_path, "train", 3, 1))
    boxes = {}
    for first in (0, 1):
        name = f"from_{first}"
        register_datasets(config(DATASETS__REGISTER=[entry(tmp_path, "voc", "train", name, FIRST_PIXEL=first)]))
        boxes[first] = np.array([a["bbox"] for r in DatasetCatalog.get(name) for a in r["annotations"]])
    assert np.allclose(boxes[0] - boxes[1], [1, 1, -1, -1])


def test_yolo_takes_the_size_of_an_image_as_it_is_shown(photographs):
    path = photographs / "train/train_01.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        image.save(path, exif=exif)
    (photographs / "labels/train/train_01.txt").write_text("0 0.5 0.5 1.0 1.0\n")
    first = records_of(photographs, "yolo")[0]
    assert (first["width"], first["height"]) == (111, 75) and first["annotations"][0]["bbox"] == [0, 0, 111, 75]
    checked(cfg_of(photographs, "yolo"))


def test_links_are_followed_but_not_into_circles(photographs):
    expected = len(records_of(photographs, "yolo", "val"))
    for kind in ("", "labels/"):
        folder = photographs / f"{kind}train"
        (folder / "more").symlink_to(photographs / f"{kind}val")  # its images count
        for name in ("round", "round_again"):
            (folder / name).symlink_to(folder)
            (photographs / f"{kind}val" / name).symlink_to(folder)
        (folder / "above").symlink_to(photographs)
        (folder / "itself").symlink_to(folder / "itself")
    found = [name for _, names in walk(str(photographs / "train")) for name in names]
    assert found.count("train_01.jpg") == 1
    assert len(records_of(photographs, "yolo")) == 7 + expected


def test_voc_without_sizes_takes_those_of_the_images(photographs):
    expected = records_of(photographs, "coco")
    for path in (photographs / "voc/Annotations").iterdir():
        path.write_text(re.sub("<width>.*</height>", "<width>0</width>", path.read_text()))
    assert records_of(photographs, "voc") == expected


def test_classes_of_voc_are_those_of_all_splits(photographs):
    annotation = photographs / "voc/Annotations/val_01.xml"
    annotation.write_text(annotation.read_text().replace("<object><name>", "<object><name>a", 1))
    records_of(photographs, "voc")
    assert len(MetadataCatalog.get("voc_train").thing_classes) == len(CLASSES) + 1


def test_a_changed_file_is_read_again_by_the_next_check(photographs):
    cfg = checked(cfg_of(photographs, "yolo"))
    before = DatasetCatalog.get("yolo_train")
    (photographs / "labels/train/train_01.txt").write_text("2 0.5 0.5 0.25 0.25\n")
    check_datasets(cfg)
    assert len(DatasetCatalog.get("yolo_train")[0]["annotations"]) == 1 < len(before[0]["annotations"])


def test_an_unknown_conversion_is_no_file():
    assert not PathManager.exists("yolo://nobody") and not PathManager.isdir("voc://nobody")
    with pytest.raises(FileNotFoundError, match="No dataset is registered as yolo://nobody"):
        PathManager.get_local_path("yolo://nobody")


def edit(path, old=None, new="", *, text=None):
    """Changes a file, or writes it anew."""
    content = path.read_text() if text is None else text
    assert old is None or old in content
    path.write_text(content if old is None else content.replace(old, new, 1))


LABELS, XML = "labels/train/train_01.txt", "voc/Annotations/train_01.xml"
#: By a name: the format, what is done to the files, further keys of the entry, and what the message says.
WRONG = {
    "unknown format": ("coco", lambda f: None, {"FORMAT": "yollo"}, r"FORMAT is 'yollo'; it must be .* mean yolo\?"),
    "unknown key": ("yolo", lambda f: None, {"NAMES": ["a"]}, r"unknown key 'NAMES'; it takes NAME, IMAGES, LABELS"),
    "no classes": ("yolo", lambda f: None, {"CLASSES": None}, r"CLASSES is None; it must list the names"),
    "classes of a YAML without names": (
        "yolo",
        lambda f: edit(f / "data.yaml", text="nc: 3\n"),
        {},
        r"data.yaml', which has no list of `names`",
    ),
    "classes that do not count": (
        "yolo",
        lambda f: edit(f / "data.yaml", text="names: {1: a, 2: b}\n"),
        {},
        r"names have the numbers \[1, 2\]; they count from 0",
    ),
    "class outside the list": (
        "yolo",
        lambda f: edit(f / LABELS, text="3 0.5 0.5 0.1 0.1\n"),
        {},
        r"train_01.txt has an object of class 3, and CLASSES lists 3, from 0 on: cup, leaf, stone",
    ),
    "too few values": (
        "yolo",
        lambda f: edit(f / LABELS, text="0 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1\n"),
        {},
        r"train_01.txt, line 2, has 4 values \(1 0.5 0.5 0.1\)",
    ),
    "half a point": (
        "yolo",
        lambda f: edit(f / LABELS, text="0 .1 .1 .3 .1 .2 .5 .4\n"),
        {},
        r"line 1, has 8 values",
    ),
    "other key points than CLASSES says": (
        "yolo",
        lambda f: (
            edit(f / "data.yaml", "names:", "kpt_shape: [2, 2]\nnames:")
            or edit(f / LABELS, text="0 .5 .5 .1 .1 .2 .5 .4 .6 .2 .2\n")
        ),
        {},
        r"line 1, has 11 values .* By the kpt_shape \[2, 2\] of CLASSES it must have 5, or 9 with key points",
    ),
    "no shape of key points": (
        "yolo",
        lambda f: edit(f / "data.yaml", "names:", "kpt_shape: [2, 4]\nnames:"),
        {},
        r"CLASSES is '\S+data.yaml', whose kpt_shape is \[2, 4\]; it must be the number of key points",
    ),
    "no number": (
        "yolo",
        lambda f: edit(f / LABELS, text="cup .5 .5 .1 .1\n"),
        {},
        r"train_01.txt cannot be read \(inv",
    ),
    "NaN": ("yolo", lambda f: edit(f / LABELS, text="0 nan .5 .1 .1\n"), {}, r"train_01.txt has the number nan"),
    "pixels": ("yolo", lambda f: edit(f / LABELS, text="0 40 30 12 9\n"), {}, r"number 40\. .*This looks like pixels"),
    "negative width": ("yolo", lambda f: edit(f / LABELS, text="0 .5 .5 -.1 .1\n"), {}, r"has the number -0.1"),
    "no text": (
        "yolo",
        lambda f: (f / LABELS).write_bytes(b"\xff\xfe0"),
        {},
        r"train_01.txt is no UTF-8 text, first in line 1: save it in that encoding",
    ),
    "an image that tells no size": (
        "yolo",
        lambda f: (f / "train/train_02.jpg").write_bytes(b"no image"),
        {},
        r"train_02.jpg cannot be read .*Boxes of YOLO are shares of the image's size",
    ),
    "no images": (
        "yolo",
        lambda f: [p.unlink() for p in (f / "train").iterdir()],
        {},
        r"Dataset 'yolo_train': \S+train holds no images",
    ),
    "no labels": (
        "yolo",
        lambda f: [p.unlink() for p in (f / "labels/train").iterdir()],
        {},
        r"\S+labels/train holds no label files",
    ),
    "labels of other images": (
        "yolo",
        lambda f: [p.rename(p.with_name(f"x{p.name}")) for p in (f / "labels/train").iterdir()],
        {},
        r"no image of \S+train has a label file of its name in .*train_01, the first label file xtrain_01.txt",
    ),
    "no such folder": ("yolo", lambda f: None, {"LABELS": "/nowhere"}, r"LABELS of dataset 'yolo_train' .* not exist"),
    "only empty labels": (
        "yolo",
        lambda f: [p.write_text("\n") for p in (f / "labels/train").iterdir()],
        {},
        r"cannot be trained on: there are no annotations in yolo_train",
    ),
    "no split": ("voc", lambda f: None, {"SPLIT": None}, r"SPLIT is None; it must name a list in ImageSets/Main"),
    "unknown split": (
        "voc",
        lambda f: None,
        {"SPLIT": "trian"},
        r"no list \S+trian.txt .*mean train\? There are train, v",
    ),
    "empty split": (
        "voc",
        lambda f: edit(f / "voc/ImageSets/Main/train.txt", text="\n"),
        {},
        r"Main/train.txt lists no images",
    ),
    "split in another encoding": (
        "voc",
        lambda f: (f / "voc/ImageSets/Main/train.txt").write_bytes(b"train_01\ncaf\xe9\n"),
        {},
        r"Main/train.txt is no UTF-8 text, first in line 2: save it in that encoding",
    ),
    "XML of an unknown encoding": (
        "voc",
        lambda f: edit(f / XML, text='<?xml version="1.0" encoding="ansi"?><annotation/>'),
        {},
        r"train_01.xml cannot be read as XML \(unknown encoding: ansi\)",
    ),
    "split of one class": (
        "voc",
        lambda f: edit(f / "voc/ImageSets/Main/train.txt", text="train_01 -1\ntrain_02  1\n"),
        {},
        r"It is the list of one class",
    ),
    "image twice": (
        "voc",
        lambda f: edit(f / "voc/ImageSets/Main/train.txt", text="train_01\ntrain_01\n"),
        {},
        r"lists train_01 more than once",
    ),
    "no annotation": ("voc", lambda f: (f / XML).unlink(), {}, r"lists train_01, and there is no \S+train_01.xml"),
    "other image": (
        "voc",
        lambda f: edit(f / XML, "train_01.jpg", "C:\\photos\\train_07.jpg"),
        {},
        r"train_01.xml names the image train_07.jpg",
    ),
    "missing image": (
        "voc",
        lambda f: (f / "voc/JPEGImages/train_01.jpg").unlink(),
        {},
        r"1 of the 7 images that voc://voc_train lists are not in \S+JPEGImages, first train_01.jpg",
    ),
    "other size": ("voc", lambda f: edit(f / XML, "<width>75<", "<width>76<"), {}, r"is 75 x 111 .*say 76 x 111"),
    "no XML": ("voc", lambda f: edit(f / XML, text="<annotation>"), {}, r"train_01.xml cannot be read as XML"),
    "an attack": (
        "voc",
        lambda f: edit(f / XML, text='<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>'),
        {},
        r"train_01.xml cannot be read as XML \(EntitiesForbidden",
    ),
    "another XML": ("voc", lambda f: edit(f / XML, text="<a><b>1</b></a>"), {}, r"holds no <annotation> .*but a <a>"),
    "unlisted class": (
        "voc",
        lambda f: None,
        {"CLASSES": ["cup", "leafs", "stones"]},
        r"of class '(leaf|stone)', and CLASSES lists cup, leafs, stones\. Did you mean",
    ),
    "no name": ("voc", lambda f: edit(f / XML, "<name>", "<nam>"), {}, r"train_01.xml cannot be read as XML"),
    "object without a name": (
        "voc",
        lambda f: edit(f / XML, text="<annotation><object><pose>x</pose></object></annotation>"),
        {},
        r"train_01.xml has an object without one <name>",
    ),
    "no box": (
        "voc",
        lambda f: edit(f / XML, text="<annotation><object><name>cup</name></object></annotation>"),
        {},
        r"has an object cup whose <bndbox> is None; it must have the numbers xmin",
    ),
    "half a box": (
        "voc",
        lambda f: edit(
            f / XML, text="<annotation><object><name>cup</name><bndbox><xmin>1</xmin></bndbox></object></annotation>"
        ),
        {},
        r"whose <bndbox> is \{'xmin': '1'\}",
    ),
    "first pixel 0": (
        "voc",
        lambda f: edit(f / XML, text=voc_box(0, 4, 20, 20)),
        {},
        r"with the corner \(0, 4\), and Pascal VOC counts pixels from 1.* set FIRST_PIXEL to 0",
    ),
    "reversed box": (
        "voc",
        lambda f: edit(f / XML, text=voc_box(30, 4, 20, 20)),
        {},
        r"cup that ends before it begins",
    ),
    "wrong flag": (
        "voc",
        lambda f: edit(f / XML, "<difficult>0<", "<difficult>maybe<"),
        {},
        r"difficult = 'maybe'; it must be 0 or 1",
    ),
    "wrong first pixel": ("voc", lambda f: None, {"FIRST_PIXEL": 2}, r"FIRST_PIXEL is 2; it must be one of 0, 1"),
    "wrong word": ("voc", lambda f: None, {"DIFFICULT": "ignored"}, r"DIFFICULT is 'ignored'; .*Did you mean ignore\?"),
    "no folder of images": (
        "voc",
        lambda f: (f / "voc/JPEGImages").rename(f / "voc/Images"),
        {},
        r"\S+voc has no folder JPEGImages, as Pascal VOC has",
    ),
}


def voc_box(x0, y0, x1, y1):
    sides = f"<xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
    return f"<annotation><object><name>cup</name><bndbox>{sides}</bndbox></object></annotation>"


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(photographs, case):
    kind, spoil, changes, message = WRONG[case]
    spoil(photographs)
    cfg = cfg_of(photographs, kind, entries=[entry(photographs, kind, "train", f"{kind}_train", **changes)])
    cfg.DATASETS.TEST = ()
    with pytest.raises(UserError, match=message) as error:
        checked(cfg)
    assert "\n" not in str(error.value) and "is not JSON" not in str(error.value)


def test_label_files_without_an_image_are_told(photographs, caplog):
    (photographs / "labels/train/train_1.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (photographs / "labels/train/classes.txt").write_text("cup\nleaf\nstone\n")  # as some tools do; told of no more
    with caplog.at_level(logging.WARNING):
        checked(cfg_of(photographs, "yolo"))
    told = [r.getMessage() for r in caplog.records if "label files" in r.getMessage()]
    assert told and "1 of 7 label files have no image of their name, first train_1.txt. Did you mean" in told[0]


def test_classes_without_objects_are_told(photographs, caplog):
    names = [*CLASSES, "rope"]
    entries = [entry(photographs, "yolo", s, f"yolo_{s}", CLASSES=names) for s in ("train", "val")]
    with caplog.at_level(logging.WARNING):
        checked(cfg_of(photographs, "yolo", entries=entries, MODEL__RETINANET__NUM_CLASSES=4))
    told = [r.getMessage() for r in caplog.records if "have no objects" in r.getMessage()]
    assert "1 of 4 classes have no objects: rope" in told[0] and "learned" in told[0] and "AP is nan" in told[-1]


@pytest.mark.parametrize("kind, module", [("yolo", "labelformat"), ("voc", "defusedxml")])
def test_a_reader_that_is_not_installed_is_named(photographs, monkeypatch, kind, module):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DatasetError, match=rf"is read by {module}, which is not installed: pip install 'd2kd\[formats"):
        checked(cfg_of(photographs, kind))


def test_class_names_may_be_in_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("cup\n\nleaf\n")
    (tmp_path / "data.yaml").write_text("names: [cup, leaf]\n")
    for file in ("names.txt", "data.yaml"):
        assert class_names("CLASSES", str(tmp_path / file)) == ["cup", "leaf"]
    (tmp_path / "data.yaml").write_text("names: [cup\n")
    with pytest.raises(DatasetError, match="which is no YAML"):
        class_names("CLASSES", str(tmp_path / "data.yaml"))


@pytest.mark.parametrize(
    "file, content", [("names.txt", "caf\u00e9\nleaf\n"), ("data.yaml", "names: [caf\u00e9, leaf]\n")]
)
def test_class_names_are_utf8_with_or_without_a_mark(file, content, tmp_path):
    path = tmp_path / file
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(content, encoding=encoding)
        assert class_names("CLASSES", str(path)) == ["caf\u00e9", "leaf"]
    for encoding in ("latin-1", "utf-16"):
        path.write_text(content, encoding=encoding)
        with pytest.raises(DatasetError, match=rf"CLASSES: \S+{file} is no UTF-8 text, first in line 1: save it in"):
            class_names("CLASSES", str(path))


def test_digits_are_names_of_classes():
    assert class_names("CLASSES", [0, "1", 2]) == ["0", "1", "2"]


@pytest.mark.parametrize("value", [None, False, 0.5, ["a"]])
def test_a_class_name_that_is_no_text_is_an_error(value, tmp_path):
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"names": {0: "cup", 1: value}}))
    for given in (["cup", value], str(tmp_path / "data.yaml")):
        with pytest.raises(
            DatasetError, match=rf"^CLASSES: the name of class 1 is {re.escape(repr(value))}, which is no"
        ):
            class_names("CLASSES", given)
