"""Semantic segmentation metrics: IoU, boundary IoU and accuracy."""

import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from PIL import Image

from d2lite.data import DatasetCatalog, MetadataCatalog
from d2lite.evaluation.evaluator import DatasetEvaluator
from d2lite.utils import comm
from d2lite.utils.file_io import PathManager
from d2lite.utils.output import complete_file, write_json

try:
    import cv2
except ImportError:
    cv2 = None

logger = logging.getLogger(__name__)

BOUNDARY_RATIO = 0.02  # width of a boundary as a share of the image diagonal


def load_image_into_numpy_array(filename: str, copy: bool = False, dtype: np.dtype | str | None = None) -> np.ndarray:
    """Reads a label map (H, W) of class ids."""
    with PathManager.open(filename, "rb") as file:
        array = np.asarray(Image.open(file), dtype=dtype)
    return array.copy() if copy else array


class SemSegEvaluator(DatasetEvaluator):
    """Mean and frequency-weighted IoU, boundary IoU (where OpenCV is installed) and accuracy, in percent."""

    def __init__(
        self,
        dataset_name: str,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        sem_seg_loading_fn: Callable[..., np.ndarray] = load_image_into_numpy_array,
        num_classes: int | None = None,
        ignore_label: int | None = None,
    ) -> None:
        """
        Args:
            dataset_name: a registered dataset with `sem_seg_file_name` in its records and
                `stuff_classes` and `ignore_label` in its metadata.
            distributed: gather from all processes, and evaluate on the main one.
            output_dir: where `sem_seg_predictions.json` and `sem_seg_evaluation.pth` go. None writes
                nothing.
            sem_seg_loading_fn: reads a label map; called with the file name and `dtype`.
            num_classes, ignore_label: for compatibility; the metadata decides.
        """
        self._distributed = distributed
        self._output_dir = output_dir
        self._load = sem_seg_loading_fn
        self._label_file = {
            record["file_name"]: record["sem_seg_file_name"] for record in DatasetCatalog.get(dataset_name)
        }
        metadata = MetadataCatalog.get(dataset_name)
        self._class_names = metadata.stuff_classes
        self._num_classes = len(self._class_names)
        if num_classes not in (None, self._num_classes):
            raise AssertionError(f"num_classes is {num_classes}, but {dataset_name} has {self._num_classes}")
        self._ignore_label = ignore_label if ignore_label is not None else metadata.get("ignore_label")
        to_contiguous = metadata.get("stuff_dataset_id_to_contiguous_id") or {}
        self._to_dataset_id = {contiguous: original for original, contiguous in to_contiguous.items()}
        self._with_boundaries = cv2 is not None and self._num_classes <= np.iinfo(np.uint8).max
        if not self._with_boundaries:
            logger.warning("Boundary IoU is left out: it needs OpenCV, and at most 255 classes.")
        self.reset()

    def reset(self) -> None:
        size = self._num_classes + 1  # the last row and column count ignored pixels
        self._conf_matrix = np.zeros((size, size), dtype=np.int64)
        self._b_conf_matrix = np.zeros((size, size), dtype=np.int64)
        self._predictions: list[dict[str, Any]] = []

    def process(self, inputs: Iterable[dict[str, Any]], outputs: Iterable[dict[str, Any]]) -> None:
        """
        Args:
            inputs: dicts with `file_name`.
            outputs: dicts with `sem_seg`, the scores (classes, H, W) at the size of the label map.
        """
        for entry, output in zip(inputs, outputs):
            pred = output["sem_seg"].argmax(dim=0).cpu().numpy().astype(np.int64)
            gt = np.array(self._load(self._label_file[entry["file_name"]], dtype=np.int64))
            gt[gt == self._ignore_label] = self._num_classes
            self._check_labels(pred, gt, entry["file_name"])
            self._conf_matrix += self._count_pairs(pred, gt)
            if self._with_boundaries:
                self._b_conf_matrix += self._count_pairs(label_boundary(pred), label_boundary(gt))
            self._predictions.extend(self.encode_json_sem_seg(pred, entry["file_name"]))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Returns `{"sem_seg": metrics}`; nan for the classes that the ground truth does not have."""
        confusion, boundary, predictions = self._conf_matrix, self._b_conf_matrix, self._predictions
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather((confusion, boundary, predictions), dst=0)
            if not comm.is_main_process():
                return None
            confusion, boundary = sum(g[0] for g in gathered), sum(g[1] for g in gathered)
            predictions = list(itertools.chain(*(g[2] for g in gathered)))
        results = self._metrics(confusion, boundary)
        if self._output_dir:
            write_json(os.path.join(self._output_dir, "sem_seg_predictions.json"), predictions)
            with complete_file(os.path.join(self._output_dir, "sem_seg_evaluation.pth")) as path:
                torch.save(results, path)
        logger.info("%s", results)
        return OrderedDict(sem_seg=results)

    def encode_json_sem_seg(self, sem_seg: np.ndarray, input_file_name: str) -> list[dict[str, Any]]:
        """Turns a predicted label map (H, W) into one RLE mask per class, in COCO's stuff format."""
        results = []
        for label in np.unique(sem_seg).tolist():
            rle = mask_util.encode(np.asfortranarray(sem_seg == label, dtype=np.uint8))
            results.append(
                {
                    "file_name": input_file_name,
                    "category_id": self._to_dataset_id.get(label, label),
                    "segmentation": {**rle, "counts": rle["counts"].decode("ascii")},
                }
            )
        return results

    def _check_labels(self, pred: np.ndarray, gt: np.ndarray, file_name: str) -> None:
        if pred.shape != gt.shape:
            raise ValueError(f"{file_name}: prediction is {pred.shape}, but its label map is {gt.shape}")
        if gt.min() < 0 or gt.max() > self._num_classes:
            raise ValueError(
                f"{self._label_file[file_name]}: labels go from {gt.min()} to {gt.max()}, but there are "
                f"{self._num_classes} classes and the ignored label is {self._ignore_label}"
            )

    def _count_pairs(self, pred: np.ndarray, gt: np.ndarray) -> np.ndarray:
        size = self._num_classes + 1
        return np.bincount((size * pred + gt).reshape(-1), minlength=size * size).reshape(size, size)

    def _metrics(self, confusion: np.ndarray, boundary: np.ndarray) -> dict[str, float]:
        iou, gt_pixels, hits = _iou(confusion)
        present = gt_pixels > 0
        iou[~present] = np.nan
        accuracy = np.where(present, hits / np.maximum(gt_pixels, 1), np.nan)
        weights = gt_pixels / max(gt_pixels.sum(), 1)
        results = OrderedDict(mIoU=_mean(iou[present]), fwIoU=float((iou[present] * weights[present]).sum()) * 100)
        boundary_iou = _iou(boundary)[0]
        for name, value, edge in zip(self._class_names, iou, boundary_iou):
            results[f"IoU-{name}"] = float(value) * 100
            if self._with_boundaries:
                results[f"BoundaryIoU-{name}"] = float(edge) * 100
                results[f"min(IoU, B-Iou)-{name}"] = float(np.minimum(value, edge)) * 100
        results["mACC"] = _mean(accuracy[present])
        results["pACC"] = float(hits.sum() / gt_pixels.sum()) * 100 if present.any() else float("nan")
        for name, value in zip(self._class_names, accuracy):
            results[f"ACC-{name}"] = float(value) * 100
        return results


def label_boundary(labels: np.ndarray) -> np.ndarray:
    """The boundary of a label map (H, W), after Boundary IoU (Cheng et al., arXiv:2103.16562).

    A pixel gets its label less the smallest label nearby; the outside counts as 0. That is zero away from
    boundaries. A class is separated only where it borders on class 0, but this is what Detectron2 reports.
    """
    height, width = labels.shape
    distance = max(1, int(round(BOUNDARY_RATIO * np.hypot(height, width))))
    padded = cv2.copyMakeBorder(labels.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1]
    return labels - eroded


def _iou(confusion: np.ndarray) -> tuple:
    """Per class: IoU (nan where there is no pixel), true pixels, true pixels found. Rows are predictions."""
    hits = confusion.diagonal()[:-1].astype(float)
    gt_pixels = confusion[:-1, :-1].sum(0).astype(float)
    union = gt_pixels + confusion[:-1, :-1].sum(1) - hits
    return np.where(union > 0, hits / np.maximum(union, 1), np.nan), gt_pixels, hits


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) * 100 if values.size else float("nan")
