"""What is known about trained models: read from their output directories, and compared."""

import contextlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from d2kd.errors import UserError
from d2kd.evaluation.tasks import first_task, metric_named, split_variant, task_named
from d2kd.files import file_checksum

logger = logging.getLogger(__name__)


class ResultError(UserError):
    """A run without the result that a report needs."""


LABELS = {
    "teacher": "teacher",
    "baseline": "baseline student",
    "inherit": "inherit only",
    "distilled": "distilled student",
}


@dataclass(frozen=True)
class Benchmark:
    """What `d2kd benchmark` has measured of a model."""

    milliseconds: float  # median of an image alone
    images_per_second: float | None = None  # in batches
    memory_bytes: int | None = None
    multiply_adds: int | None = None
    exported: Mapping[str, float] = field(default_factory=dict)  # milliseconds of its exported files, by name


@dataclass(frozen=True)
class ModelResult:
    """What a report says about one model. All but the name and the metrics may be unknown (None)."""

    name: str  # the key in report.json: "teacher", "baseline", "inherit", "distilled" or another
    metrics: Mapping[str, float]  # of one task, as from its evaluator, e.g. {"AP": 24.8, ...}; percent
    label: str = ""  # what tables and pictures call it; the name by default
    dataset: str | None = None  # that the metrics and the predictions are of
    curve_dataset: str | None = None  # that the metrics in metrics.json are of: evaluated while training
    metrics_file: str | None = None  # the training's metrics.json, for the curves
    metrics_scope: str | None = None  # what stands before the metrics there; the task by default
    predictions_file: str | None = None  # what the evaluator wrote, for the pictures
    wall_time_s: float | None = None
    teacher_time_s: float | None = None  # of it, what the teacher took
    iterations: int | None = None
    images_per_batch: int | None = None
    params: int | None = None
    seed: int | None = None
    config_file: str | None = None
    checkpoint: str | None = None
    benchmark: Benchmark | None = None
    runs: tuple["ModelResult", ...] = ()  # of several seeds, whose mean the metrics are; the rest is that of the first

    def by_seed(self, metric: str) -> dict[int, float]:
        """A metric of every seed, of this run alone where it is one; {} where the seed is not known."""
        known = [(run.seed, run.metrics.get(metric, math.nan)) for run in self.runs or (self,)]
        return {seed: value for seed, value in known if seed is not None}

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
        output_dir: holds `result.json` and, if they exist, `metrics.json`, `config.yaml`, the evaluator's predictions
            in `inference/`, `model_final.pth` and `benchmark.json`. What the run was evaluated on later, as
            benchmarks/accuracy.py and `d2kd eval` do, is found in `evaluation/`, if `model_final.pth` is the same.
        label: what the report calls the model.
        dataset_name: which results to take of a run that was evaluated on several datasets.
        task: which metrics to take.

    Raises:
        ResultError: there is no `result.json`, as the run has not finished, or it has no metrics of this task.
    """
    directory = Path(output_dir)
    evaluated = _evaluation_folder(directory, dataset_name)
    content = _read_result(name, evaluated, dataset_name)
    metrics, scope = _metrics_of(content, dataset_name, task)
    if not metrics:
        raise ResultError(
            f"Run {name!r}: {evaluated / 'result.json'} holds no metrics of the task {task!r}, but of "
            f"{', '.join(_by_task(content, dataset_name)) or 'none'}. Was the run evaluated (DATASETS.TEST), and on "
            "this task (--task)?"
        )

    def existing(relative: str, folder: Path = directory) -> str | None:
        return str(folder / relative) if (folder / relative).is_file() else None

    file, folder = task_named(task).predictions, f"inference{split_variant(task)[1]}"
    files = [f"{folder}/{dataset_name}/{file}", f"{folder}/{file}"] if file else []
    trained = content if evaluated == directory else _read(name, directory)
    return ModelResult(
        name=name,
        label=label,
        metrics={k: math.nan if v is None else v for k, v in metrics.items()},
        dataset=_evaluated_on(content, dataset_name),
        curve_dataset=_evaluated_on(trained, dataset_name),
        metrics_file=existing("metrics.json"),
        metrics_scope=scope if evaluated == directory else None,
        predictions_file=next(filter(None, (existing(path, evaluated) for path in files)), None),
        config_file=existing("config.yaml"),
        checkpoint=existing("model_final.pth"),
        benchmark=read_benchmark(existing("benchmark.json")),
        wall_time_s=trained.get("wall_time_s"),
        teacher_time_s=trained.get("teacher_time_s"),
        iterations=trained.get("iterations"),
        images_per_batch=trained.get("images_per_batch"),
        params=trained.get("params"),
        seed=trained.get("seed"),
    )


def choose_task(name: str, output_dir: str, dataset_name: str | None = None) -> str:
    """The task of a run that a report is about unless it is told: boxes, where they were evaluated.

    Raises:
        ResultError: there is no result, or no task in it.
    """
    directory = Path(output_dir)
    content = _read_result(name, _evaluation_folder(directory, dataset_name), dataset_name)
    task = first_task(_by_task(content, dataset_name))
    if task is None:
        raise ResultError(
            f"Run {name!r}: {directory / 'result.json'} holds no metrics. Was the run evaluated (DATASETS.TEST)?"
        )
    return task


def _read_result(name: str, directory: Path, dataset_name: str | None) -> dict[str, Any]:
    content = _read(name, directory)
    later = directory / "evaluation"
    stale = dataset_name in _datasets(later)
    hint = f" What {later} holds is of other weights than {directory / 'model_final.pth'}." if stale else ""
    _require_dataset(name, directory / "result.json", content.get("datasets"), dataset_name, hint)
    return content


def _read(name: str, directory: Path) -> dict[str, Any]:
    path = directory / "result.json"
    if not path.is_file():
        raise ResultError(f"Run {name!r}: {path} does not exist; the run has not finished, or is elsewhere.")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ResultError(f"Run {name!r}: {path} is no JSON ({error}).") from error
    sound = isinstance(content, dict) and isinstance(content.get("datasets") or [], list)
    if not sound or not isinstance(content.get("metrics"), dict):
        raise ResultError(f"Run {name!r}: {path} holds no metrics; it is not what a run of d2kd writes.")
    return content


def _evaluation_folder(directory: Path, dataset_name: str | None) -> Path:
    """Where the results on a dataset are: those that the run ended with, else those of a later evaluation of it."""
    later = directory / "evaluation"
    if dataset_name in _datasets(directory) or dataset_name not in _datasets(later):
        return directory
    return later if _is_evaluation_of(later, directory / "model_final.pth") else directory


def _is_evaluation_of(folder: Path, checkpoint: Path) -> bool:
    """Whether an evaluation is of the weights that a checkpoint has now: the run may have been trained on since."""
    content = _known(folder)
    if content.get("weights_checksum") and checkpoint.is_file():
        return content["weights_checksum"] == file_checksum(checkpoint)
    same = os.path.realpath(content.get("weights") or "") == os.path.realpath(checkpoint)
    # earlier versions have written no checksum
    return same and not (checkpoint.is_file() and checkpoint.stat().st_mtime > (folder / "result.json").stat().st_mtime)


def _evaluated_on(content: Mapping[str, Any], dataset_name: str | None) -> str | None:
    """The dataset that metrics of a result are of; None where that is not told."""
    datasets = content.get("datasets") or []
    return dataset_name if dataset_name in datasets else datasets[0] if len(datasets) == 1 else None


def _datasets(directory: Path) -> Sequence[str]:
    found = _known(directory).get("datasets")
    return found if isinstance(found, list) else ()


def _known(directory: Path) -> Mapping[str, Any]:
    """What a result tells; nothing where it is not to be read."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads((directory / "result.json").read_text())
        if isinstance(content, dict):
            return content
    return {}


def _metrics_of(content: Mapping[str, Any], dataset_name: str | None, task: str) -> tuple[Mapping[str, Any], str]:
    """Metrics of a task, and what stands before them in metrics.json; without any where there are none."""
    base, variant = split_variant(task)
    # of several datasets, the suffix of a variant goes to what stands first
    for path in ((dataset_name, task), (f"{dataset_name}{variant}", base), (task,)):
        found = content["metrics"]
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        if found and isinstance(found, Mapping):
            return found, "/".join(map(str, path))
    return {}, ""


def _by_task(content: Mapping[str, Any], dataset_name: str | None) -> Mapping[str, Any]:
    found = content["metrics"].get(dataset_name)
    return found if isinstance(found, Mapping) else content["metrics"]


def _require_dataset(
    name: str, path: Path, datasets: Sequence[str] | None, dataset_name: str | None, hint: str
) -> None:
    if datasets is not None and dataset_name is not None and dataset_name not in datasets:
        raise ResultError(
            f"Run {name!r}: {path} is an evaluation on {', '.join(datasets) or 'no dataset'}, not "
            f"on {dataset_name}.{hint} Evaluate it there (d2kd eval, with DATASETS.TEST and an OUTPUT_DIR), and "
            "compare that."
        )
    if datasets is not None and dataset_name is None and len(datasets) > 1:
        raise ResultError(
            f"Run {name!r}: {path} is an evaluation on {', '.join(datasets)}: say on which of them the runs are "
            "compared (--dataset)."
        )


def require_same_dataset(models: Iterable[ModelResult]) -> None:
    """Checks that the metrics of models are of the same dataset, as far as they tell.

    Raises:
        ResultError: they are not.
    """
    names = {run.dataset: model.name for model in models for run in model.runs or (model,) if run.dataset is not None}
    if len(names) > 1:
        (one, first), (other, second), *_ = names.items()
        raise ResultError(
            f"Run {first!r} was evaluated on {one}, and {second!r} on {other}: say on which dataset they are compared "
            "(--dataset), and evaluate there what has not been (d2kd eval, with DATASETS.TEST and an OUTPUT_DIR)."
        )


def told_apart(models: Mapping[str, ModelResult]) -> dict[str, ModelResult]:
    """The models, those that share a title with another one by their name too."""
    count = Counter(model.title for model in models.values())
    return {
        name: replace(model, label=f"{model.title} ({name})") if count[model.title] > 1 else model
        for name, model in models.items()
    }


def read_benchmark(path: str | None) -> Benchmark | None:
    """Reads a run's benchmark.json, as `d2kd benchmark` writes it; None, with a warning, where it tells nothing."""
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text())
        milliseconds = float(content["latency_ms"]["median"])
        exported = {name: float(x["latency_ms"]["median"]) for name, x in content.get("exported", {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s tells no median latency (%s: %s).", path, type(error).__name__, error)
        return None
    if not 0 < milliseconds < math.inf:
        logger.warning("%s tells no median latency (it is %s).", path, milliseconds)
        return None
    known = {key: content.get(key) for key in ("images_per_second", "memory_bytes", "multiply_adds")}
    return Benchmark(milliseconds, **known, exported=exported)


def compare(models: Mapping[str, ModelResult], metric: str = "AP") -> dict[str, Any]:
    """Gain and gap closure of the distilled student.

    Returns:
        `metric`; `gain` = distilled - baseline; `inherit_gain` = inherit - baseline; `gap_closure` = gain /
        (teacher - baseline), None where the teacher is not better than the baseline or a number is missing, which
        `gap_closure_note` explains; `equal_iterations`: whether both students saw as many images.
    """
    values = {name: model.metrics.get(metric, math.nan) for name, model in models.items()}
    teacher, baseline, inherit, distilled = (values.get(name, math.nan) for name in LABELS)
    gap_closure, note, words = None, "", metric_named(metric)
    missing = [n for n in ("teacher", "baseline", "distilled") if not math.isfinite(values.get(n, math.nan))]
    if missing:
        note = f"Gap closure is not defined: there is no {words.title} of the {', '.join(missing)}."
    elif teacher <= baseline:
        note = (
            f"Gap closure is not defined: the teacher ({teacher:.1f} {words.unit}) is not better than the baseline "
            f"({baseline:.1f} {words.unit})."
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
