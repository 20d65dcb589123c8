"""What is known about trained models: read from their output directories, and compared."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2kd.errors import UserError


class ResultError(UserError):
    """A run without the result that a report needs."""


LABELS = {
    "teacher": "teacher",
    "baseline": "baseline student",
    "inherit": "inherit only",
    "distilled": "distilled student",
}


@dataclass(frozen=True)
class ModelResult:
    """What a report says about one model. All but the name and the metrics may be unknown (None)."""

    name: str  # the key in report.json: "teacher", "baseline", "inherit", "distilled" or another
    metrics: Mapping[str, float]  # of one task, as from COCOEvaluator, e.g. {"AP": 24.8, ...}; percent
    label: str = ""  # what tables and pictures call it; the name by default
    metrics_file: str | None = None  # the training's metrics.json, for the curves
    predictions_file: str | None = None  # coco_instances_results.json, for the pictures
    wall_time_s: float | None = None
    iterations: int | None = None
    images_per_batch: int | None = None
    params: int | None = None
    seed: int | None = None
    config_file: str | None = None
    checkpoint: str | None = None

    @property
    def title(self) -> str:
        """What tables and pictures call it."""
        return self.label or LABELS.get(self.name, self.name)

    @property
    def images_seen(self) -> int | None:
        """Training images, counted with repetition."""
        if self.iterations is None or self.images_per_batch is None:
            return None
        return self.iterations * self.images_per_batch


def load_result(
    name: str, output_dir: str, label: str = "", dataset_name: str | None = None, task: str = "bbox"
) -> ModelResult:
    """Reads the OUTPUT_DIR of a training run.

    Args:
        name: "teacher", "baseline", "inherit", "distilled" or another.
        output_dir: holds `result.json` and, if they exist, `metrics.json`, `config.yaml`,
            `inference/coco_instances_results.json` and `model_final.pth`.
        label: what the report calls the model.
        dataset_name: which results to take of a run that was evaluated on several datasets.
        task: which metrics to take.

    Raises:
        ResultError: there is no `result.json`, as the run has not finished, or it has no metrics of this task.
    """
    directory = Path(output_dir)
    path = directory / "result.json"
    if not path.is_file():
        raise ResultError(f"Run {name!r}: {path} does not exist; the run has not finished, or is elsewhere.")
    try:
        content = json.loads(path.read_text())
        _require_dataset(name, directory, content, dataset_name)
        metrics = content["metrics"]
        metrics = metrics.get(dataset_name, metrics)[task]
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ResultError(
            f"Run {name!r}: {path} holds no metrics of the task {task!r} ({error!r}). Was the run evaluated "
            "(DATASETS.TEST), and on this task (--task)?"
        ) from error

    def existing(relative: str) -> str | None:
        return str(directory / relative) if (directory / relative).is_file() else None

    return ModelResult(
        name=name,
        label=label,
        metrics={k: math.nan if v is None else v for k, v in metrics.items()},
        metrics_file=existing("metrics.json"),
        predictions_file=existing(f"inference/{dataset_name}/coco_instances_results.json")
        or existing("inference/coco_instances_results.json"),
        config_file=existing("config.yaml"),
        checkpoint=existing("model_final.pth"),
        **{k: content.get(k) for k in ("wall_time_s", "iterations", "images_per_batch", "params", "seed")},
    )


def _require_dataset(name: str, directory: Path, content: Mapping[str, Any], dataset_name: str | None) -> None:
    datasets = content.get("datasets")
    if dataset_name is not None and datasets is not None and dataset_name not in datasets:
        raise ResultError(
            f"Run {name!r}: {directory / 'result.json'} is an evaluation on {', '.join(datasets) or 'no dataset'}, not "
            f"on {dataset_name}. Evaluate it there (d2kd eval, with DATASETS.TEST and an OUTPUT_DIR), and compare that."
        )


def compare(models: Mapping[str, ModelResult], metric: str = "AP") -> dict[str, Any]:
    """Gain and gap closure of the distilled student.

    Returns:
        `metric`; `gain` = distilled - baseline; `inherit_gain` = inherit - baseline; `gap_closure` = gain /
        (teacher - baseline), None where the teacher is not better than the baseline or a number is missing, which
        `gap_closure_note` explains; `equal_iterations`: whether both students saw as many images.
    """
    values = {name: model.metrics.get(metric, math.nan) for name, model in models.items()}
    teacher, baseline, inherit, distilled = (values.get(name, math.nan) for name in LABELS)
    gap_closure, note = None, ""
    missing = [n for n in ("teacher", "baseline", "distilled") if not math.isfinite(values.get(n, math.nan))]
    if missing:
        note = f"Gap closure is not defined: there is no {metric} of the {', '.join(missing)}."
    elif teacher <= baseline:
        note = (
            f"Gap closure is not defined: the teacher ({teacher:.1f} {metric}) is not better than the baseline "
            f"({baseline:.1f} {metric})."
        )
    else:
        gap_closure = (distilled - baseline) / (teacher - baseline)
    seen = [models[name].images_seen for name in ("baseline", "distilled") if name in models]
    return {
        "metric": metric,
        "gain": _or_none(distilled - baseline),
        "inherit_gain": _or_none(inherit - baseline),
        "gap_closure": gap_closure,
        "gap_closure_note": note,
        "equal_iterations": seen[0] == seen[1] if len(seen) == 2 and None not in seen else None,
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
