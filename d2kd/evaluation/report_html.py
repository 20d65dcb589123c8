"""report.html: the comparison as one file to look at, which needs no other and no network.

Tables and plots are written here; `report_page/` has the page around them, its style, and the script that sorts tables
and draws the image browser from the JSON in the page.
"""

import base64
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2kd.evaluation.report_plots import STYLES, Cost, curves, swatch, trade_off
from d2kd.evaluation.report_seeds import NOISE, seed_notes, seed_table
from d2kd.evaluation.report_text import class_values, curve_note, findings, main_table
from d2kd.evaluation.results import ModelResult
from d2kd.evaluation.seeds import estimate_in
from d2kd.evaluation.tasks import metric_named, split_variant, task_named
from d2kd.visualization import TrainingLog

_PAGE = Path(__file__).parent / "report_page"


def page(
    models: Mapping[str, ModelResult],
    report: Mapping[str, Any],
    metrics: Sequence[str],
    logs: Mapping[str, TrainingLog],
    images: Mapping[str, Any] | None,
    directory: Path = Path(),
) -> str:
    """The text of report.html.

    Args:
        models: by name, in the order of the tables.
        report: the content of report.json.
        metrics: the columns of the table of models.
        logs: curves of the models that have some, by name.
        images: what `browser_images` gives; None for a page without images.
        directory: of the report, from which its pictures of features are found.
    """
    titles = {name: model.title for name, model in models.items()}
    base, variant = split_variant(report["task"])
    task = f"{_TASKS.get(base, base)}{f' ({variant[1:]})' if variant else ''}"
    latencies = {name: model.benchmark.milliseconds if model.benchmark else None for name, model in models.items()}
    dataset = f" on {report['dataset']}" if report["dataset"] else ""
    parts = {
        "title": _text(report["title"]),
        "subtitle": _text(f"{task}{dataset}"),
        "cards": "".join(_cards(models, report)),
        "findings": "".join(f"<li>{_text(sentence)}</li>" for sentence in findings(models, report)),
        "statement": _paragraphs(report["statement"]),
        "models": _model_table(models, metrics, report["training_cost"]) + _seed_table(models, report),
        "legend": "".join(
            f'<li class="m{number % STYLES}">{swatch(number)}{_text(title)}</li>'
            for number, title in enumerate(titles.values())
        ),
        "plots": "".join(_plots(models, report, logs, latencies)),
        "images": _images(report, images),
        "features": _features([directory / name for name in report.get("features", ())]),
        "classes": _class_table(models, task_named(report["task"], metrics).of_classes),
        "files": "".join(_files(models, report)),
        "data": json_for_html(images),
        "style": (_PAGE / "page.css").read_text(encoding="utf-8"),
        "script": (_PAGE / "page.js").read_text(encoding="utf-8"),
    }
    template = (_PAGE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def json_for_html(content: Any) -> str:
    """JSON that may stand in a script element: whatever names it holds, the element does not end in it."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _paragraphs(text: str) -> str:
    """Text of report.md, of whose Markdown bold words, code and paragraphs are known."""
    escaped = [_text(part.strip()) for part in re.split(r"\n\s*\n", text) if part.strip()]
    bold = [re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", part, flags=re.DOTALL) for part in escaped]
    code = [re.sub(r"`([^`]+)`", r"<code>\1</code>", part) for part in bold]
    return "".join(f"<p>{part}</p>" for part in code)


_TASKS = {
    "bbox": "Object detection",
    "segm": "Instance segmentation",
    "sem_seg": "Semantic segmentation",
    "classification": "Classification",
}


def _text(value: object) -> str:
    return html.escape(str(value))


def _cards(models: Mapping[str, ModelResult], report: Mapping[str, Any]) -> Iterable[str]:
    """The compared metric of every model in large figures, and how much of the gap is closed."""
    metric = metric_named(report["metric"])
    baseline = models["baseline"].metrics.get(metric.name, math.nan) if "baseline" in models else math.nan
    for number, (name, model) in enumerate(models.items()):
        value = model.metrics.get(metric.name, math.nan)
        gain = value - baseline
        below = f"{gain:+.1f} to the {models['baseline'].title}" if name != "baseline" and math.isfinite(gain) else ""
        paired = estimate_in(report, "over_baseline", name)
        below += f", {NOISE}" if paired and paired.within_noise else ""
        yield (
            f'<div class="card m{number % STYLES}"><dt>{swatch(number)}{_text(model.title)}</dt>'
            f"<dd>{_figure(value)} <small>{_text(metric.unit)}</small></dd><dd>{_text(below)}</dd></div>"
        )
    if report["gap_closure"] is not None:
        closed = f"{100 * report['gap_closure']:.0f} <small>%</small>"
        between = _text(f"of what the {models['teacher'].title} has above the {models['baseline'].title}")
        yield f'<div class="card gap"><dt>gap closed</dt><dd>{closed}</dd><dd>{between}</dd></div>'


def _figure(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "–"


def _model_table(models: Mapping[str, ModelResult], metrics: Sequence[str], cost: Mapping[str, Any] | None) -> str:
    header, rows = main_table(models.values(), metrics, cost)
    body = "".join(
        f'<tr class="m{number % STYLES}"><th scope="row">{swatch(number)}{_text(row[0][0])}</th>'
        + "".join(_cell(text, value) for text, value in row[1:])
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return _table(header, body, "models")


def _seed_table(models: Mapping[str, ModelResult], report: Mapping[str, Any]) -> str:
    header, rows = seed_table(models, report)
    if not rows:
        return ""
    body = "".join(
        f'<tr class="m{number % STYLES}"><th scope="row">{swatch(number)}{_text(row[0][0])}</th>'
        f"<td>{_text(row[1][0])}</td>" + "".join(_cell(text, value) for text, value in row[2:]) + "</tr>"
        for number, row in enumerate(rows)
    )
    return f'<h3>Seeds</h3>{_table(header, body, "seeds")}<p class="note">{_text(seed_notes(report))}</p>'


def _table(header: Sequence[str], body: str, name: str) -> str:
    """A table that the page's script sorts by the buttons in its header."""
    heads = "".join(
        f'<th scope="col" class="{"number" if column else "name"}" aria-sort="none">'
        f'<button type="button">{_text(title)}</button></th>'
        for column, title in enumerate(header)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table id="{name}-table">'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str, value: float | None, bar: str = "") -> str:
    known = value is not None and math.isfinite(value)
    number = f' data-value="{value:.10g}"' if known else ""
    return f"<td{number}>{bar}{_text(text if known else '–')}</td>"


def _plots(
    models: Mapping[str, ModelResult],
    report: Mapping[str, Any],
    logs: Mapping[str, TrainingLog],
    latencies: Mapping[str, float | None],
) -> Iterable[str]:
    metric = metric_named(report["metric"])
    titles = {name: model.title for name, model in models.items()}
    arrow = (titles["baseline"], titles["distilled"]) if {"baseline", "distilled"} <= titles.keys() else None
    scores = {name: model.metrics.get(metric.name, math.nan) for name, model in models.items()}
    costs = {
        f"{metric.title} against latency": ("milliseconds an image", latencies),
        f"{metric.title} against parameters": (
            "million parameters",
            {name: model.params and model.params / 1e6 for name, model in models.items()},
        ),
    }
    for heading, (unit, cost) in costs.items():
        points = [Cost(titles[name], scores[name], cost[name] or math.nan, unit) for name in models]
        if cost is latencies:
            points += _exported(models, scores, unit)
        missing = [titles[name] for name in models if not cost[name]]
        note = f"Not known of: {', '.join(missing)}." if missing else ""
        if len(models) - len(missing) < min(len(models), 2):
            continue  # one of several models shows no trade-off
        yield _plot(heading, trade_off(points, metric.axis, arrow), note)
    nothing = np.zeros((0, 2))
    losses = {titles[name]: logs[name].loss if name in logs else nothing for name in models}
    values = {titles[name]: logs[name].metric if name in logs else nothing for name in models}
    note = "Task loss, without distillation terms."
    yield _plot("Loss while training", curves(losses, "loss", logarithmic=True), note)
    yield _plot(f"{metric.title} while training", curves(values, metric.axis, marked=True), curve_note(models, report))


def _exported(models: Mapping[str, ModelResult], scores: Mapping[str, float], unit: str) -> list[Cost]:
    """The exported files that were measured; those of one name by their model too."""
    found = [(name, file, ms) for name, m in models.items() if m.benchmark for file, ms in m.benchmark.exported.items()]
    names = [file for _, file, _ in found]
    return [
        Cost(file if names.count(file) == 1 else f"{models[name].title}: {file}", scores[name], milliseconds, unit)
        for name, file, milliseconds in found
    ]


def _plot(heading: str, drawn: str, note: str) -> str:
    below = f"<figcaption>{_text(note)}</figcaption>" if note else ""
    return f'<figure class="chart"><h3>{_text(heading)}</h3>{drawn}{below}</figure>' if drawn else ""


def _features(pictures: Sequence[Path]) -> str:
    """The pictures that `d2kd features` has drawn, inside the page."""
    if not pictures:
        return ""
    shown = "".join(
        f'<img class="wide" alt="Maps of teacher and student over an image" '
        f'src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}">'
        for picture in pictures
    )
    return f'<section id="features"><h2>Features</h2>{shown}</section>'


def _class_table(models: Mapping[str, ModelResult], metric: str) -> str:
    rows = class_values(models, metric)
    if not rows:
        return ""
    names = list(models)
    pair = [names.index(name) for name in ("distilled", "baseline") if name in names]
    differences = {name: v[pair[0]] - v[pair[1]] for name, v in rows.items()} if len(pair) == 2 else {}
    largest = max((abs(d) for d in differences.values() if math.isfinite(d)), default=0.0) or 1.0
    body = []
    for name, values in rows.items():
        cells = "".join(_cell(_figure(value), value) for value in values)
        if differences:
            difference = differences[name]
            bar = (
                f'<i class="bar {"less" if difference < 0 else ""}" style="--part:{abs(difference) / largest:.3f}"></i>'
            )
            cells += _cell(f"{difference:+.1f}", difference, bar if math.isfinite(difference) else "")
        body.append(f'<tr><th scope="row">{_text(name)}</th>{cells}</tr>')
    header = ["class", *(model.title for model in models.values()), *(["difference"] if differences else [])]
    note = f" Difference: {models['distilled'].title} minus {models['baseline'].title}." if differences else ""
    words = metric_named(metric)
    return (
        f'<section id="classes"><h2>Classes</h2><p>{_text(f"{len(rows):,} classes, {words.axis}.{note}")} '
        f"Press a heading to sort.</p>{_table(header, ''.join(body), 'classes')}</section>"
    )


def _images(report: Mapping[str, Any], images: Mapping[str, Any] | None) -> str:
    if images is None:
        why = (
            "No run has predictions in its inference folder that could be drawn."
            if report["dataset"]
            else "This report was made without a dataset (--dataset), so that it has no images."
        )
        return f'<p class="note">{why}</p>'
    notes = "".join(f"<li>{_text(note)}</li>" for note in images["notes"])
    browser = '<div id="browser"><noscript>The images need JavaScript.</noscript></div>' if images["images"] else ""
    return f'{browser}<ul class="notes">{notes}</ul>'


def _files(models: Mapping[str, ModelResult], report: Mapping[str, Any]) -> Iterable[str]:
    if report["commands"]:
        yield f"<h3>Commands</h3><pre>{_text(chr(10).join(report['commands']))}</pre>"
    files = [(m.title, [name for name in (m.config_file, m.checkpoint) if name]) for m in models.values()]
    lines = "".join(
        f"<li>{_text(title)}: {', '.join(f'<code>{_text(name)}</code>' for name in names)}</li>"
        for title, names in files
        if names
    )
    if lines:
        yield f"<h3>Files</h3><ul>{lines}</ul>"
    environment = "".join(f"<li>{_text(key)}: {_text(value)}</li>" for key, value in report["environment"].items())
    yield f"<h3>Environment</h3><ul>{environment}</ul>"
