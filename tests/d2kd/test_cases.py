"""Datasets with a fault that real exports have: how training and evaluation end on each of `cases.CASES`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, CLASSES, SIZE, SPLITS, sound_split, swap_classes, write_case, write_palette_label_maps
from models import FASTER_RCNN, RETINANET, config, model

from d2kd.cli import train
from d2kd.data.images import read_label_map
from d2kd.data.mapper import ImageMapper
from d2kd.engine import argument_parser
from d2kd.errors import UserError
from d2kd.evaluation.build import build_evaluator
from d2kd.evaluation.coco import CocoEvaluator
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg
from detectron2.structures import Boxes, Instances

pytestmark = pytest.mark.usefixtures("forget_datasets")

MASK_RCNN = {
    **FASTER_RCNN,
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 4,
}
MODELS = {
    "box": (RETINANET, {"MODEL__RETINANET__NUM_CLASSES": 2, "MODEL__RETINANET__SCORE_THRESH_TEST": -1.0}),
    "mask": (MASK_RCNN, {"MODEL__ROI_HEADS__NUM_CLASSES": 2, "MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.0}),
}
KEYS = {
    "INPUT__MIN_SIZE_TRAIN": [SIZE],
    "INPUT__MAX_SIZE_TRAIN": 2 * SIZE,
    "INPUT__MIN_SIZE_TEST": SIZE,
    "INPUT__MAX_SIZE_TEST": 2 * SIZE,
    "DATALOADER__NUM_WORKERS": 0,
    "SOLVER__IMS_PER_BATCH": 2,
    "SOLVER__MAX_ITER": 1,
    "TEST__DETECTIONS_PER_IMAGE": 5,
}

#: Cases that must end in one line, by the kind of model, with the words in it.
REFUSED = {
    ("polygon_with_nan", "mask"): ["annotation (id 1) in 0000.png", "not finite"],
    ("truncated_validation_image", "box"): ["val/0101.png", "cannot be read", "truncated"],
    ("exif_rotated_with_stored_sizes", "box"): ["1.jpg is 64 x 80", "80 x 64", "swapped by its EXIF orientation 6"],
    ("grey_16_bit", "box"): ["0000.png has 16-bit pixels", "convert all images to 8 bits"],
    ("val_numbers_classes_otherwise", "box"): ["(square, disc)", "(disc, square)", "in another order"],
    ("no_masks_at_all", "mask"): ["12 of 12 annotations", "annotation (id 1) in 0000.png", "is empty"],
    ("flat_polygon_list", "mask"): ["annotation (id 1) in 0000.png", "flat list of numbers", "brackets"],
    ("compressed_rle", "mask"): ["INPUT.MASK_FORMAT is polygon", "bitmask"],
    ("all_crowd", "box"): ["all 12 annotations have iscrowd 1"],
}
#: What is wrong with the training set only, or with what is done with it there.
TRAINING_ONLY = {"val_numbers_classes_otherwise", "compressed_rle", "all_crowd"}
#: Cases that must train and evaluate, with the words of a message in the log.
ACCEPTED = {
    ("control", "box"): "",
    ("control", "mask"): "",
    ("polygon_with_nan", "box"): "the segmentation of 12 annotations has a coordinate that is not finite",
    ("no_masks_at_all", "box"): "",
    ("flat_polygon_list", "box"): "the segmentation of 12 annotations is a flat list",
    ("compressed_rle", "box"): "",
    ("sizes_as_floats", "mask"): "sizes of images are floats",
    ("boxes_from_0_to_1", "box"): "12 of 12 boxes are smaller than one pixel",
    ("one_box_3_px_outside", "box"): "1 of 12 boxes lie outside their image by more than 1 px",
    ("double_slash_in_file_name", "box"): "",
}
#: Cases whose metrics must be those of `control`.
RENUMBERED = ["image_ids_above_2_to_53", "annotation_ids_from_0", "annotation_ids_negative"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained weights by the kind of model."""
    folder = tmp_path_factory.mktemp("weights")
    for kind, (base, changes) in MODELS.items():
        torch.save({"model": model(config(base, **changes)).state_dict()}, folder / f"{kind}.pth")
    return folder


def run_case(folder: Path, kind: str, *options: str, eval_only: bool = False, train_sets=("train",), **changes):
    """`d2kd train` on the datasets in a folder, whose names begin with that of the folder's."""
    base, keys = MODELS[kind]
    registered = {split: f"{folder.name}_{split}" for split in dict.fromkeys((*train_sets, "val"))}
    cfg = config(base, **{**KEYS, **keys, **changes})
    cfg.OUTPUT_DIR = str(folder / "output")
    cfg.DATASETS.REGISTER = [
        {"NAME": name, "JSON": str(folder / f"{split}.json"), "IMAGES": str(folder / split)}
        for split, name in registered.items()
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(registered[split] for split in train_sets), (registered["val"],)
    (folder / "config.yaml").write_text(cfg.dump())
    arguments = ["--config-file", str(folder / "config.yaml"), *(["--eval-only"] if eval_only else []), *options]
    return train.main(argument_parser().parse_args(arguments))


def one_line_of(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 1000
    return message


def test_every_case_is_tried():
    tried = {name for name, _ in (*REFUSED, *ACCEPTED)}
    assert tried | set(RENUMBERED) == set(CASES)


@pytest.mark.parametrize("name, kind", REFUSED)
def test_refused_in_one_line_before_anything_is_trained(name, kind, tmp_path):
    write_case(name, tmp_path)
    with pytest.raises(UserError) as error:
        run_case(tmp_path, kind)
    message = one_line_of(error)
    assert all(words in message for words in REFUSED[name, kind]), message
    assert not [*(tmp_path / "output").glob("*.pth"), *(tmp_path / "output").glob("metrics.json")]


@pytest.mark.parametrize("name, kind", [case for case in REFUSED if case[0] not in TRAINING_ONLY])
def test_refused_in_one_line_by_eval_only_too(name, kind, weights, tmp_path):
    write_case(name, tmp_path)
    with pytest.raises(UserError) as error:
        run_case(tmp_path, kind, "MODEL.WEIGHTS", str(weights / f"{kind}.pth"), eval_only=True)
    message = one_line_of(error).replace("4 of 4", "12 of 12").replace("0100.png", "0000.png")
    assert all(words in message for words in REFUSED[name, kind]), message


@pytest.mark.parametrize("name, kind", ACCEPTED)
def test_trains_and_evaluates(name, kind, tmp_path):
    write_case(name, tmp_path)
    results = run_case(tmp_path, kind)
    assert set(results) == ({"bbox", "segm"} if kind == "mask" else {"bbox"})
    assert ACCEPTED[name, kind] in (tmp_path / "output" / "log.txt").read_text()
    assert (tmp_path / "output" / "model_final.pth").exists()


def test_masks_as_runs_train_as_bitmasks(tmp_path):
    write_case("compressed_rle", tmp_path)
    assert set(run_case(tmp_path, "mask", INPUT__MASK_FORMAT="bitmask")) == {"bbox", "segm"}


def test_eval_only_compares_its_classes_with_those_of_training(weights, tmp_path):
    write_case("val_numbers_classes_otherwise", tmp_path)
    with pytest.raises(UserError) as error:
        run_case(tmp_path, "box", "MODEL.WEIGHTS", str(weights / "box.pth"), eval_only=True)
    message = one_line_of(error)
    assert "(square, disc)" in message and "(disc, square)" in message


def test_two_training_sets_in_other_order(tmp_path):
    write_case("control", tmp_path)
    more = sound_split("train")
    more.name = "more"
    swap_classes(more)
    more.write(tmp_path)
    with pytest.raises(UserError) as error:
        run_case(tmp_path, "box", train_sets=("train", "more"))
    message = one_line_of(error)
    assert "(square, disc)" in message and "(disc, square)" in message
    assert f"{tmp_path.name}_train" in message and f"{tmp_path.name}_more" in message


# --- Ids ---------------------------------------------------------------------------


def evaluate_shifted(folder: Path, name: str, fast: bool) -> tuple[dict[str, float], list[dict]]:
    """Metrics of the objects of a case moved by 2 pixels, half of them with the other class too; and what is written.

    All have one score, so that their order decides.
    """
    write_case(name, folder)
    content = json.loads((folder / "val.json").read_text())
    dataset = f"{folder.name}_{name}"
    MetadataCatalog.get(dataset).set(
        json_file=str(folder / "val.json"), thing_classes=CLASSES, thing_dataset_id_to_contiguous_id={1: 0, 2: 1}
    )
    evaluator = CocoEvaluator(dataset, output_dir=str(folder / name), use_fast_impl=fast)
    evaluator.reset()
    for image in content["images"]:
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        found = Instances((SIZE, SIZE))
        boxes = torch.tensor([a["bbox"] for a in own], dtype=torch.float32) + torch.tensor([2.0, 0, 0, 0])
        boxes[:, 2:] += boxes[:, :2]
        found.pred_boxes = Boxes(torch.cat([boxes, boxes[:1]]))
        labels = [a["category_id"] - 1 for a in own]
        found.pred_classes = torch.tensor([*labels, 1 - labels[0]])
        found.scores = torch.full((len(found),), 0.5)
        evaluator.process([{"image_id": image["id"]}], [{"instances": found}])
    results = evaluator.evaluate()["bbox"]
    return results, json.loads((folder / name / "coco_instances_results.json").read_text())


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", RENUMBERED)
def test_metrics_do_not_depend_on_the_numbering(name, fast, tmp_path):
    want, _ = evaluate_shifted(tmp_path, "control", fast)
    got, written = evaluate_shifted(tmp_path, name, fast)
    assert 10 < want["AP"] < 90
    assert got == pytest.approx(want, nan_ok=True)
    images = json.loads((tmp_path / "val.json").read_text())["images"]
    assert {result["image_id"] for result in written} == {image["id"] for image in images}


# --- Label maps --------------------------------------------------------------------


def test_palette_label_maps_are_classes_in_training_and_in_evaluation(tmp_path):
    write_palette_label_maps(tmp_path)
    cfg = config(**KEYS, OUTPUT_DIR=str(tmp_path / "output"))
    for name in SPLITS:
        dataset = f"{tmp_path.name}_{name}"
        folders = str(tmp_path / f"{name}_gt"), str(tmp_path / name)
        DatasetCatalog.register(dataset, lambda folders=folders: load_sem_seg(*folders, image_ext="jpg"))
        MetadataCatalog.get(dataset).set(
            evaluator_type="sem_seg", stuff_classes=["ground", *CLASSES], ignore_label=255, sem_seg_root=folders[0]
        )
    labels = [ImageMapper(cfg, is_train=True)(r)["sem_seg"] for r in DatasetCatalog.get(f"{tmp_path.name}_train")]
    assert {int(label) for label in torch.cat(labels).unique()} == {0, 1, 2}

    val = f"{tmp_path.name}_val"
    evaluator = build_evaluator(cfg, val, str(tmp_path / "output"))
    evaluator.reset()
    for record in DatasetCatalog.get(val):
        right = torch.from_numpy(read_label_map(record["sem_seg_file_name"], np.int64))
        evaluator.process([record], [{"sem_seg": torch.nn.functional.one_hot(right, 3).permute(2, 0, 1)}])
    results = evaluator.evaluate()["sem_seg"]
    assert results["mIoU"] == 100 and all(results[f"IoU-{name}"] == 100 for name in ("ground", *CLASSES))
