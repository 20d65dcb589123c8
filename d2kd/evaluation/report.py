"""The comparison of a teacher, a baseline student and distilled students: tables, curves and pictures."""

import io
import json
import logging
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2kd.runtime import RUNTIME
from d2kd.visualization import detection_grid, read_predictions, read_training_log, training_curves

logger = logging.getLogger(__name__)

LABELS = {
    "teacher": "teacher",
    "baseline": "baseline student",
    "inherit": "inherit only",
    "distilled": "distilled student",
}
METRICS = ("AP", "AP50", "AP75")


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
        known = self.iterations is not None and self.images_per_batch is not None
        return self.iterations * self.images_per_batch if known else None


@dataclass(frozen=True)
class ReportContext:
    """What a report says beside its numbers."""

    title: str = "Comparison"
    dataset_name: str = ""
    statement: str = ""
    commands: Sequence[str] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    score_threshold: float = 0.3


def write_report(
    output_dir: str,
    models: Mapping[str, ModelResult],
    *,
    dataset_name: str | None = None,
    title: str = "Comparison",
    statement: str = "",
    commands: Sequence[str] = (),
    environment: Mapping[str, Any] | None = None,
    metrics: Sequence[str] = METRICS,
    task: str = "bbox",
    num_images: int = 6,
    score_threshold: float = 0.3,
) -> dict[str, Any]:
    """
    Writes ``report.md``, ``report.json``, ``curves.png`` and ``detections.png``.

    Args:
        output_dir: created if need be. The files of an earlier report are replaced.
        models: by name, in the order of the table. "teacher", "baseline" and "distilled" make the gap closure.
        dataset_name: a registered dataset; its images are drawn with each model's detections. None draws none.
        title: the heading.
        statement: what the comparison shows and what not, in the author's words.
        commands: the commands that made it.
        environment: what it ran on; by default what this process runs on.
        metrics: the columns of the table. The first one is compared.
        task: the task of these metrics, as in metrics.json.
        num_images: how many images to draw, evenly spread over the dataset.
        score_threshold: draws the detections from this score on.

    Returns:
        The content of ``report.json``.

    Raises:
        ValueError: there is no model.
    """
    if not models:
        raise ValueError("write_report: no model to report on; give at least one")
    environment = describe_environment() if environment is None else environment
    context = ReportContext(title, dataset_name or "", statement, commands, environment, score_threshold)
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {
        "curves.png": _curves(models, f"{task}/{metrics[0]}", metrics[0]),
        "detections.png": _detections(models, dataset_name, metrics[0], num_images, score_threshold),
    }
    for name, content in pictures.items():
        if content is None:
            (directory / name).unlink(missing_ok=True)
        else:
            _write(directory / name, content)
    drawn = [name for name, content in pictures.items() if content is not None]
    report = {
        "title": title,
        "dataset": dataset_name,
        "models": {name: _model_json(model) for name, model in models.items()},
        **compare(models, metrics[0]),
        "statement": statement,
        "commands": list(commands),
        "environment": dict(environment),
        "pictures": drawn,
    }
    report = _finite(report)
    _write(directory / "report.json", (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    _write(directory / "report.md", markdown(models, report, metrics, context).encode())
    logger.info("wrote %s", directory / "report.md")
    return report


def compare(models: Mapping[str, ModelResult], metric: str = "AP") -> dict[str, Any]:
    """
    Gain and gap closure of the distilled student.

    Returns:
        ``metric``; ``gain`` = distilled - baseline; ``inherit_gain`` = inherit - baseline; ``gap_closure`` = gain /
        (teacher - baseline), None where the teacher is not better than the baseline or a number is missing, which
        ``gap_closure_note`` explains; ``equal_iterations``: whether both students saw as many images.
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


def load_result(
    name: str, output_dir: str, label: str = "", dataset_name: str | None = None, task: str = "bbox"
) -> ModelResult:
    """
    Reads the OUTPUT_DIR of a training run.

    Args:
        name: "teacher", "baseline", "inherit", "distilled" or another.
        output_dir: holds ``result.json`` and, if they exist, ``metrics.json``, ``config.yaml``,
            ``inference/coco_instances_results.json`` and ``model_final.pth``.
        label: what the report calls the model.
        dataset_name: which results to take of a run that was evaluated on several datasets.
        task: which metrics to take.

    Raises:
        FileNotFoundError: there is no ``result.json``: the run has not finished.
        ValueError: ``result.json`` has no metrics of this task.
    """
    directory = Path(output_dir)
    path = directory / "result.json"
    if not path.is_file():
        raise FileNotFoundError(f"Run {name!r}: {path} does not exist; the run has not finished, or is elsewhere")
    try:
        content = json.loads(path.read_text())
        metrics = content["metrics"]
        metrics = metrics.get(dataset_name, metrics)[task]
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"Run {name!r}: {path} holds no metrics of the task {task!r} ({error!r})") from error

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


def describe_environment() -> dict[str, Any]:
    """Runtime, versions and device of this process."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return {
        "runtime": str(RUNTIME),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
    }


def markdown(
    models: Mapping[str, ModelResult],
    report: Mapping[str, Any],
    metrics: Sequence[str],
    context: ReportContext,
) -> str:
    """The text of ``report.md``."""
    parts = [f"# {context.title}", _table(models.values(), metrics), "## What it shows"]
    parts.append("\n".join(f"- {sentence}" for sentence in _findings(models, report)))
    parts.append(context.statement)
    if "curves.png" in report["pictures"]:
        parts += ["## Training", "![Loss and validation metric over iterations](curves.png)"]
    if "detections.png" in report["pictures"]:
        parts += [
            "## Detections",
            f"Images of `{context.dataset_name}`, evenly spread over the dataset and not selected; detections with a "
            f"score of at least {context.score_threshold:g}. Green: right class, IoU at least 0.5. Red: wrong.",
            "![Ground truth and detections side by side](detections.png)",
        ]
    if context.commands:
        parts += ["## Commands", "```\n" + "\n".join(context.commands) + "\n```"]
    files = [(m.title, m.config_file, m.checkpoint) for m in models.values() if m.config_file or m.checkpoint]
    if files:
        parts += ["## Files", "\n".join(_file_line(*entry) for entry in files)]
    parts += ["## Environment", "\n".join(f"- {key}: {value}" for key, value in context.environment.items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(models: Sequence[ModelResult], metrics: Sequence[str]) -> str:
    header = ["model", *metrics, "parameters", "iterations", "images seen", "training time", "seed"]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for model in models:
        rows.append(
            [
                model.title,
                *(_number(model.metrics.get(name), ".1f") for name in metrics),
                _number(model.params and model.params / 1e6, ".2f", " M"),
                _number(model.iterations, ","),
                _number(model.images_seen, ","),
                _duration(model.wall_time_s),
                _number(model.seed, "d"),
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _findings(models: Mapping[str, ModelResult], report: Mapping[str, Any]) -> list[str]:
    metric = report["metric"]

    def value(name: str) -> str:
        return f"{models[name].metrics[metric]:.1f}"

    findings = []
    if report["gain"] is not None:
        lead = {True: "At equal iterations", False: "At different numbers of images seen", None: "In this run"}
        direction = "raises" if report["gain"] >= 0 else "lowers"
        findings.append(
            f"{lead[report['equal_iterations']]}, distillation {direction} the student from {value('baseline')} to "
            f"{value('distilled')} {metric} ({report['gain']:+.1f})."
        )
    if report["inherit_gain"] is not None:
        findings.append(
            f"Starting from the teacher's neck and head, without distillation, gives {value('inherit')} {metric} "
            f"({report['inherit_gain']:+.1f})."
        )
    if report["gap_closure"] is not None:
        findings.append(
            f"Gap closure, (distilled - baseline) / (teacher - baseline): {100 * report['gap_closure']:.0f} %."
        )
    else:
        findings.append(report["gap_closure_note"])
    return findings


def _curves(models: Mapping[str, ModelResult], key: str, axis: str) -> bytes | None:
    logs = {m.title: read_training_log(m.metrics_file, key) for m in models.values() if m.metrics_file}
    if not any(len(log.loss) or len(log.metric) for log in logs.values()):
        return None
    buffer = io.BytesIO()
    training_curves(logs, axis).savefig(buffer, format="png")
    return buffer.getvalue()


def _detections(
    models: Mapping[str, ModelResult], dataset_name: str | None, metric: str, count: int, threshold: float
) -> bytes | None:
    shown = [model for model in models.values() if model.predictions_file]
    if dataset_name is None or not shown or count < 1:
        return None
    records = sorted(DatasetCatalog.get(dataset_name), key=lambda record: str(record["image_id"]))
    count = min(count, len(records))
    records = [records[i * len(records) // count] for i in range(count)]
    metadata = MetadataCatalog.get(dataset_name)
    predictions = {
        f"{model.title}: {_number(model.metrics.get(metric), '.1f')} {metric}": read_predictions(
            model.predictions_file, metadata
        )
        for model in shown
    }
    grid = detection_grid(records, metadata.thing_classes, predictions, threshold)
    return cv2.imencode(".png", grid, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()


def _model_json(model: ModelResult) -> dict[str, Any]:
    described = {k: v for k, v in asdict(model).items() if k != "metrics"}
    return {**model.metrics, **described, "label": model.title, "images_seen": model.images_seen}


def _file_line(title: str, config_file: str | None, checkpoint: str | None) -> str:
    names = ", ".join(f"`{name}`" for name in (config_file, checkpoint) if name)
    return f"- {title}: {names}"


def _number(value: float | None, style: str, unit: str = "") -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:{style}}{unit}"


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite(value: Any) -> Any:
    """A copy in which numbers that JSON does not know (nan, inf) are None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return _or_none(value) if isinstance(value, float) else value


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
