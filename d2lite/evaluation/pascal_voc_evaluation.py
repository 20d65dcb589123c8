"""Average precision by the rules of the Pascal VOC challenges."""

import itertools
import logging
import os
import xml.etree.ElementTree as ElementTree
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np

from d2lite.data import MetadataCatalog
from d2lite.evaluation.evaluator import DatasetEvaluator
from d2lite.utils import comm
from d2lite.utils.file_io import PathManager

logger = logging.getLogger(__name__)

IOU_THRESHOLDS = tuple(range(50, 100, 5))  # percent


class PascalVOCDetectionEvaluator(DatasetEvaluator):
    """AP over IoU 0.5:0.05:0.95, AP50 and AP75 of boxes, in percent, on datasets in Pascal VOC's format.

    The average over 11 recall values is used for VOC 2007 and the area under the curve for later ones.
    """

    def __init__(self, dataset_name: str) -> None:
        """
        Args:
            dataset_name: a dataset of which the metadata has `dirname`, `split`, `year` and
                `thing_classes`.
        """
        metadata = MetadataCatalog.get(dataset_name)
        if metadata.year not in (2007, 2012):
            raise AssertionError(f"{dataset_name}: year is {metadata.year}, but must be 2007 or 2012")
        self._directory = metadata.dirname
        self._split = metadata.split
        self._class_names = metadata.thing_classes
        self._use_11_points = metadata.year == 2007
        self.reset()

    def reset(self) -> None:
        self._predictions: list[tuple[int, str, float, list[float]]] = []

    def process(self, inputs: Iterable[dict[str, Any]], outputs: Iterable[dict[str, Any]]) -> None:
        """
        Args:
            inputs: dicts with `image_id`, the stem of the image's file name.
            outputs: dicts with `instances` (`pred_boxes`, `scores`, `pred_classes`).
        """
        for entry, output in zip(inputs, outputs):
            found = output["instances"].to("cpu")
            # Precision and 1-based pixels as in the challenge's result files
            boxes = np.round(found.pred_boxes.tensor.numpy().astype(np.float64) + [1, 1, 0, 0], 1).tolist()
            scores = np.round(found.scores.numpy().astype(np.float64), 3).tolist()
            for label, score, box in zip(found.pred_classes.tolist(), scores, boxes):
                self._predictions.append((label, entry["image_id"], score, box))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Returns `{"bbox": {"AP", "AP50", "AP75"}}` on the main process."""
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return None
        objects = self._read_objects()
        by_class: list[list] = [[] for _ in self._class_names]
        for label, *detection in itertools.chain(*gathered):
            by_class[label].append(detection)
        precision = np.array(
            [
                class_average_precisions(
                    detections, {i: found.get(name, []) for i, found in objects.items()}, self._use_11_points
                )
                for name, detections in zip(self._class_names, by_class)
            ]
        )
        mean = np.nanmean(precision, axis=0) * 100
        results = OrderedDict(
            AP=float(mean.mean()),
            AP50=float(mean[IOU_THRESHOLDS.index(50)]),
            AP75=float(mean[IOU_THRESHOLDS.index(75)]),
        )
        logger.info("Evaluation results for bbox: %s", dict(results))
        return OrderedDict(bbox=results)

    def _read_objects(self) -> dict[str, dict[str, list[tuple[list[float], bool]]]]:
        """Per image and class: the boxes and whether they are difficult."""
        listing = os.path.join(self._directory, "ImageSets", "Main", f"{self._split}.txt")
        with PathManager.open(listing) as file:
            names = file.read().split()
        directory = os.path.join(self._directory, "Annotations")
        return {name: _read_annotation(os.path.join(directory, f"{name}.xml")) for name in names}


def class_average_precisions(
    detections: list[tuple[str, float, list[float]]],
    objects: dict[str, list[tuple[list[float], bool]]],
    use_11_points: bool,
) -> np.ndarray:
    """AP of one class at each of IOU_THRESHOLDS, in 0..1; nan where the class has no object.

    Args:
        detections: image, score and XYXY box (1-based, inclusive) of each detection.
        objects: for each image its boxes and whether they are difficult; detections of those are
            ignored.
        use_11_points: average the precision at 11 recall values, not the area under the curve.
    """
    num_objects = sum(not difficult for found in objects.values() for _, difficult in found)
    if num_objects == 0:
        return np.full(len(IOU_THRESHOLDS), np.nan)
    detections = sorted(detections, key=lambda d: -d[1])
    overlaps, matches, ignored = _best_matches(detections, objects)
    result = []
    for threshold in IOU_THRESHOLDS:
        close = overlaps > threshold / 100
        candidates = np.flatnonzero(close & ~ignored)
        true_positive = np.zeros(len(detections), dtype=bool)
        _, first = np.unique(matches[candidates], return_index=True)
        true_positive[candidates[first]] = True
        false_positive = ~true_positive & ~(close & ignored)
        hits, misses = np.cumsum(true_positive), np.cumsum(false_positive)
        precision = hits / np.maximum(hits + misses, 1)
        result.append(average_precision(hits / num_objects, precision, use_11_points))
    return np.array(result)


def average_precision(recall: np.ndarray, precision: np.ndarray, use_11_points: bool) -> float:
    """AP in 0..1 of a curve, (N,) and (N,), of detections in descending order of score."""
    if use_11_points:
        levels = np.arange(11) / 10
        return float(np.mean([precision[recall >= level].max(initial=0) for level in levels]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0) * envelope).sum())


def _read_annotation(path: str) -> dict[str, list[tuple[list[float], bool]]]:
    with PathManager.open(path) as file:
        tree = ElementTree.parse(file)
    objects: dict[str, list[tuple[list[float], bool]]] = {}
    for item in tree.findall("object"):
        box = [float(item.find("bndbox").find(side).text) for side in ("xmin", "ymin", "xmax", "ymax")]
        difficult = item.findtext("difficult", "0").strip() == "1"
        objects.setdefault(item.find("name").text, []).append((box, difficult))
    return objects


def _best_matches(
    detections: list[tuple[str, float, list[float]]], objects: dict[str, list[tuple[list[float], bool]]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each detection: its largest IoU, that object's number in the dataset, whether it is difficult."""
    overlaps, matches, ignored = (np.zeros(len(detections), dtype) for dtype in (float, int, bool))
    offsets = dict(zip(objects, itertools.accumulate((len(o) for o in objects.values()), initial=0)))
    for number, (image, _, box) in enumerate(detections):
        if not objects.get(image):
            continue
        iou = _iou(np.array(box), np.array([b for b, _ in objects[image]]))
        best = int(iou.argmax())
        overlaps[number], matches[number] = iou[best], offsets[image] + best
        ignored[number] = objects[image][best][1]
    return overlaps, matches, ignored


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of a box (4,) with others (N, 4), of which both corners are inside."""
    size = np.maximum(np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]) + 1, 0)
    shared = size.prod(1)
    area, other_areas = (box[2:] - box[:2] + 1).prod(), (others[:, 2:] - others[:, :2] + 1).prod(1)
    return shared / (area + other_areas - shared)
