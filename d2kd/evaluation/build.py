"""Chooses evaluators by the type that a dataset's metadata names."""

import logging
import os
from collections.abc import Sequence
from functools import partial

from d2kd.data.images import LabelRange, read_label_map
from d2kd.errors import UserError, did_you_mean
from d2kd.evaluation.classification import TOP, ClassificationEvaluator
from d2kd.evaluation.coco import CocoEvaluator
from d2kd.modeling.architectures import architecture_class
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, PascalVOCDetectionEvaluator, SemSegEvaluator

logger = logging.getLogger(__name__)

#: Values of `evaluator_type` in a dataset's metadata that `build_evaluator` knows.
TYPES = ("coco", "sem_seg", "pascal_voc", "cityscapes_instance", "cityscapes_sem_seg", "classification")


_COCO = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_SEM_SEG = ("mIoU", "fwIoU", "mACC", "pACC")
_OF_BOUNDARIES = ("BoundaryIoU", "min(IoU, B-Iou)")
#: With so many classes Detectron2 gives no metrics of boundaries.
_MOST_FOR_BOUNDARIES = 255
#: Metrics by type, and what stands before "-" and the name of a class in those of one class.
_METRICS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "coco": (_COCO, ["AP"]),
    "cityscapes_instance": (_COCO, ["AP"]),
    "pascal_voc": (("AP", "AP50", "AP75"), []),
    "sem_seg": (_SEM_SEG, ["IoU", *_OF_BOUNDARIES, "ACC"]),
    "cityscapes_sem_seg": (_SEM_SEG, ["IoU", *_OF_BOUNDARIES, "ACC"]),
    "classification": (("top1", "top5"), ["top1"]),
}


class EvaluatorError(UserError):
    """A dataset that d2kd has no evaluator for."""


def check_evaluators(cfg: CfgNode) -> None:
    """
    Raises:
        EvaluatorError: a registered dataset of `DATASETS.TEST` has no evaluator, or none for the model; or these will
            not give the metric of `TEST.BEST_CHECKPOINT`.
    """
    scored = architecture_class(cfg).EVALUATOR_TYPES
    for name in cfg.DATASETS.TEST:
        kind = _type_of(name) if name in DatasetCatalog else None
        if kind is not None and scored and kind not in scored:
            raise EvaluatorError(
                f"Dataset {name!r} of DATASETS.TEST has the evaluator type {kind!r}, and what a "
                f"{cfg.MODEL.META_ARCHITECTURE} predicts is scored by {', '.join(scored)}: leave it out."
            )
    metric, given = cfg.TEST.BEST_CHECKPOINT.METRIC, _metric_names(cfg)
    if metric and given is not None and metric not in given:
        hint = did_you_mean(metric, given) or f" It gives {', '.join(n for n in given if '-' not in n)}."
        raise EvaluatorError(f"TEST.BEST_CHECKPOINT.METRIC is {metric!r}, which the evaluation will not give.{hint}")


def _metric_names(cfg: CfgNode) -> list[str] | None:
    """Names of all metrics that the evaluations of a run give; None where that is not known."""
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork" or not all(n in DatasetCatalog for n in cfg.DATASETS.TEST):
        return None
    names = []
    for dataset in cfg.DATASETS.TEST:
        kind = _type_of(dataset)
        tasks = _tasks(cfg, kind)
        classes = MetadataCatalog.get(dataset).get("stuff_classes" if "sem_seg" in kind else "thing_classes")
        if classes is None:
            return None
        metrics, of_classes = _METRICS[kind]
        if kind == "classification" and len(classes) <= TOP:
            metrics = metrics[:1]
        if metrics == _COCO and len(classes) == 1:  # which has no metrics beside those of all
            of_classes = []
        if len(classes) >= _MOST_FOR_BOUNDARIES:
            of_classes = [name for name in of_classes if name not in _OF_BOUNDARIES]
        metrics = [*metrics, *(f"{name}-{c}" for name in of_classes for c in classes)]
        for variant in ["", *(["_EMA"] if cfg.SOLVER.EMA.ENABLED else [])]:
            # a variant's suffix goes to what stands first, see `evaluate_variant`
            several = len(cfg.DATASETS.TEST) > 1
            starts = [f"{dataset}{variant}/{t}" if several else f"{t}{variant}" for t in tasks]
            names += [f"{start}/{metric}" for start in starts for metric in metrics]
    return names


def _tasks(cfg: CfgNode, kind: str) -> list[str]:
    if kind == "classification":
        return [kind]
    if "sem_seg" in kind:
        return ["sem_seg"]
    return ["bbox", "segm"] if cfg.MODEL.MASK_ON else ["bbox"]


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
        meta = MetadataCatalog.get(dataset_name)
        read = partial(read_label_map, labels=LabelRange(len(meta.stuff_classes), meta.get("ignore_label")))
        return SemSegEvaluator(dataset_name, distributed=True, output_dir=output_folder, sem_seg_loading_fn=read)
    if kind == "classification":
        return ClassificationEvaluator(dataset_name, output_folder)
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
