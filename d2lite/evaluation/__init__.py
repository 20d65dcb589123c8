"""Evaluation: the loop over a dataset, and the metrics of COCO, Pascal VOC and semantic segmentation."""

from d2lite.evaluation.coco_evaluation import COCOEvaluator, instances_to_coco_json
from d2lite.evaluation.evaluator import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
)
from d2lite.evaluation.pascal_voc_evaluation import PascalVOCDetectionEvaluator
from d2lite.evaluation.sem_seg_evaluation import SemSegEvaluator
from d2lite.evaluation.testing import flatten_results_dict, print_csv_format, verify_results

__all__ = [
    "COCOEvaluator",
    "DatasetEvaluator",
    "DatasetEvaluators",
    "PascalVOCDetectionEvaluator",
    "SemSegEvaluator",
    "flatten_results_dict",
    "inference_context",
    "inference_on_dataset",
    "instances_to_coco_json",
    "print_csv_format",
    "verify_results",
]
