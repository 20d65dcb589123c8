"""`d2kd data`: what it counts, what it finds suspicious, and the sheets that it draws."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
import yaml
from models import config
from photographs import CLASSES, SIZES, entry, write_photographs, write_voc, write_yolo
from PIL import Image
from test_cli import program

from d2kd import cli
from d2kd.data.datasets import register_datasets
from d2kd.data.inspection import inspect_datasets
from d2kd.data.inspection.copies import equal_files
from d2kd.data.inspection.objects import TINY
from d2kd.data.inspection.report import Report, describe_sizes
from d2kd.visualization import input_sheet
from d2kd.visualization.detections import GAP, HEADER, TILE
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

DETECTOR = {
    "MODEL": {"META_ARCHITECTURE": "RetinaNet", "RETINANET": {"NUM_CLASSES": 3}, "DEVICE": "cpu"},
    "INPUT": {"MIN_SIZE_TRAIN": [64], "MIN_SIZE_TEST": 64},
    "SOLVER": {"IMS_PER_BATCH": 2},
    "SEED": 1,
}


@pytest.fixture
def photographs(tmp_path, forget_datasets, monkeypatch):
    monkeypatch.setattr("sys.argv", ["d2kd"])
    for split, count, seed in (("train", 6, 1), ("val", 3, 2)):
        content = write_photographs(tmp_path, split, count, seed, polygons=True)
        write_yolo(tmp_path, split, content)
        write_voc(tmp_path, split, content)
    return tmp_path


def write_yaml(folder, kind="coco", **sections):
    entries = [entry(folder, kind, s, f"my_{s}") for s in ("train", "val")]
    datasets = {"REGISTER": entries, "TRAIN": ["my_train"], "TEST": ["my_val"]}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**DETECTOR, "DATASETS": datasets, **sections}))
    return path


def data(*arguments):
    """Runs the command; returns its exit status."""
    try:
        return cli.main(["data", *map(str, arguments)])
    except SystemExit as end:
        return end.code


def inspected(folder, change=lambda content: None, **keys):
    """Reports and shared images of the COCO sets, after a change of the training set's content."""
    path = folder / "train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    entries = [entry(folder, "coco", s, f"my_{s}") for s in ("train", "val")]
    sets = {"DATASETS__REGISTER": entries, "DATASETS__TRAIN": ["my_train"], "DATASETS__TEST": ["my_val"]}
    cfg = config(**{**sets, "INPUT__MIN_SIZE_TEST": 64, "INPUT__MAX_SIZE_TEST": 200, **keys})
    register_datasets(cfg)
    return inspect_datasets(cfg)


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc"])
def test_counts_and_sizes_of_every_format(photographs, capsys, kind):
    assert data("check", "--config-file", write_yaml(photographs, kind)) == 0
    printed = capsys.readouterr().out
    assert "my_train (DATASETS.TRAIN): 6 images, 15 objects of 3 classes\n" in printed
    assert "my_val (DATASETS.TEST): 3 images, 6 objects of 3 classes\n" in printed
    content = json.loads((photographs / "train.json").read_text())
    for number, name in enumerate(CLASSES, 1):
        mine = [a for a in content["annotations"] if a["category_id"] == number]
        width, height = np.median([a["bbox"][2:] for a in mine], axis=0)
        row = [name, str(len(mine)), str(len({a["image_id"] for a in mine})), f"{width:.0f}", "x", f"{height:.0f}"]
        assert row in [line.split() for line in printed.splitlines()]
    assert "images: 3 sizes from 97 x 61 to 113 x 83 pixels" in printed
    assert "images without objects: 1 of 6 (train_06.jpg). They are left out of training" in printed


def test_the_yaml_may_be_overridden(photographs, capsys):
    path = write_yaml(photographs)
    assert data("check", "--config-file", path, "DATASETS.TEST", "[]", "INPUT.MIN_SIZE_TEST", "128") == 0
    printed = capsys.readouterr().out
    assert "my_val" not in printed.replace("Registered dataset my_val", "") and "INPUT.MIN_SIZE_TEST 128" in printed


def test_objects_are_measured_as_the_model_sees_them(photographs):
    def one_object(content):
        content["annotations"] = [{**content["annotations"][0], "image_id": 3, "bbox": [10, 10, 16, 36]}]

    (train, _), _ = inspected(photographs, one_object)
    # image 3 has 97 x 61 pixels: by 64 / 61
    assert SIZES[0] == (97, 61)
    assert train.facts[1].startswith("objects: 24 to 24, median 24 pixels") and train.facts[1].endswith(
        "25 to 25, median 25"
    )
    # 16.79 x 37.77 with the anchor of 32 and ratio 2, 22.63 x 45.25
    assert "has IoU 0.62 in the median; 0% of the objects have none of 0.5" in train.facts[2]


def spoil(**changes):
    return lambda content: content["annotations"][0].update(changes)


def repeat(**changes):
    return lambda content: content["annotations"].append({**content["annotations"][0], "id": 99, **changes})


@pytest.mark.parametrize(
    "change, line",
    [
        (spoil(bbox=[70, 3, 8, 8]), "boxes that reach out of their image by more than 1 pixel: 1 (train_01.jpg)."),
        (spoil(bbox=[20, 3, 0, 8]), "boxes without width or height: 1 (train_01.jpg)."),
        (
            spoil(bbox=[20, 3, 2, 8]),
            f"objects that the model sees with less than {TINY} pixels of width or height: 1 (train_01.jpg)",
        ),
        (repeat(), "objects in the place of another one of their class (IoU above 0.95): 1 (train_01.jpg)."),
        (
            lambda c: repeat(category_id=c["annotations"][0]["category_id"] % 3 + 1)(c),
            "objects in the place of one of another class",
        ),
        (
            lambda c: c["categories"].append({"id": 4, "name": "rope"}),
            "classes without objects: 1 of 4 (rope). Nothing",
        ),
    ],
)
def test_suspicious_annotations(photographs, change, line):
    four = {"MODEL__RETINANET__NUM_CLASSES": 4, "DATASETS__TEST": []} if "rope" in line else {}
    reports, _ = inspected(photographs, change, **four)
    assert any(found.startswith(line) for found in reports[0].suspicions), reports[0].suspicions


def test_crowds_are_counted_apart(photographs):
    (train, _), _ = inspected(photographs, spoil(iscrowd=1))
    assert train.heading.endswith("14 objects of 3 classes, crowds: 1")


def test_rare_classes_are_told_for_training_only():
    for is_train, expected in ((True, 3), (False, 1)):
        report = Report("")
        report.compare_classes(["a", "b", "c"], [300, 9, 0], "objects", is_train)
        assert len(report.suspicions) == expected
    report = Report("")
    report.compare_classes(["a", "b"], [300, 9], "objects", True)
    assert report.suspicions[0] == "classes with fewer than 10 objects: 1 of 2 (b: 9)."
    assert report.suspicions[1].startswith("class a has 33 times the objects of b.")
    assert "nothing suspicious" in Report("x").text()


def test_images_of_both_sets_are_told(photographs, capsys):
    shutil.copy(photographs / "train/train_02.jpg", photographs / "val/val_02.jpg")
    content = json.loads((photographs / "val.json").read_text())
    content["images"][1].update(width=113, height=83)
    (photographs / "val.json").write_text(json.dumps(content))
    assert data("check", "--config-file", write_yaml(photographs)) == 0
    printed = capsys.readouterr().out
    assert "Images in my_train and in my_val: 1, first " in printed and "the model has seen them" in printed


def test_copies_are_found_by_content(tmp_path):
    for name, content in (("a", b"1" * 9), ("b", b"1" * 9), ("c", b"2" * 9), ("d", b"1" * 8)):
        (tmp_path / name).write_bytes(content)
    files = {name: str(tmp_path / name) for name in "abcd"}
    groups = equal_files({"x": [files["a"], files["a"], files["c"]], "y": [files["b"], files["d"], "nowhere"]})
    assert groups == [[("x", files["a"]), ("y", files["b"])]]


def test_sizes_of_images_in_words():
    assert describe_sizes([(4, 3), (4, 3)]) == "images: all of 4 x 3 pixels (width x height)"
    assert describe_sizes([(4, 3), (8, 6)]).endswith("width 4 to 8, median 6, height 3 to 6, median 4")


@pytest.fixture
def labeled(tmp_path, forget_datasets, monkeypatch):
    """Images with label maps, and crops in class folders."""
    monkeypatch.setattr("sys.argv", ["d2kd"])
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            labels = np.zeros((40, 60), np.uint8)
            labels[:10], labels[-4:] = 2, 255
            paths = [tmp_path / kind / split / f"{name}.png" for kind in ("images", "maps")]
            paths.append(tmp_path / "crops" / split / name / "1.png")
            noise = random.integers(0, 256, (40, 60, 3), np.uint8)
            for path, picture in zip(paths, (noise, labels, noise)):
                path.parent.mkdir(parents=True, exist_ok=True)
                assert cv2.imwrite(str(path), picture)
    return tmp_path


def write_labeled(folder, kind, base):
    keys = {
        "labelmaps": lambda s: {
            "IMAGES": str(folder / "images" / s),
            "LABELS": str(folder / "maps" / s),
            "CLASSES": ["ground", "car", "sky"],
        },
        "folders": lambda s: {"IMAGES": str(folder / "crops" / s)},
    }[kind]
    entries = [{"NAME": f"my_{s}", "FORMAT": kind, **keys(s)} for s in ("train", "val")]
    sets = {"REGISTER": entries, "TRAIN": ["my_train"], "TEST": ["my_val"]}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"_BASE_": f"configs/PhotoDigits/{base}.yaml", "DATASETS": sets}))
    return path


def test_label_maps_are_counted_and_drawn(labeled, capsys):
    path = write_labeled(labeled, "labelmaps", "pspnet_student")
    keys = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", "MODEL.DEVICE", "cpu"]
    assert data("check", "--config-file", path, *keys) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ground", "72.22%", "2"] in rows and ["car", "0.00%", "0"] in rows and ["sky", "27.78%", "2"] in rows
    output = labeled / "sheet.png"
    assert data("show", "--config-file", path, "--images", 3, "--output", output, *keys) == 0
    picture = cv2.imread(str(output))
    assert picture.shape[1] == 3 * (TILE + GAP) and picture.shape[0] > HEADER + TILE + GAP  # with a legend


def test_label_maps_of_one_bit_are_counted(labeled, capsys):
    for path in (labeled / "maps").rglob("*.png"):
        labels = np.zeros((40, 60), np.uint8)
        labels[:10] = 1
        Image.fromarray(labels * 255).convert("1").save(path)
    path = write_labeled(labeled, "labelmaps", "pspnet_student")
    assert data("check", "--config-file", path, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", "MODEL.DEVICE", "cpu") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ground", "75.00%", "2"] in rows and ["car", "25.00%", "2"] in rows and ["sky", "0.00%", "0"] in rows


def test_label_maps_that_training_leaves_out_are_told(labeled, capsys):
    for name in ("a", "b"):
        (labeled / f"maps/train/{name}.png").write_bytes(b"no image")
    path = write_labeled(labeled, "labelmaps", "pspnet_student")
    arguments = ["check", "--config-file", path, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", "MODEL.DEVICE", "cpu"]
    assert data(*arguments) == 2
    assert "a.png cannot be read" in capsys.readouterr().out
    assert data(*arguments, "DATASETS.ON_BAD_IMAGE", "skip") == 0
    printed = capsys.readouterr().out
    assert f"label maps that cannot be used: 2 ({labeled}/maps/train/a.png, {labeled}/maps/train/b.png)." in printed
    (labeled / "maps/val/a.png").write_bytes(b"no image")
    assert data(*arguments, "DATASETS.ON_BAD_IMAGE", "skip") == 2
    for path in (labeled / "images/train").iterdir():
        path.write_bytes(b"no image")
    assert data(*arguments, "DATASETS.ON_BAD_IMAGE", "skip", "DATASETS.TEST", "[]") == 0
    assert "images: none can be read" in capsys.readouterr().out


def test_names_that_are_not_utf8_are_printed_as_what_stands_for_them(labeled):
    (labeled / "crops/train/b").rename(labeled / "crops/train/caf\udce9")
    (labeled / "crops/val/b").rename(labeled / "crops/val/caf\udce9")
    path = write_labeled(labeled, "folders", "classifier_student")
    ended = program("data", "check", "--config-file", path, "MODEL.CLASSIFIER.NUM_CLASSES", 2, "MODEL.DEVICE", "cpu")
    assert ended.returncode == 0 and "fewer than 10 images: 2 of 2 (a: 1, caf\\udce9: 1)." in ended.stdout


def test_class_folders_are_counted_and_drawn(labeled, capsys):
    path = write_labeled(labeled, "folders", "classifier_student")
    keys = ["MODEL.CLASSIFIER.NUM_CLASSES", "2", "MODEL.DEVICE", "cpu", "INPUT.CLASSIFICATION.MIXUP", "0.4"]
    assert data("check", "--config-file", path, *keys) == 0
    printed = capsys.readouterr().out
    assert "my_train (DATASETS.TRAIN): 2 images of 2 classes" in printed
    assert "classes with fewer than 10 images: 2 of 2 (a: 1, b: 1)." in printed
    output = labeled / "sheet.jpg"
    assert data("show", "--config-file", path, "--dataset", "my_val", "--images", 5, "--output", output, *keys) == 0
    assert cv2.imread(str(output)).shape == (2 * (HEADER + TILE + GAP), 4 * (TILE + GAP), 3)


def test_boxes_are_drawn_as_they_are_trained_on(photographs):
    path = write_yaml(photographs, "yolo")
    for name, flip in (("plain", "none"), ("flipped", "horizontal")):
        keys = ["INPUT.RANDOM_FLIP", flip, "SEED", "3"]
        output = photographs / f"{name}.png"
        assert data("show", "--config-file", path, "--images", 4, "--output", output, *keys) == 0
    plain, flipped = (cv2.imread(str(photographs / f"{name}.png")) for name in ("plain", "flipped"))
    assert plain.shape == flipped.shape and (plain != flipped).any()


def test_a_sheet_shows_boxes_masks_and_classes_in_their_place():
    truth = Instances((50, 100))
    truth.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 60.0, 40.0]]))
    truth.gt_classes = torch.tensor([1])
    mask = torch.zeros(1, 50, 100, dtype=torch.bool)
    mask[:, 10:40, 10:60] = True
    image = torch.zeros(3, 50, 100, dtype=torch.uint8)
    image[0] = 200
    scale, sheets = TILE / 100, {}
    polygon = [[np.array([10.0, 10.0, 60.0, 10.0, 60.0, 40.0, 10.0, 40.0])]]
    for kind, masks in (("none", None), ("bits", BitMasks(mask)), ("polygons", PolygonMasks(polygon))):
        found = Instances((50, 100), gt_boxes=truth.gt_boxes, gt_classes=truth.gt_classes)
        if masks is not None:
            found.gt_masks = masks
        sheets[kind] = input_sheet([{"image": image, "instances": found, "file_name": "ä.png"}], "RGB", ["a", "b"])
    inside = HEADER + int(25 * scale), int(50 * scale)
    outside = HEADER + int(45 * scale), int(90 * scale)
    assert sheets["none"][inside].tolist() == sheets["none"][outside].tolist() == [0, 0, 200]  # red, as BGR
    assert sheets["bits"][inside].tolist() == sheets["polygons"][inside].tolist() != [0, 0, 200]
    assert sheets["bits"][outside].tolist() == [0, 0, 200]
    edge = sheets["none"][HEADER + int(25 * scale), int(10 * scale)]
    assert edge.tolist() not in ([0, 0, 200], [0, 0, 0])


def test_grey_images_and_those_without_objects_are_drawn():
    sheet = input_sheet([{"image": torch.full((1, 20, 20), 90.0), "instances": empty()}], "L", ["a"])
    assert sheet[HEADER + 50, 50].tolist() == [90, 90, 90]


def empty():
    return Instances((20, 20), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--images", 0], "--images must be at least 1"),
        (["--output", "sheet.gif"], "--output a .png or .jpg"),
        (["--dataset", "my_trian"], "'my_trian' of DATASETS.TRAIN is not registered.*Did you mean my_train"),
    ],
)
def test_wrong_arguments_are_one_line(photographs, capsys, arguments, message):
    assert data("show", "--config-file", write_yaml(photographs), *arguments) == 2
    assert re.search(message, capsys.readouterr().out.splitlines()[-1])


def test_what_a_training_refuses_is_one_line(photographs, capsys):
    (photographs / "labels/train/train_01.txt").write_text("7 0.5 0.5 0.1 0.1\n")
    assert data("check", "--config-file", write_yaml(photographs, "yolo")) == 2
    assert "ERROR Dataset 'my_train': " in (last := capsys.readouterr().out.splitlines()[-1])
    assert "train_01.txt has an object of class 7, and CLASSES lists 3" in last
    path = write_yaml(photographs, MODEL={**DETECTOR["MODEL"], "RETINANET": {"NUM_CLASSES": 4}})
    assert data("check", "--config-file", path) == 2


def spoil_middle(path):
    """Forty bytes of zeros in the middle of a file, whose ends stay as they are."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(content)


def test_damage_in_the_middle_of_an_image_is_found(labeled, capsys):
    path = write_labeled(labeled, "folders", "classifier_student")
    arguments = ["check", "--config-file", path, "MODEL.CLASSIFIER.NUM_CLASSES", "2", "MODEL.DEVICE", "cpu"]
    spoil_middle(labeled / "crops/train/a/1.png")
    assert data(*arguments) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert "crops/train/a/1.png cannot be read (" in last and "set DATASETS.ON_BAD_IMAGE to skip" in last
    assert data("check", "--quick", *arguments[1:]) == 0
    assert data(*arguments, "DATASETS.ON_BAD_IMAGE", "skip") == 0
    assert "images that cannot be used: 1 of 2 (1.png). They are left out in training." in capsys.readouterr().out
    spoil_middle(labeled / "crops/val/b/1.png")
    assert data(*arguments, "DATASETS.ON_BAD_IMAGE", "skip") == 2
    assert "set DATASETS.ON_BAD_IMAGE" not in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("kind", ["coco", "yolo"])
def test_damage_in_the_middle_of_a_photograph_is_found(photographs, capsys, kind):
    path = photographs / "train/train_02.jpg"
    content = Image.open(path).convert("RGB")
    content.save(path, "PNG")  # a decoder of JPEG takes most bytes for pixels
    spoil_middle(path)
    assert data("check", "--config-file", write_yaml(photographs, kind)) == 2
    assert "train_02.jpg cannot be read (" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_beyond_the_classes_are_an_error(labeled, capsys, split):
    for name in ("a", "b"):
        file = labeled / f"maps/{split}/{name}.png"
        labels = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        labels[20, 20] = 77
        assert cv2.imwrite(str(file), labels)
    path = write_labeled(labeled, "labelmaps", "pspnet_student")
    arguments = ["check", "--config-file", path, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", "MODEL.DEVICE", "cpu"]
    for more in ([], ["--quick"]):
        assert data(*arguments[:1], *more, *arguments[1:]) == 2
        last = capsys.readouterr().out.splitlines()[-1]
        assert f"maps/{split}/a.png has the label 77, and there are 3 classes, from 0 on; 255 is ignored." in last
        assert "So it is with 2 of 2, others are b.png." in last
    skip = data(*arguments, "DATASETS.ON_BAD_IMAGE", "skip")
    assert skip == (0 if split == "train" else 2)


def test_unknown_words_end_with_the_usage(capsys):
    assert data("chek", "--config-file", "x.yaml") == 2 and "check|show" in capsys.readouterr().err
