"""The comparison of a teacher, a baseline student and distilled students: tables, curves and pictures."""

import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from d2kd.evaluation.feature_links import feature_links
from d2kd.evaluation.report_html import page
from d2kd.evaluation.report_images import browser_images
from d2kd.evaluation.report_inputs import ReportInputs, read_inputs
from d2kd.evaluation.report_pictures import (
    compare_images,
    draw_classifications,
    draw_curves,
    draw_detections,
    draw_label_maps,
    draw_trade_off,
    read_logs,
)
from d2kd.evaluation.report_text import markdown
from d2kd.evaluation.results import ModelResult, compare, load_result, require_same_dataset, told_apart
from d2kd.evaluation.seeds import compare_seeds, draw_images
from d2kd.evaluation.tasks import Metric, metric_named, split_variant, task_named
from d2kd.evaluation.training_cost import training_cost
from d2kd.files import finite, replacing, write_json
from d2kd.runtime import RUNTIME

__all__ = ["ModelResult", "compare", "describe_environment", "load_result", "markdown", "write_report"]

logger = logging.getLogger(__name__)

#: What a report may have drawn; those that an earlier one left are removed.
PICTURES = ("trade_off.png", "curves.png", "detections.png", "label_maps.png", "predictions.png")


def write_report(
    output_dir: str,
    models: Mapping[str, ModelResult],
    *,
    dataset_name: str | None = None,
    title: str = "Comparison",
    statement: str = "",
    commands: Sequence[str] = (),
    environment: Mapping[str, Any] | None = None,
    metrics: Sequence[str] | None = None,
    task: str = "bbox",
    num_images: int | None = None,
    score_threshold: float = 0.3,
    drawings: int = 0,
) -> dict[str, Any]:
    """Writes report.md, report.json, report.html, curves.png, and detections.png, label_maps.png or predictions.png.

    Where `d2kd benchmark` has measured a model, its cost stands beside its metrics, with trade_off.png.

    Args:
        output_dir: created if need be. The files of an earlier report are replaced.
        models: by name, in the order of the table. "teacher", "baseline" and "distilled" make the gap closure.
        dataset_name: a registered dataset; its images are drawn with what each model found. None draws none.
        title: the heading.
        statement: what the comparison shows and what not, in the author's words.
        commands: the commands that made it.
        environment: what it ran on; by default what this process runs on.
        metrics: the columns of the table, by default those of the task. The first one is compared.
        task: the task of these metrics, as in metrics.json.
        num_images: how many images to draw, evenly spread over the dataset; by default 6, and 12 for classifiers.
        score_threshold: draws the detections from this score on.
        drawings: so many times the images are drawn anew, for intervals of AP differences between single runs.

    Returns:
        The content of `report.json`.

    Raises:
        ValueError: there is no model.
        ResultError: models were evaluated on different datasets.
    """
    if not models:
        raise ValueError("write_report: no model to report on; give at least one")
    require_same_dataset(models.values())
    about = task_named(task, next(iter(models.values())).metrics)
    metrics = _columns(models, about.columns) if metrics is None else metrics
    first = metric_named(metrics[0])
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    count = about.num_images if num_images is None else num_images
    classifies = split_variant(task)[0] == "classification"
    logs = read_logs(models, task, first)
    pictures = {"trade_off.png": draw_trade_off(models, first), "curves.png": draw_curves(models, logs, first)}
    inputs = None if dataset_name is None else read_inputs(models, dataset_name, task)
    if inputs is not None:
        pictures |= _draw_inputs(models, inputs, first, count, score_threshold)
    draws = drawings > 0 and dataset_name is not None and first.name == "AP"
    drawn = draw_images(models, dataset_name or "", task, drawings) if draws else None
    content = {
        "title": title,
        "dataset": dataset_name,
        "task": task,
        "models": {name: _model_json(model) for name, model in models.items()},
        **compare(models, first.name),
        "curve_datasets": {name: models[name].curve_dataset for name, log in logs.items() if len(log.metric)},
        "training_cost": training_cost(models, task, first.name),
        **compare_seeds(models, first.name, drawn),
        "right_alone": compare_images(models) if classifies else None,
        "statement": statement,
        "commands": list(commands),
        "environment": dict(describe_environment() if environment is None else environment),
        "score_threshold": score_threshold,
        "pictures": _write_pictures(directory, {**dict.fromkeys(PICTURES), **pictures}),
        "features": feature_links(models, directory),
    }
    report = finite(content)
    write_json(directory / "report.json", report)
    with replacing(directory / "report.md") as temporary:
        temporary.write_text(markdown(models, report, metrics), encoding="utf-8")
    apart = told_apart(models)
    images = None if inputs is None else browser_images(apart, inputs, score_threshold)
    with replacing(directory / "report.html") as temporary:
        temporary.write_bytes(page(apart, report, metrics, logs, images, directory).encode("utf-8", "replace"))
    logger.info("wrote %s, and report.html beside it, to look at", directory / "report.md")
    return report


def _draw_inputs(
    models: Mapping[str, ModelResult], inputs: ReportInputs, metric: Metric, count: int, score_threshold: float
) -> dict[str, bytes | None]:
    """The picture of images with what each model says of them, by its file's name."""
    if inputs.kind == "classes":
        return {"predictions.png": draw_classifications(models, inputs, metric, count)}
    if inputs.kind == "label_maps":
        return {"label_maps.png": draw_label_maps(models, inputs, metric, count)}
    return {"detections.png": draw_detections(models, inputs, metric, count, score_threshold)}


def _columns(models: Mapping[str, ModelResult], names: Sequence[str]) -> Sequence[str]:
    """Those that a model has (there is no top-5 of five classes), and always the first one."""
    return [n for n in names if n == names[0] or any(n in model.metrics for model in models.values())]


def describe_environment() -> dict[str, Any]:
    """Runtime, versions and device of this process."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return {
        "runtime": str(RUNTIME),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
    }


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
    described = {k: v for k, v in asdict(model).items() if k not in ("metrics", "runs")}
    if model.runs:
        described["runs"] = [_model_json(run) for run in model.runs]
    return {**model.metrics, **described, "label": model.title, "images_seen": model.images_seen}
