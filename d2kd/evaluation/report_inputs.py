"""What the pictures of a report are made of: images of a dataset and what models predict for them, read once."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2kd.data.images import image_problem, label_map_problem
from d2kd.evaluation.results import ModelResult
from d2kd.evaluation.tasks import split_variant, task_named
from d2kd.visualization import LabelPredictions, read_classifications, read_predictions
from detectron2.data import DatasetCatalog, MetadataCatalog

logger = logging.getLogger(__name__)

Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class ReportInputs:
    """Images with predictions.

    The predictions of a model are what `read_predictions`, `LabelPredictions` or `read_classifications` gives.
    """

    kind: str  # "detections", "label_maps" or "classes"
    dataset_name: str
    records: Records  # all images of the dataset, in Detectron2's format
    metadata: Any
    predictions: Mapping[str, Any]  # by the name of the model; those without any are left out
    by_masks: bool = False  # detections are compared by their masks

    @property
    def pair(self) -> tuple[str, str] | None:
        """The two models that are compared: distilled and baseline, else the last and the first one; None of one."""
        names = list(self.predictions)
        if {"distilled", "baseline"} <= set(names):
            return "distilled", "baseline"
        return (names[-1], names[0]) if len(names) > 1 else None


def read_inputs(models: Mapping[str, ModelResult], dataset_name: str, task: str) -> ReportInputs | None:
    """Reads a dataset and the predictions of models; None where there are none, or none that can be drawn."""
    base = split_variant(task)[0]
    kind = {"classification": "classes", "sem_seg": "label_maps"}.get(base, "detections")
    files = {name: model.predictions_file for name, model in models.items() if model.predictions_file}
    if not files or task_named(task).predictions is None:
        return None
    records = list(DatasetCatalog.get(dataset_name))
    metadata = MetadataCatalog.get(dataset_name)
    if kind == "classes":
        said = {name: read_classifications(file) for name, file in files.items()}
        return ReportInputs(kind, dataset_name, records, metadata, said)
    if kind == "label_maps":
        records.sort(key=lambda record: str(record["file_name"]))
        maps = {name: LabelPredictions(file, metadata) for name, file in files.items()}
        return ReportInputs(kind, dataset_name, records, metadata, maps)
    records.sort(key=lambda record: str(record["image_id"]))
    found = {name: read_predictions(file, metadata) for name, file in files.items()}
    return ReportInputs(kind, dataset_name, records, metadata, found, base == "segm")


def problem_of(record: Mapping[str, Any], decode: bool = False) -> str | None:
    """Why an image, or its label map, cannot be drawn, in a sentence; None for nothing."""
    labels = record.get("sem_seg_file_name")
    return image_problem(record["file_name"], decode=decode) or (labels and label_map_problem(labels, decode=decode))


def readable(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those images that can be drawn; the log names the others."""
    kept = []
    for record in records:
        problem = problem_of(record, decode=True)
        if problem is None:
            kept.append(record)
        else:
            logger.warning("Left out of the pictures: %s", problem)
    return kept


def evenly_spread(records: Records, count: int) -> list[dict[str, Any]]:
    """At most `count` of the records, at equal distances."""
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]
