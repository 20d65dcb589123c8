"""The pictures of a report: curves, detections, label maps, and what classifiers say."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from d2kd.data.classes import class_names_of
from d2kd.data.images import read_label_map
from d2kd.evaluation.results import ModelResult
from d2kd.evaluation.tasks import Metric
from d2kd.visualization import (
    NO_LABEL,
    classification_sheet,
    detection_grid,
    differing,
    label_map_grid,
    read_classifications,
    read_label_predictions,
    read_predictions,
    read_training_log,
    training_curves,
)
from d2kd.visualization.classifications import Answers
from detectron2.data import DatasetCatalog, MetadataCatalog


def draw_curves(models: Mapping[str, ModelResult], task: str, metric: Metric) -> bytes | None:
    """Loss and a metric over iterations, as PNG; None where no model has a log."""
    logs = {
        m.title: read_training_log(m.metrics_file, f"{m.metrics_scope or task}/{metric.name}")
        for m in models.values()
        if m.metrics_file
    }
    if not any(len(log.loss) or len(log.metric) for log in logs.values()):
        return None
    buffer = io.BytesIO()
    training_curves(logs, metric.axis).savefig(buffer, format="png")
    return buffer.getvalue()


def draw_detections(
    models: Mapping[str, ModelResult], dataset_name: str, metric: Metric, count: int, threshold: float
) -> bytes | None:
    """Images with the ground truth and each model's detections, as PNG; None where no model has any."""
    shown = [(model, model.predictions_file) for model in models.values() if model.predictions_file]
    if not shown or count < 1:
        return None
    records = sorted(DatasetCatalog.get(dataset_name), key=lambda record: str(record["image_id"]))
    metadata = MetadataCatalog.get(dataset_name)
    predictions = {_heading(model, metric): read_predictions(file, metadata) for model, file in shown}
    grid = detection_grid(evenly_spread(records, count), metadata.thing_classes, predictions, threshold)
    return _png(grid)


def draw_classifications(
    models: Mapping[str, ModelResult], dataset_name: str, metric: Metric, count: int
) -> bytes | None:
    """What each model says about images, as PNG: `count` that are not selected, and as many where they differ.

    None where no model has predictions.
    """
    said = {name: read_classifications(m.predictions_file) for name, m in models.items() if m.predictions_file}
    if not said or count < 1:
        return None
    records = list(DatasetCatalog.get(dataset_name))
    spread = evenly_spread(records, count)
    pair = (said["distilled"], said["baseline"]) if {"distilled", "baseline"} <= said.keys() else None
    apart = differing(records, list(said.values()), pair)
    shown = {record["image_id"] for record in spread}
    rest = [record for record in apart if record["image_id"] not in shown][:count]
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
    names = class_names_of(dataset_name) or _numbered(records, answers.values())
    return _png(classification_sheet(sections, names, answers, heading))


def draw_label_maps(models: Mapping[str, ModelResult], dataset_name: str, metric: Metric, count: int) -> bytes | None:
    """Images with the true and the models' label maps, and where these are wrong, as PNG; None where there are none."""
    shown = [(model, model.predictions_file) for model in models.values() if model.predictions_file]
    if not shown or count < 1:
        return None
    metadata = MetadataCatalog.get(dataset_name)
    records = evenly_spread(sorted(DatasetCatalog.get(dataset_name), key=lambda r: str(r["file_name"])), count)
    truths = []
    for record in records:
        truth = read_label_map(record["sem_seg_file_name"], dtype=np.int32)
        truths.append(np.where(truth == metadata.get("ignore_label"), NO_LABEL, truth))
    predictions = {_heading(model, metric): read_label_predictions(file, metadata) for model, file in shown}
    colors = metadata.get("stuff_colors")
    return _png(label_map_grid(records, truths, metadata.stuff_classes, predictions, colors))


def compare_images(models: Mapping[str, ModelResult]) -> dict[str, int] | None:
    """On how many images one student is right and the other wrong, from the predictions of classifiers.

    Returns:
        `images`, how many both have seen; `distilled` and `baseline`, on how many each alone is right. None where one
        of both has no predictions.
    """
    files = [models[name].predictions_file for name in ("distilled", "baseline") if name in models]
    if len(files) < 2 or None in files:
        return None
    distilled, baseline = (read_classifications(file) for file in files if file is not None)
    both = [(distilled[image], baseline[image]) for image in distilled if image in baseline]
    return {
        "images": len(both),
        "distilled": sum(ours.is_right and not theirs.is_right for ours, theirs in both),
        "baseline": sum(theirs.is_right and not ours.is_right for ours, theirs in both),
    }


def evenly_spread(records: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` of the records, at equal distances."""
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def _numbered(records: Iterable[dict[str, Any]], answers: Iterable[Answers]) -> list[str]:
    said = (label for of_model in answers for answer in of_model.values() for label in answer.classes)
    return [f"class {number}" for number in range(1 + max([*(record["label"] for record in records), *said]))]


def _heading(model: ModelResult, metric: Metric) -> str:
    value = model.metrics.get(metric.name, math.nan)
    return f"{model.title}: {f'{value:.1f}' if math.isfinite(value) else '-'} {metric.unit}"


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()
