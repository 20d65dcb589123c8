"""Evaluators are chosen by the type of the dataset, and Cityscapes gets those of COCO and of label maps."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.cli import train
from d2kd.config import add_distill_config
from d2kd.data.datasets import DatasetError, register_datasets
from d2kd.engine import DistillTrainer, argument_parser, load_config
from d2kd.evaluation.build import EvaluatorError, build_evaluator, check_evaluators, folder_of
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin import register_all_cityscapes
from detectron2.evaluation import DatasetEvaluators
from detectron2.structures import Boxes, Instances

TASKS = ("instance_seg", "sem_seg")
INSTANCES, LABELS = (f"cityscapes_fine_{task}_val" for task in TASKS)
BUILTIN = [f"cityscapes_fine_{task}_{split}" for task in TASKS for split in ("train", "val", "test")]


@pytest.fixture
def cityscapes(tmp_path):
    """One image of 20 x 40 pixels with a car, registered under the built-in names."""
    images, labels = (tmp_path / f"cityscapes/{folder}/val/aachen" for folder in ("leftImg8bit", "gtFine"))
    for folder in (images, labels):
        folder.mkdir(parents=True)
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(images / "aachen_0_leftImg8bit.png")
    car = {"label": "car", "polygon": [[2, 2], [12, 2], [12, 12], [2, 12]]}
    polygons = {"imgHeight": 20, "imgWidth": 40, "objects": [car]}
    (labels / "aachen_0_gtFine_polygons.json").write_text(json.dumps(polygons))
    classes = np.zeros((20, 40), np.uint8)
    classes[2:12, 2:12] = 13
    Image.fromarray(classes).save(labels / "aachen_0_gtFine_labelTrainIds.png")
    # Detectron2 asks for these, too: label 26 is the car, and 26001 the first of them
    Image.fromarray(classes * 2).save(labels / "aachen_0_gtFine_labelIds.png")
    Image.fromarray((classes > 0) * np.uint16(26001)).save(labels / "aachen_0_gtFine_instanceIds.png")
    kept = {name: (DatasetCatalog[name], MetadataCatalog.pop(name)) for name in BUILTIN}
    for name in BUILTIN:
        DatasetCatalog.remove(name)
    register_all_cityscapes(str(tmp_path))
    yield
    for name, (load, metadata) in kept.items():
        DatasetCatalog.remove(name)
        DatasetCatalog.register(name, load)
        MetadataCatalog[name] = metadata


def config(tmp_path):
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg


def scores(cfg, name, prediction):
    (record,) = DatasetCatalog.get(name)
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    evaluator.process([record], [prediction])
    return evaluator.evaluate()


def test_instances_of_cityscapes_are_evaluated_as_coco(cityscapes, tmp_path):
    found = Instances((20, 40), pred_boxes=Boxes(torch.tensor([[2.0, 2.0, 12.0, 12.0]])))
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([2])
    assert scores(config(tmp_path), INSTANCES, {"instances": found})["bbox"]["AP-car"] == pytest.approx(100)


def test_label_maps_of_cityscapes_are_evaluated(cityscapes, tmp_path):
    logits = torch.zeros(19, 20, 40)
    logits[0] = 1
    logits[13, 2:12, 2:7] = 2  # half of the car
    result = scores(config(tmp_path), LABELS, {"sem_seg": logits})["sem_seg"]
    assert result["IoU-car"] == pytest.approx(50) and result["IoU-road"] == pytest.approx(100 * 700 / 750)


def test_other_types_are_an_error_before_training(write_config, digits, tmp_path):
    json_file = str(digits / "annotations/instances_val.json")
    register_coco_instances("of_no_known_type", {}, json_file, str(digits / "val"))
    MetadataCatalog.pop("of_no_known_type")
    MetadataCatalog.get("of_no_known_type").set(json_file=json_file, evaluator_type="lvis")
    path = write_config(DATASETS__TEST=["of_no_known_type"])
    try:
        with pytest.raises(
            EvaluatorError, match=r"'of_no_known_type' of DATASETS\.TEST\b.*'lvis'.*cityscapes_instance"
        ):
            train.main(argument_parser().parse_args(["--config-file", str(path)]))
    finally:
        DatasetCatalog.pop("of_no_known_type")
        MetadataCatalog.pop("of_no_known_type")
    assert not (tmp_path / "student/metrics.json").exists()


def test_several_test_sets_do_not_overwrite_each_other(cityscapes, tmp_path):
    cfg = config(tmp_path)
    cfg.DATASETS.TEST = ("one",)
    assert folder_of(cfg, "one", "inference") == "inference"
    cfg.DATASETS.TEST = (INSTANCES, LABELS)
    assert folder_of(cfg, LABELS, "inference") == os.path.join("inference", LABELS)
    scores(cfg, LABELS, {"sem_seg": torch.zeros(19, 20, 40)})
    assert list((tmp_path / "output/inference" / LABELS).iterdir())


@pytest.mark.parametrize(
    "build",
    [
        classmethod(lambda cls, cfg, dataset_name, output_folder=None: DatasetEvaluators([])),
        staticmethod(lambda cfg, dataset_name: DatasetEvaluators([])),
    ],
    ids=["classmethod", "staticmethod"],
)
def test_an_evaluator_of_ones_own_may_know_other_types(digits, write_config, build):
    Own = type("Own", (DistillTrainer,), {"build_evaluator": build})
    register_coco_instances("lvis_like", {}, str(digits / "annotations/instances_val.json"), str(digits / "val"))
    json_file = MetadataCatalog.pop("lvis_like").json_file
    MetadataCatalog.get("lvis_like").set(json_file=json_file, evaluator_type="lvis")
    try:
        cfg = load_config(str(write_config(DATASETS__TEST=["lvis_like"])))
        register_datasets(cfg)
        Own.check_config(cfg)
    finally:
        DatasetCatalog.pop("lvis_like")
        MetadataCatalog.pop("lvis_like")


def test_evaluation_needs_no_training_set(write_config, tmp_path):
    missing = [{"NAME": "not_there", "JSON": "nowhere.json", "IMAGES": "nowhere"}]
    cfg = load_config(str(write_config()))
    cfg.DATASETS.REGISTER = [*cfg.DATASETS.REGISTER, *missing]
    cfg.DATASETS.TRAIN = ("not_there",)
    register_datasets(cfg)
    DistillTrainer.check_config(cfg, ("TEST",))
    with pytest.raises(DatasetError, match="not_there"):
        DistillTrainer.check_config(cfg)


def test_predictions_that_a_test_set_cannot_score_are_an_error_before_training(digits, write_config):
    cfg = load_config(str(write_config()))
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    register_datasets(cfg)
    with pytest.raises(EvaluatorError, match="'digits_val'.*'coco'.*SemanticSegmentor predicts is scored by sem_seg"):
        check_evaluators(cfg)
