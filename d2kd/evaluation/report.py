"""The comparison of a teacher, a baseline student and distilled students: tables, curves and pictures."""

import io
import logging
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import torch

from d2kd.evaluation.results import ModelResult, compare, load_result
from d2kd.files import finite, replacing, write_json
from d2kd.runtime import RUNTIME
from d2kd.visualization import detection_grid, read_predictions, read_training_log, training_curves
from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["ModelResult", "compare", "describe_environment", "load_result", "markdown", "write_report"]

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75")


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
    """Writes `report.md`, `report.json`, `curves.png` and `detections.png`.

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
        The content of `report.json`.

    Raises:
        ValueError: there is no model.
    """
    if not models:
        raise ValueError("write_report: no model to report on; give at least one")
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {
        "curves.png": _curves(models, f"{task}/{metrics[0]}", metrics[0]),
        "detections.png": _detections(models, dataset_name, metrics[0], num_images, score_threshold),
    }
    content = {
        "title": title,
        "dataset": dataset_name,
        "models": {name: _model_json(model) for name, model in models.items()},
        **compare(models, metrics[0]),
        "statement": statement,
        "commands": list(commands),
        "environment": dict(describe_environment() if environment is None else environment),
        "score_threshold": score_threshold,
        "pictures": _write_pictures(directory, pictures),
    }
    report = finite(content)
    write_json(directory / "report.json", report)
    with replacing(directory / "report.md") as temporary:
        temporary.write_text(markdown(models, report, metrics), encoding="utf-8")
    logger.info("wrote %s", directory / "report.md")
    return report


def describe_environment() -> dict[str, Any]:
    """Runtime, versions and device of this process."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return {
        "runtime": str(RUNTIME),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
    }


def markdown(models: Mapping[str, ModelResult], report: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """The text of `report.md`, from the content of `report.json`."""
    parts = [f"# {report['title']}", _table(models.values(), metrics), "## What it shows"]
    parts.append("\n".join(f"- {sentence}" for sentence in _findings(models, report)))
    parts.append(report["statement"])
    if "curves.png" in report["pictures"]:
        parts += ["## Training", "![Loss and validation metric over iterations](curves.png)"]
    if "detections.png" in report["pictures"]:
        parts += [
            "## Detections",
            f"Images of `{report['dataset']}`, evenly spread over the dataset and not selected; detections with a "
            f"score of at least {report['score_threshold']:g}. Green: right class, IoU at least 0.5. Red: wrong.",
            "![Ground truth and detections side by side](detections.png)",
        ]
    if report["commands"]:
        parts += ["## Commands", "```\n" + "\n".join(report["commands"]) + "\n```"]
    files = [(m.title, m.config_file, m.checkpoint) for m in models.values() if m.config_file or m.checkpoint]
    if files:
        parts += ["## Files", "\n".join(_file_line(*entry) for entry in files)]
    parts += ["## Environment", "\n".join(f"- {key}: {value}" for key, value in report["environment"].items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(models: Iterable[ModelResult], metrics: Sequence[str]) -> str:
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
    shown = [(model, model.predictions_file) for model in models.values() if model.predictions_file]
    if dataset_name is None or not shown or count < 1:
        return None
    records = sorted(DatasetCatalog.get(dataset_name), key=lambda record: str(record["image_id"]))
    count = min(count, len(records))
    records = [records[i * len(records) // count] for i in range(count)]
    metadata = MetadataCatalog.get(dataset_name)
    predictions = {
        f"{model.title}: {_number(model.metrics.get(metric), '.1f')} {metric}": read_predictions(
            predictions_file, metadata
        )
        for model, predictions_file in shown
    }
    grid = detection_grid(records, metadata.thing_classes, predictions, threshold)
    return cv2.imencode(".png", grid, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()


def _write_pictures(directory: Path, pictures: Mapping[str, bytes | None]) -> list[str]:
    """Writes the PNG files that have a content, removes those that an earlier report left; returns the former."""
    for name, content in pictures.items():
        if content is None:
            (directory / name).unlink(missing_ok=True)
        else:
            with replacing(directory / name) as temporary:
                temporary.write_bytes(content)
    return [name for name, content in pictures.items() if content is not None]


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
