"""Evaluation of the teacher, with its own input sizes and channel order, on the student's test sets."""

import logging
import os
from typing import Any

from torch import nn

from d2kd.evaluation.build import build_evaluator, folder_of
from d2kd.files import write_json
from d2kd.modeling import load_teacher, teacher_config
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm

logger = logging.getLogger(__name__)


def evaluate_teacher(cfg: CfgNode, model: nn.Module | None = None) -> dict[str, Any]:
    """Evaluates the teacher on `cfg.DATASETS.TEST` and writes `OUTPUT_DIR/teacher/result.json`.

    Args:
        cfg: the student's configuration, which names the teacher.
        model: the teacher, if it is loaded already.

    Returns:
        Metrics as Detectron2's evaluators give them (of the first data set, or by name where there are several).
    """
    teacher_cfg = teacher_config(cfg)
    teacher_cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "teacher")
    teacher_cfg.DATALOADER.NUM_WORKERS = cfg.DATALOADER.NUM_WORKERS
    model = load_teacher(teacher_cfg) if model is None else model
    model.eval()
    results: dict[str, Any] = {}
    for name in cfg.DATASETS.TEST:
        logger.info("Evaluating the teacher on %s", name)
        loader = build_detection_test_loader(teacher_cfg, name)
        folder = folder_of(cfg, name, os.path.join(teacher_cfg.OUTPUT_DIR, "inference"))
        results[name] = inference_on_dataset(model, loader, build_evaluator(teacher_cfg, name, folder))
        if comm.is_main_process():
            print_csv_format(results[name])
    if len(results) == 1:
        results = next(iter(results.values()))
    if comm.is_main_process():
        params = sum(p.numel() for p in model.parameters())
        write_json(
            os.path.join(teacher_cfg.OUTPUT_DIR, "result.json"),
            {"metrics": results, "params": params, "weights": teacher_cfg.MODEL.WEIGHTS},
        )
    return results
