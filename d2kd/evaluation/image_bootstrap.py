"""How much the AP of two models differs over drawings of test images: an interval where there is one seed only.

It tells what other images of the same kind would change. What another training would change, by order of images and
first weights, is not in it and may be more: several seeds (`d2kd.evaluation.statistics`) tell more.
"""

import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2kd.data.coco import CocoFile, read_coco
from d2kd.evaluation.coco import NumberedCOCO
from d2kd.evaluation.results import ResultError
from d2kd.evaluation.statistics import CONFIDENCE, Estimate
from d2kd.visualization.detections import read_results

#: COCO's: recalls at which precision is read.
RECALLS = np.linspace(0.0, 1.0, 101)
#: Of an image, that COCO counts where nothing else is said.
DETECTIONS = 100


@dataclass(frozen=True)
class ClassMatches:
    """The detections of a class over all images, best first, at COCO's ten overlaps; D detections, I images."""

    images: np.ndarray  # int (D,), from 0
    right: np.ndarray  # bool (10, D): finds an object
    wrong: np.ndarray  # bool (10, D): neither that, nor within a crowd
    objects: np.ndarray  # int (I,): objects of each image that are to be found


def coco_matches(
    annotations: str, predictions: str, task: str = "bbox", detections: int = DETECTIONS
) -> list[ClassMatches]:
    """Matches detections with objects as COCO does, once for all drawings.

    Args:
        annotations: the dataset's file in COCO's format.
        predictions: what `CocoEvaluator` has written, `coco_instances_results.json`.
        task: "bbox" or "segm".
        detections: so many of an image count, the best ones: TEST.DETECTIONS_PER_IMAGE of the evaluation.

    Returns:
        The matches of every class, in the order of the classes.

    Raises:
        ResultError: predictions are damaged, or not of this dataset.
    """
    file = read_coco(annotations)
    truth = NumberedCOCO(file)
    try:
        found = read_results(predictions)
        _require_known(found, file, task)
    except (OSError, ValueError) as error:
        raise ResultError(f"{predictions} is damaged, or not of {annotations} ({error}). Evaluate anew.") from error
    if task == "segm":  # COCO takes the size of an object from its mask then
        found = [{key: value for key, value in entry.items() if key != "bbox"} for entry in found]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(found) if found else COCO(), task)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [detections]
        evaluation.evaluate()
    number = len(evaluation.params.imgIds)
    of_classes = [evaluation.evalImgs[start : start + number] for start in range(0, len(evaluation.evalImgs), number)]
    return [_of_class(images) for images in of_classes]


def _require_known(found: Sequence[dict[str, Any]], file: CocoFile, task: str) -> None:
    images, categories = {image["id"] for image in file.images}, {category["id"] for category in file.categories}
    for number, result in enumerate(found):
        if result["image_id"] not in images:
            raise ValueError(f"entry {number} is of image {result['image_id']!r}, which the dataset does not have")
        if result["category_id"] not in categories:
            raise ValueError(f"entry {number} is of category {result['category_id']}, which the dataset does not have")
        if task == "segm" and result.get("segmentation") is None:
            raise ValueError(f"entry {number} has no mask")


def _of_class(found: Sequence[dict[str, Any] | None]) -> ClassMatches:
    """Joins what COCO gives for each image, None where it has neither objects nor detections."""
    known = [(number, image) for number, image in enumerate(found) if image is not None]
    objects = np.zeros(len(found), int)
    objects[[number for number, _ in known]] = [int((~image["gtIgnore"].astype(bool)).sum()) for _, image in known]
    images = np.concatenate([np.full(len(image["dtScores"]), number) for number, image in known] or [np.zeros(0, int)])
    scores = np.concatenate([image["dtScores"] for _, image in known] or [np.zeros(0)])
    empty = [np.zeros((10, 0), bool)]
    matched = np.concatenate([image["dtMatches"] != 0 for _, image in known] or empty, axis=1)
    ignored = np.concatenate([image["dtIgnore"] != 0 for _, image in known] or empty, axis=1)
    order = np.argsort(-scores, kind="stable")
    right, wrong = matched & ~ignored, ~matched & ~ignored
    return ClassMatches(images[order], right[:, order], wrong[:, order], objects)


def average_precision(matches: Sequence[ClassMatches], times: np.ndarray) -> float:
    """COCO's AP in percent, as if each image were in the dataset several times, or not.

    Args:
        matches: of every class.
        times: int (I,), how often each image counts.

    Returns:
        The mean over ten overlaps and the classes that have an object; NaN where none has.
    """
    values = [_class_precision(of_class, times) for of_class in matches if of_class.objects @ times > 0]
    return 100 * float(np.mean(values)) if values else math.nan


def _class_precision(of_class: ClassMatches, times: np.ndarray) -> float:
    weights = times[of_class.images]
    right = np.cumsum(of_class.right * weights, axis=1, dtype=float)
    wrong = np.cumsum(of_class.wrong * weights, axis=1, dtype=float)
    precision = right / np.maximum(right + wrong, np.finfo(float).eps)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # the best one at this recall or a higher one
    best = np.concatenate([best, np.zeros((len(best), 1))], axis=1)  # recalls that are not reached
    recall = right / (of_class.objects @ times)
    places = [np.searchsorted(row, RECALLS, side="left") for row in recall]
    return float(np.mean([row[at] for row, at in zip(best, places)]))


def bootstrap_difference(
    matches: Sequence[ClassMatches], reference: Sequence[ClassMatches], drawings: int = 500, seed: int = 0
) -> Estimate | None:
    """AP of a model minus that of another one on the same images, with the percentile interval over drawn images.

    Args:
        matches: of the model.
        reference: of the other one, for the same dataset.
        drawings: so many times, as many images as there are, are drawn with replacement, the same ones for both.
        seed: of the drawings.

    Returns:
        None where there is no object.
    """
    count = len(matches[0].objects) if matches else 0
    once = np.ones(count, int)
    difference = average_precision(matches, once) - average_precision(reference, once)
    if not math.isfinite(difference):
        return None
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=drawings)
    drawn = [average_precision(matches, row) - average_precision(reference, row) for row in times]
    low, high = np.nanquantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(difference, float(low), float(high), 1, "images")
