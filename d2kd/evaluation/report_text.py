"""The text of a report: its tables and sentences."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from d2kd.evaluation.feature_links import features_text
from d2kd.evaluation.report_seeds import Cell, seed_findings, seed_notes, seed_table
from d2kd.evaluation.results import Benchmark, ModelResult
from d2kd.evaluation.seeds import estimate_in, mean_of_shared
from d2kd.evaluation.tasks import metric_named, task_named

#: So many classes are all listed; of more, those that tell most.
MANY_CLASSES = 30
SHOWN_CLASSES = 20


def markdown(models: Mapping[str, ModelResult], report: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """The text of `report.md`, from the content of `report.json`."""
    header, rows = main_table(models.values(), metrics, report["training_cost"])
    table = _markdown_table([header, *([text for text, _ in row] for row in rows)])
    parts = [f"# {report['title']}", table, "## What it shows"]
    parts.append("\n".join(f"- {sentence}" for sentence in findings(models, report)))
    parts.append(report["statement"])
    seed_header, seed_rows = seed_table(models, report)
    if seed_rows:
        parts += ["## Seeds", _markdown_table([seed_header, *([text for text, _ in row] for row in seed_rows)])]
        parts.append(seed_notes(report))
    classes = class_table(models, task_named(report["task"], metrics).of_classes)
    parts += ["## Classes", classes] if classes else []
    if "trade_off.png" in report["pictures"]:
        parts += ["## Cost", "![Metric against milliseconds an image](trade_off.png)"]
    if "curves.png" in report["pictures"]:
        parts += [
            "## Training",
            curve_note(models, report),
            "![Loss and validation metric over iterations](curves.png)",
        ]
    if "detections.png" in report["pictures"]:
        parts += [
            "## Detections",
            f"Images of `{report['dataset']}`, evenly spread over the dataset and not selected; detections with a "
            f"score of at least {report['score_threshold']:g}. Green: right class, IoU at least 0.5. Red: wrong.",
            "![Ground truth and detections side by side](detections.png)",
        ]
    if "label_maps.png" in report["pictures"]:
        parts += [
            "## Label maps",
            f"Images of `{report['dataset']}`, evenly spread over the dataset and not selected. Below each: red is "
            "wrong, green right (but for the first class, which is left as it is), gray does not count.",
            "![True label maps and those of the models side by side](label_maps.png)",
        ]
    if "predictions.png" in report["pictures"]:
        parts += [
            "## Predictions",
            f"Images of `{report['dataset']}`: first some that are evenly spread over the dataset and not selected, "
            "then some where the models differ. Beside each image stand its true class, and what each model says with "
            "its score. Green, with a disc: right. Red, with a cross: wrong, followed by the score of the true class, "
            "or what it is at most where that class is not among the model's best.",
            "![Images with what each model says about them](predictions.png)",
        ]
    parts += features_text(report)
    if report["commands"]:
        parts += ["## Commands", "```\n" + "\n".join(report["commands"]) + "\n```"]
    files = [(m.title, m.config_file, m.checkpoint) for m in models.values() if m.config_file or m.checkpoint]
    if files:
        parts += ["## Files", "\n".join(_file_line(*entry) for entry in files)]
    parts += ["## Environment", "\n".join(f"- {key}: {value}" for key, value in report["environment"].items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def main_table(
    models: Iterable[ModelResult], metrics: Sequence[str], cost: Mapping[str, Any] | None = None
) -> tuple[list[str], list[list[Cell]]]:
    """Header and rows of the table of models; the first cell of a row is its name.

    Args:
        models: in the order of the rows.
        metrics: the first columns.
        cost: see `training_cost`.
    """
    models = list(models)
    measured = any(model.benchmark for model in models)
    header = ["model", *(metric_named(name).heading for name in metrics), "parameters"]
    header += ["ms an image", "images/s", "memory", "multiply-adds"] if measured else []
    header += ["iterations", "images seen", "training time"]
    level = None if cost is None else cost["level"]
    if cost is not None:
        header += ["an iteration", "teacher's share"]
        header += [f"time to {level:.1f} {metric_named(metrics[0]).unit}"] if level is not None else []
    header.append("seed")
    rows = []
    for model in models:
        values = [model.metrics.get(name) for name in metrics]
        row: list[Cell] = [(model.title, None), *((_number(value, ".1f"), value) for value in values)]
        row.append((_number(model.params and model.params / 1e6, ".2f", " M"), model.params))
        row += _costs(model.benchmark) if measured else []
        row.append((_number(model.iterations, ","), model.iterations))
        row.append((_number(model.images_seen, ","), model.images_seen))
        row.append((_duration(model.wall_time_s), model.wall_time_s))
        if cost is not None:
            row += _training_costs(cost["models"].get(model.name, {}), level is not None)
        rows.append([*row, _seeds(model)])
    return header, rows


def _training_costs(cost: Mapping[str, float | None], has_level: bool) -> list[Cell]:
    share, until = cost.get("teacher_share"), cost.get("to_level_s")
    seconds = cost.get("iteration_s")
    cells: list[Cell] = [
        (_number(seconds and 1000 * seconds, ",.0f", " ms"), seconds),
        (_number(None if share is None else 100 * share, ".0f", " %"), share),
    ]
    return [*cells, (_duration(until), until)] if has_level else cells


def _seeds(model: ModelResult) -> Cell:
    seeds = [run.seed for run in model.runs or (model,) if run.seed is not None]
    return ", ".join(map(str, seeds)) or "-", seeds[0] if seeds else None


def _costs(benchmark: Benchmark | None) -> list[Cell]:
    if benchmark is None:
        return [("-", None)] * 4
    memory, work = benchmark.memory_bytes, benchmark.multiply_adds
    return [
        (_number(benchmark.milliseconds, ".1f"), benchmark.milliseconds),
        (_number(benchmark.images_per_second, ".1f"), benchmark.images_per_second),
        (_number(memory and memory / 2**20, ",.0f", " MiB"), memory),
        (_number(work and work / 1e9, ".2f", " G"), work),
    ]


def findings(models: Mapping[str, ModelResult], report: Mapping[str, Any]) -> list[str]:
    """What the numbers of `report.json` say, in sentences."""
    metric, unit = report["metric"], metric_named(report["metric"]).unit
    inherited = task_named(report["task"]).inherited

    def value(name: str, other: str = "baseline") -> str:
        return f"{mean_of_shared(report, name, other, models[name].metrics[metric]):.1f}"

    found = []
    if report["gain"] is not None:
        lead = {True: "At equal iterations", False: "At different numbers of images seen", None: "In this run"}
        gain = f"{report['gain']:+.1f}"
        verb = "raises" if report["gain"] > 0 else "lowers"
        change = f"{verb} the student from {value('baseline', 'distilled')} to {value('distilled')} {unit} ({gain})"
        paired = estimate_in(report, "over_baseline", "distilled")
        if paired and paired.within_noise:
            both = f"{value('baseline', 'distilled')} and {value('distilled')}"
            change = f"changes nothing beyond noise: {both} {unit} ({gain})"
        elif float(gain) == 0:
            change = f"leaves the student at {value('distilled')} {unit}"
        found.append(f"{lead[report['equal_iterations']]}, distillation {change}.")
    if report["inherit_gain"] is not None:
        found.append(
            f"Starting from the teacher's {inherited}, without distillation, gives {value('inherit')} {unit} "
            f"({report['inherit_gain']:+.1f})."
        )
    found += seed_findings(models, report)
    if report["gap_closure"] is not None:
        paired = estimate_in(report, "gap_closure", "distilled")
        closed = paired.text(".0f", 100, " %") if paired else f"{100 * report['gap_closure']:.0f} %"
        found.append(f"Gap closure, (distilled - baseline) / (teacher - baseline): {closed}.")
    else:
        found.append(report["gap_closure_note"])
    alone = report["right_alone"]
    if alone is not None:
        found.append(
            f"Of {alone['images']:,} images, the distilled student is right and the baseline wrong on "
            f"{alone['distilled']:,}, and the other way round on {alone['baseline']:,}."
        )
    return found


def curve_note(models: Mapping[str, ModelResult], report: Mapping[str, Any]) -> str:
    """Of which datasets the curves of the metric are, where these are not those of the tables; else ""."""
    of_curves = report["curve_datasets"]
    if all(dataset == models[name].dataset for name, dataset in of_curves.items()):
        return ""
    titles: dict[str, list[str]] = {}
    for name, dataset in of_curves.items():
        titles.setdefault(dataset or "a dataset that is not known", []).append(models[name].title)
    metric = metric_named(report["metric"]).title
    tables = next((model.dataset for model in models.values() if model.dataset), "another one")
    if len(titles) == 1:
        return f"Curves of {metric} are of {next(iter(titles))}, and the tables of {tables}."
    each = "; ".join(f"{dataset} ({', '.join(of)})" for dataset, of in titles.items())
    return f"Curves of {metric} are of different datasets, not to be compared: {each}. The tables are of {tables}."


def class_table(models: Mapping[str, ModelResult], name: str) -> str:
    """A metric of every class, of every model, and what the distilled student has above the baseline; "" without any.

    Of more than 30 classes, the 20 with the largest difference, or without both students those about which all models
    differ most, or of a single model its worst.
    """
    rows = class_values(models, name)
    pair = [list(models).index(key) for key in ("distilled", "baseline")] if _has_both(models) else None
    shown, which = list(rows), "Every class"
    if len(rows) > MANY_CLASSES:
        shown = sorted(rows, key=lambda key: _rank(rows[key], pair))[:SHOWN_CLASSES]
        titles = " and ".join(models[key].title for key in ("distilled", "baseline")) if pair else "the models"
        which = f"The {len(shown)} of {len(rows):,} classes where {titles} differ most (report.json has all)"
        if len(models) == 1:
            which = f"The {len(shown)} of {len(rows):,} classes with the lowest values (report.json has all)"
    table = [["class", *(model.title for model in models.values()), *(["difference"] if pair else [])]]
    for key in shown:
        values = [_number(value, ".1f") for value in rows[key]]
        difference = [_number(rows[key][pair[0]] - rows[key][pair[1]], "+.1f")] if pair else []
        table.append([key, *values, *difference])
    note = f" Difference: {models['distilled'].title} - {models['baseline'].title}." if pair else ""
    words = metric_named(name)
    return f"{which}, {words.axis}.{note}\n\n{_markdown_table(table)}" if rows else ""


def class_values(models: Mapping[str, ModelResult], name: str) -> dict[str, list[float]]:
    """A metric of every class, of every model in their order, by the name of the class; NaN where it is not known."""
    return {
        key.removeprefix(f"{name}-"): [model.metrics.get(key, math.nan) for model in models.values()]
        for key in dict.fromkeys(key for model in models.values() for key in model.metrics)
        if key.startswith(f"{name}-")
    }


def _has_both(models: Mapping[str, ModelResult]) -> bool:
    return "distilled" in models and "baseline" in models


def _rank(values: Sequence[float], pair: Sequence[int] | None) -> float:
    """Sorts classes, those to be shown first; those without a number last."""
    if len(values) == 1:
        return values[0] if math.isfinite(values[0]) else math.inf
    chosen = [values[place] for place in pair] if pair else [value for value in values if math.isfinite(value)]
    return min(chosen) - max(chosen) if chosen and all(map(math.isfinite, chosen)) else math.inf


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    rows = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


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
