"""What the pictures of a report are made of: images of a dataset and what models predict for them, read once."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from d2kd.data.classes import class_names_of
from d2kd.data.images import image_problem, label_map_problem
from d2kd.evaluation.results import ModelResult, ResultError
from d2kd.evaluation.tasks import split_variant, task_named
from d2kd.visualization import LabelPredictions, read_classifications, read_predictions
from d2kd.visualization.classifications import Answers
from detectron2.data import DatasetCatalog, MetadataCatalog

logger = logging.getLogger(__name__)

Records = Sequence[dict[str, Any]]
T = TypeVar("T")


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
    """Reads a dataset and the predictions of models; None where there are none, or none that can be drawn.

    Raises:
        ResultError: predictions are damaged, or not of this dataset as it is now.
    """
    base = split_variant(task)[0]
    kind = {"classification": "classes", "sem_seg": "label_maps"}.get(base, "detections")
    known = {name: model for name, model in models.items() if model.predictions_file}
    if not known or task_named(task).predictions is None:
        return None
    records = list(DatasetCatalog.get(dataset_name))
    metadata = MetadataCatalog.get(dataset_name)
    of_image = "file_name" if kind == "label_maps" else "image_id"
    images = {record[of_image]: record for record in records}

    def read(path: str) -> Any:
        found: Any
        if kind == "classes":
            found = read_classifications(path)
        else:
            found = LabelPredictions(path, metadata) if kind == "label_maps" else read_predictions(path, metadata)
        other = next((image for image in found if image not in images), None)
        if other is not None and kind != "label_maps":
            raise ValueError(f"there is an image {other!r}, which {dataset_name} does not have")
        if other is not None:  # the images may have been moved
            logger.warning("%s has label maps that are not shown: %s has no image %s", path, dataset_name, other)
        if kind == "classes":
            _require_classes(found, images, class_names_of(dataset_name))
        return found

    predictions = {name: read_of(model, read) for name, model in known.items()}
    if kind != "classes":
        records.sort(key=lambda record: str(record[of_image]))
    return ReportInputs(kind, dataset_name, records, metadata, predictions, base == "segm")


def read_of(model: ModelResult, read: Callable[[str], T]) -> T:
    """Reads the predictions of a model, which has some.

    Raises:
        ResultError: `read` finds them damaged, or not of the dataset.
    """
    path = model.predictions_file
    assert path is not None
    try:
        return read(path)
    except (OSError, ValueError) as error:
        raise ResultError(
            f"Run {model.name!r}: {path} is damaged, or of another dataset ({error}). Evaluate the run anew "
            "(d2kd eval, with an OUTPUT_DIR), and compare that."
        ) from error


def _require_classes(answers: Answers, records: Mapping[Any, dict[str, Any]], names: Sequence[str] | None) -> None:
    for image, answer in answers.items():
        label = records[image]["label"]
        if answer.label != label:
            raise ValueError(f"the image {image!r} is of class {label} now, and was of class {answer.label}")
        if names is not None and not all(0 <= number < len(names) for number in answer.classes):
            raise ValueError(f"the image {image!r} has classes {list(answer.classes)}, and there are {len(names)}")


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
