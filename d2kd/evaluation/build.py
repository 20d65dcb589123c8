"""Chooses evaluators by the type that a dataset's metadata names."""

import logging
import os

from d2kd.data.images import read_label_map
from d2kd.errors import UserError
from d2kd.evaluation.coco import CocoEvaluator
from d2kd.modeling.architectures import architecture_class
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, PascalVOCDetectionEvaluator, SemSegEvaluator

logger = logging.getLogger(__name__)

#: Values of `evaluator_type` in a dataset's metadata that `build_evaluator` knows.
TYPES = ("coco", "sem_seg", "pascal_voc", "cityscapes_instance", "cityscapes_sem_seg")


class EvaluatorError(UserError):
    """A dataset that d2kd has no evaluator for."""


def check_evaluators(cfg: CfgNode) -> None:
    """Raises EvaluatorError if a registered dataset of `DATASETS.TEST` has no evaluator, or none for the model."""
    scored = architecture_class(cfg).EVALUATOR_TYPES
    for name in cfg.DATASETS.TEST:
        kind = _type_of(name) if name in DatasetCatalog else None
        if kind is not None and scored and kind not in scored:
            raise EvaluatorError(
                f"Dataset {name!r} of DATASETS.TEST has the evaluator type {kind!r}, and what a "
                f"{cfg.MODEL.META_ARCHITECTURE} predicts is scored by {', '.join(scored)}: leave it out."
            )


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
    """The evaluator of a dataset.

    Cityscapes is evaluated as COCO and other label maps are: its own benchmark has another AP, and the same IoU.

    Args:
        cfg: gives the output directory and the number of detections per image.
        dataset_name: a registered dataset with `evaluator_type` in its metadata.
        output_folder: for predictions; `OUTPUT_DIR/inference` by default, a folder in it for each of several test sets.

    Raises:
        EvaluatorError: d2kd has no evaluator for that type.
    """
    output_folder = output_folder or folder_of(cfg, dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference"))
    kind = _type_of(dataset_name)
    if kind == "cityscapes_instance":
        logger.warning("%s: AP is COCO's, not that of the Cityscapes benchmark.", dataset_name)
    if kind in ("coco", "cityscapes_instance"):
        return CocoEvaluator(dataset_name, output_dir=output_folder, max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE)
    if kind in ("sem_seg", "cityscapes_sem_seg"):
        return SemSegEvaluator(
            dataset_name, distributed=True, output_dir=output_folder, sem_seg_loading_fn=read_label_map
        )
    return PascalVOCDetectionEvaluator(dataset_name)


def folder_of(cfg: CfgNode, dataset_name: str, folder: str) -> str:
    """Where in a folder the predictions on a dataset go: several test sets would overwrite each other's files."""
    return os.path.join(folder, dataset_name) if len(cfg.DATASETS.TEST) > 1 else folder


def _type_of(dataset_name: str) -> str:
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in TYPES:
        raise EvaluatorError(
            f"Dataset {dataset_name!r} of DATASETS.TEST has the evaluator type {kind!r}, and d2kd evaluates "
            f"{', '.join(TYPES)}. Set evaluator_type in its metadata, override DistillTrainer.build_evaluator, or "
            "leave it out of DATASETS.TEST."
        )
    return kind
