"""Chooses evaluators by the type that a dataset's metadata names."""

import logging
import os
from typing import Optional

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, SemSegEvaluator

logger = logging.getLogger(__name__)


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None) -> DatasetEvaluator:
    """The evaluator of a dataset.

    Cityscapes is evaluated as COCO and other label maps are: its own benchmark has another AP, and the same IoU.

    Args:
        cfg: gives the output directory and the number of detections an image.
        dataset_name: a registered dataset with `evaluator_type` in its metadata.
        output_folder: for predictions; `OUTPUT_DIR/inference` by default.

    Raises:
        ValueError: d2kd has no evaluator for that type.
    """
    output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind == "cityscapes_instance":
        logger.warning("%s: AP is COCO's, not that of the Cityscapes benchmark.", dataset_name)
    if kind in ("coco", "cityscapes_instance"):
        return COCOEvaluator(dataset_name, output_dir=output_folder, max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE)
    if kind in ("sem_seg", "cityscapes_sem_seg"):
        return SemSegEvaluator(dataset_name, distributed=True, output_dir=output_folder)
    if kind == "pascal_voc":
        from detectron2.evaluation import PascalVOCDetectionEvaluator

        return PascalVOCDetectionEvaluator(dataset_name)
    raise ValueError(
        f"Dataset {dataset_name!r} has the evaluator type {kind!r}; d2kd evaluates coco, sem_seg, pascal_voc, "
        "cityscapes_instance and cityscapes_sem_seg."
    )
