"""SOLO in whole runs: resumed, in two processes, evaluated on boxes and masks; the published numbers of its recipes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_tensors
from models import config, model
from runs import ROOT, in_two_processes, make_trainer, read_checkpoint, run_training
from test_solo import SOLO, batch, losses

import d2kd  # noqa: F401  (makes `detectron2` importable, also in processes that are spawned)
from d2kd.data.mapper import ImageMapper
from d2kd.engine import load_config
from d2kd.modeling import teacher_config
from d2kd.visualization import read_predictions
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from detectron2.utils import comm

KEYS = {
    **SOLO,
    "MODEL.SOLO.NUM_CLASSES": 10,
    "MODEL.SOLO.SCORE_THRESH_TEST": -1.0,
    "MODEL.SOLO.FINAL_SCORE_THRESH_TEST": 0.0,
    "MODEL.SOLO.MASK_THRESH_TEST": 0.001,
    "TEST.DETECTIONS_PER_IMAGE": 20,
}
METHODS = ["MaskedGenerative", "LogitKD"]


@pytest.fixture
def write(write_config):
    """Writes the YAML of a tiny SOLO on a small PhotoDigits; keyword arguments are keys with '__' for '.'."""

    def written(name: str = "student", **changes: Any) -> Path:
        return write_config(name, **{key.replace(".", "__"): value for key, value in KEYS.items()}, **changes)

    return written


@pytest.fixture
def solo_teacher(write, tmp_path):
    """A wider, untrained SOLO; the keys that name it."""
    path = write("teacher", MODEL__RESNETS__RES2_OUT_CHANNELS=32)
    torch.manual_seed(7)
    torch.save({"model": build_model(load_config(str(path))).state_dict()}, tmp_path / "teacher.pth")
    return {
        "DISTILL__TEACHER__CONFIG_FILE": str(path),
        "DISTILL__TEACHER__WEIGHTS": str(tmp_path / "teacher.pth"),
        "DISTILL__TEACHER__EVAL_FIRST": False,
        "DISTILL__METHODS": METHODS,
    }


def test_interrupted_and_resumed_is_bit_equal_and_boxes_and_masks_are_evaluated(write, solo_teacher, tmp_path):
    path = write(**solo_teacher)
    run_training(path, OUTPUT_DIR=str(tmp_path / "whole"))
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), stop_at=3)
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), resume=True, DATALOADER__NUM_WORKERS=1)
    whole, parts = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "parts")
    assert same_tensors(whole["model"], parts["model"])
    metrics = [json.loads((tmp_path / run / "result.json").read_text())["metrics"] for run in ("whole", "parts")]
    assert metrics[0] == metrics[1] and {"bbox", "segm"} <= metrics[0].keys()
    file = tmp_path / "whole/inference/coco_instances_results.json"
    results = json.loads(file.read_text())
    assert len(results) == 4 * 20 and all({"bbox", "segmentation"} <= result.keys() for result in results)
    assert len(read_predictions(str(file), MetadataCatalog.get("digits_val"))) == 4  # what reports draw


def images_of_one_size() -> list[dict[str, Any]]:
    """Two images, with two instances and with one."""
    first, second = batch()[0], batch()[0]
    second["image"] = 255 - second["image"]
    second["instances"] = second["instances"][:1]
    return [first, second]


def gradients(inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    net = model(config(SOLO, MODEL__RESNETS__NORM="FrozenBN"))
    sum(losses(net, inputs).values()).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def two_processes(path: str, output: str) -> None:
    torch.set_num_threads(1)
    own = gradients([images_of_one_size()[comm.get_rank()]])
    trainer = make_trainer(Path(path), OUTPUT_DIR=output)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert not trainer.model.find_unused_parameters
    torch.save((own, trainer.student.state_dict()), f"{output}/rank{comm.get_rank()}.pth")


def test_two_processes_stay_in_step_and_have_the_gradient_of_one_with_all_images(write, solo_teacher, tmp_path):
    path = write(**solo_teacher, DATASETS__TEST=[], SOLVER__MAX_ITER=3, SOLVER__STEPS=[2])
    in_two_processes(two_processes, path, tmp_path / "student")
    parts, states = zip(*(torch.load(tmp_path / f"student/rank{i}.pth") for i in (0, 1)))
    learned = {name for name in states[0] if "running" not in name and "num_batches" not in name}
    assert same_tensors(*({name: state[name] for name in learned} for state in states))
    for name, gradient in gradients(images_of_one_size()).items():
        mean = (parts[0][name] + parts[1][name]) / 2
        torch.testing.assert_close(mean, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-9)


def test_crowds_are_left_out(digits):
    cfg = config(SOLO)
    image = next((digits / "train").glob("*.png"))
    one = {"bbox": [5, 5, 30, 40], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 0}
    one["segmentation"] = [[5, 5, 35, 5, 35, 45, 5, 45]]
    crowd = {**one, "iscrowd": 1, "segmentation": {"size": [64, 64], "counts": [0, 64 * 64]}}
    record = {"file_name": str(image), "height": 64, "width": 64, "image_id": 1}
    examples = [ImageMapper(cfg, True)({**record, "annotations": found}) for found in ([one], [one, crowd])]
    alone, beside_crowd = (example["instances"] for example in examples)
    assert len(alone) == len(beside_crowd) == 1
    assert torch.equal(alone.gt_masks.tensor.sum((1, 2)), beside_crowd.gt_masks.tensor.sum((1, 2)))


# ---- recipes ----


def recipe(name: str) -> CfgNode:
    return load_config(str(ROOT / f"configs/COCO/{name}.yaml"))


#: Of each: head, depth, short sides, length and steps in epochs of 7,500 iterations, start of the warm-up, clipping.
RECIPES = {
    "solo_R50_1x": ("plain", 50, [800], 12, [8, 11], 0.001, None),
    "solo_R50_3x": ("plain", 50, list(range(640, 801, 32)), 36, [27, 33], 1 / 3, None),
    "solo_decoupled_R50_3x": ("decoupled", 50, list(range(640, 801, 32)), 36, [27, 33], 1 / 3, None),
    "solo_R101": ("plain", 101, list(range(640, 801, 32)), 36, [27, 33], 1 / 3, 35.0),
    "solo_R50_R101_MaskedGenerative_1x": ("plain", 50, [800], 12, [8, 11], 0.001, 35.0),
    "solo_R50_R101_FeatureMimic_1x": ("plain", 50, [800], 12, [8, 11], 0.001, 35.0),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_published_numbers(name):
    cfg = recipe(name)
    node, solver, clip = cfg.MODEL.SOLO, cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    assert not clip.ENABLED or (clip.CLIP_TYPE, clip.NORM_TYPE) == ("full_model", 2.0)
    found = (
        node.HEAD, cfg.MODEL.RESNETS.DEPTH, list(cfg.INPUT.MIN_SIZE_TRAIN), solver.MAX_ITER / 7500,
        [step / 7500 for step in solver.STEPS], solver.WARMUP_FACTOR, clip.CLIP_VALUE if clip.ENABLED else None,
    )  # fmt: skip
    assert found == RECIPES[name]
    assert (solver.BASE_LR, solver.IMS_PER_BATCH, solver.MOMENTUM, solver.GAMMA) == (0.01, 16, 0.9, 0.1)
    assert (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM, solver.WARMUP_ITERS) == (1e-4, 1e-4, 500)
    assert (node.NUM_GRIDS, node.NUM_CONVS, node.CONV_DIM, node.NORM) == ([40, 36, 24, 16, 12], 7, 256, "GN")
    assert node.SCALE_RANGES == [[1, 96], [48, 192], [96, 384], [192, 768], [384, 2048]]
    assert (node.CENTER_SCALE, node.MASK_LOSS_WEIGHT, node.FOCAL_LOSS_ALPHA, node.FOCAL_LOSS_GAMMA) == (0.2, 3, 0.25, 2)
    thresholds = build_thresholds(cfg)
    assert thresholds == (0.1, 0.5, "gaussian", 2.0, 500, 0.05, 100)
    assert (cfg.INPUT.FORMAT, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST) == ("RGB", 1333, 800)
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53] and cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]


def build_thresholds(cfg: CfgNode) -> tuple[Any, ...]:
    node = cfg.MODEL.SOLO
    return (
        node.SCORE_THRESH_TEST, node.MASK_THRESH_TEST, node.NMS, node.NMS_SIGMA, node.TOPK_CANDIDATES_TEST,
        node.FINAL_SCORE_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE,
    )  # fmt: skip


def test_the_recipe_of_masked_generative_has_the_papers_numbers():
    cfg = recipe("solo_R50_R101_MaskedGenerative_1x")
    node = cfg.DISTILL.MASKED_GENERATIVE
    assert (node.TAPS, node.WEIGHT, node.MASK_RATIO) == (["p2", "p3", "p4", "p5"], 2e-5, 0.65)
    assert (node.NORMALIZE, node.REDUCTION, cfg.DISTILL.INIT_FROM_TEACHER.ENABLED) == ("none", "batchmean", True)
    assert teacher_config(cfg).MODEL.RESNETS.DEPTH == 101
