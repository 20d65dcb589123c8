"""The pictures of a report: curves, detections, label maps, and what classifiers say."""

import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

import cv2
import numpy as np

from d2kd.data.classes import class_names_of
from d2kd.data.images import read_label_map
from d2kd.evaluation.report_inputs import ReportInputs, evenly_spread, read_of, readable
from d2kd.evaluation.results import ModelResult, ResultError
from d2kd.evaluation.tasks import Metric
from d2kd.visualization import (
    NO_LABEL,
    Trade,
    TrainingLog,
    classification_sheet,
    detection_grid,
    differing,
    label_map_grid,
    read_classifications,
    read_training_log,
    trade_off,
    training_curves,
)
from d2kd.visualization.classifications import Answers


def read_logs(models: Mapping[str, ModelResult], task: str, metric: Metric) -> dict[str, TrainingLog]:
    """Loss and a metric over iterations of the models that have a log, by name."""
    return {
        name: read_training_log(m.metrics_file, f"{m.metrics_scope or task}/{metric.name}")
        for name, m in models.items()
        if m.metrics_file
    }


def draw_curves(models: Mapping[str, ModelResult], logs: Mapping[str, TrainingLog], metric: Metric) -> bytes | None:
    """The curves of `read_logs` as PNG; None where no model has any."""
    if not any(len(log.loss) or len(log.metric) for log in logs.values()):
        return None
    buffer = io.BytesIO()
    training_curves({models[name].title: log for name, log in logs.items()}, metric.axis).savefig(buffer, format="png")
    return buffer.getvalue()


def draw_trade_off(models: Mapping[str, ModelResult], metric: Metric) -> bytes | None:
    """The metric against milliseconds of the models that were measured, and of their exported files, as PNG.

    None where none was.
    """
    points = []
    for model in models.values():
        value = model.metrics.get(metric.name, math.nan)
        if model.benchmark is not None and math.isfinite(value):
            points.append(Trade(model.title, model.benchmark.milliseconds, value, model.name))
            for file, milliseconds in model.benchmark.exported.items():
                points.append(Trade(file, milliseconds, value, model.name, hollow=True))
    if not points:
        return None
    buffer = io.BytesIO()
    trade_off(points, metric.axis).savefig(buffer, format="png")
    return buffer.getvalue()


def draw_detections(
    models: Mapping[str, ModelResult], inputs: ReportInputs, metric: Metric, count: int, threshold: float
) -> bytes | None:
    """Images with the ground truth and each model's detections, as PNG; None without an image."""
    records = readable(evenly_spread(inputs.records, count))
    if not records:
        return None
    found = {_heading(models[name], metric): of_model for name, of_model in inputs.predictions.items()}
    classes = inputs.metadata.thing_classes
    return _png(detection_grid(records, classes, found, threshold, by_masks=inputs.by_masks))


def draw_classifications(
    models: Mapping[str, ModelResult], inputs: ReportInputs, metric: Metric, count: int
) -> bytes | None:
    """What each model says about images, as PNG: `count` that are not selected, and as many where they differ.

    None without an image.
    """
    said, records = inputs.predictions, inputs.records
    spread = readable(evenly_spread(records, count))
    if not spread:
        return None
    pair = (said["distilled"], said["baseline"]) if {"distilled", "baseline"} <= said.keys() else None
    apart = differing(records, list(said.values()), pair)
    shown = {record["image_id"] for record in spread}
    rest = readable([record for record in apart if record["image_id"] not in shown][:count])
    compared = (
        f"{models['distilled'].title} and {models['baseline'].title} give the true class the most different scores"
        if pair
        else "the true class has the most different scores"
    )
    sections = {f"{len(spread)} of {len(records):,} images, evenly spread over the dataset and not selected": spread}
    if rest:
        sections[f"{len(rest)} more of the {len(apart):,} images where the models differ: those where {compared}"] = (
            rest
        )
    answers = {models[name].title: of_model for name, of_model in said.items()}
    heading = "; ".join(_heading(models[name], metric) for name in said)
    return _png(classification_sheet(sections, classes_said(inputs), answers, heading))


def draw_label_maps(
    models: Mapping[str, ModelResult], inputs: ReportInputs, metric: Metric, count: int
) -> bytes | None:
    """Images with the true and the models' label maps, and where these are wrong, as PNG; None without an image.

    Raises:
        ResultError: a label map is not of the size of its image.
    """
    known = [record for record in inputs.records if "sem_seg_file_name" in record]
    records = readable(evenly_spread(known, count))
    if not records:
        return None
    truths = [true_labels(record, inputs.metadata) for record in records]
    for name, of_model in inputs.predictions.items():
        for record, truth in zip(records, truths):
            _require_size(models[name], record, of_model.get(record["file_name"]), truth)
    maps = {_heading(models[name], metric): of_model for name, of_model in inputs.predictions.items()}
    colors = inputs.metadata.get("stuff_colors")
    return _png(label_map_grid(records, truths, inputs.metadata.stuff_classes, maps, colors))


def _require_size(model: ModelResult, record: Mapping[str, Any], labels: np.ndarray | None, truth: np.ndarray) -> None:
    if labels is not None and labels.shape != truth.shape:
        (height, width), (true_height, true_width) = labels.shape, truth.shape
        raise ResultError(
            f"Run {model.name!r}: {model.predictions_file} has a label map of {width}x{height} for "
            f"{record['file_name']}, which is {true_width}x{true_height}. Evaluate the run anew (d2kd eval, with an "
            "OUTPUT_DIR), and compare that."
        )


def true_labels(record: Mapping[str, Any], metadata: Any) -> np.ndarray:
    """The true label map of an image, int (H, W), with `NO_LABEL` for pixels that do not count."""
    labels = read_label_map(record["sem_seg_file_name"], dtype=np.int32)
    return np.where(labels == metadata.get("ignore_label"), NO_LABEL, labels)


def classes_said(inputs: ReportInputs) -> list[str]:
    """The names of all classes that images have or models say; numbered ones where the dataset has no names."""
    return class_names_of(inputs.dataset_name) or _numbered(inputs.records, inputs.predictions.values())


def compare_images(models: Mapping[str, ModelResult]) -> dict[str, int] | None:
    """On how many images one student is right and the other wrong, from the predictions of classifiers.

    Returns:
        `images`, how many both have seen; `distilled` and `baseline`, on how many each alone is right. None where one
        of both has no predictions.

    Raises:
        ResultError: predictions are damaged.
    """
    students = [models[name] for name in ("distilled", "baseline") if name in models]
    if len(students) < 2 or not all(student.predictions_file for student in students):
        return None
    distilled, baseline = (read_of(student, read_classifications) for student in students)
    both = [(distilled[image], baseline[image]) for image in distilled if image in baseline]
    return {
        "images": len(both),
        "distilled": sum(ours.is_right and not theirs.is_right for ours, theirs in both),
        "baseline": sum(theirs.is_right and not ours.is_right for ours, theirs in both),
    }


def _numbered(records: Iterable[dict[str, Any]], answers: Iterable[Answers]) -> list[str]:
    said = (label for of_model in answers for answer in of_model.values() for label in answer.classes)
    return [f"class {number}" for number in range(1 + max([*(record["label"] for record in records), *said]))]


def _heading(model: ModelResult, metric: Metric) -> str:
    value = model.metrics.get(metric.name, math.nan)
    return f"{model.title}: {f'{value:.1f}' if math.isfinite(value) else '-'} {metric.unit}"


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()
