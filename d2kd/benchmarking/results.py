"""Tables, files and the picture of what models cost."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from d2kd.evaluation.report import describe_environment
from d2kd.evaluation.tasks import metric_named
from d2kd.files import finite, replacing, write_json
from d2kd.visualization import Trade, trade_off

from .measuring import Measurement, Settings

logger = logging.getLogger(__name__)


def benchmark_table(measurements: Sequence[Measurement], style: str = "github") -> str:
    """Returns a row for each model; times are compared with the first one.

    Args:
        measurements: in the order of the rows.
        style: of tabulate.
    """
    metrics = [x.subject.metric() for x in measurements]
    named = next((metric for metric in metrics if metric), None)
    header = ["model", "runtime"]
    header += [metric_named(named[1]).heading] if named else []
    header += ["ms", "ms p95", "of the first", "images/s", "memory, MiB", "parameters", "multiply-adds", "size, MB"]
    first, rows = measurements[0].median, []
    for x, metric in zip(measurements, metrics):
        row: list[Any] = [x.subject.name, x.subject.runtime]
        row += [f"{metric[2]:.1f}" if metric and named and metric[:2] == named[:2] else "-"] if named else []
        row += [f"{x.median:.1f}", f"{x.p95:.1f}", f"{x.median / first:.2f}", f"{x.throughput:.1f}"]
        row += ["-" if x.memory is None else f"{x.memory / 2**20:,.0f}"]
        for number, unit in ((x.facts.parameters, "M"), (x.facts.multiply_adds, "G")):
            row.append("-" if number is None else f"{number / (1e6 if unit == 'M' else 1e9):.2f} {unit}")
        rows.append([*row, f"{x.facts.file_bytes / 1e6:.1f}"])
    return tabulate(
        rows, header, tablefmt=style, disable_numparse=True, colalign=["left", "left", *["right"] * (len(header) - 2)]
    )


def write_results(
    output: str | Path, measurements: Sequence[Measurement], settings: Settings, command: str = ""
) -> list[Path]:
    """Writes benchmark.json and benchmark.md, the picture benchmark.png where metrics are known, and benchmark.json in
    the folder of each run, for its reports.

    Returns:
        The files in `output`.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        **describe_environment(),
        "device of the models": settings.device,
        "threads": settings.threads or "all",
        "images": len(settings.images),
        "rounds": settings.rounds,
    }
    models = [{**x.as_json(), "metric": x.subject.metric()} for x in measurements]
    write_json(folder / "benchmark.json", finite({"environment": about, "command": command, "models": models}))
    files = [folder / "benchmark.json", folder / "benchmark.md"]
    points = trades(measurements)
    if points:
        files.append(folder / "benchmark.png")
        with replacing(files[-1]) as temporary:
            metric = next(x.subject.metric() for x in measurements if x.subject.metric())
            assert metric is not None
            trade_off(points, metric_named(metric[1]).axis).savefig(temporary, format="png")
    with replacing(files[1]) as temporary:
        temporary.write_text(_markdown(measurements, about, command, bool(points)), encoding="utf-8")
    _tell_runs(measurements, about)
    return files


def trades(measurements: Sequence[Measurement]) -> list[Trade]:
    """Returns the models whose metric is known, of the task of the first one."""
    found = [(x, x.subject.metric()) for x in measurements]
    first = next((metric for _, metric in found if metric), None)
    if first is None:
        return []
    return [
        Trade(x.subject.name, x.median, metric[2], str(x.subject.run), x.subject.exported)
        for x, metric in found
        if metric and metric[:2] == first[:2]
    ]


def _markdown(measurements: Sequence[Measurement], about: Mapping[str, Any], command: str, drawn: bool) -> str:
    parts = ["# What the models cost", benchmark_table(measurements)]
    parts.append(
        "Milliseconds of an image alone, from the prepared input to the detections (median and 95th percentile); "
        f"images a second in batches of {measurements[0].batch}; most memory of weights and computation. All models "
        "were run in turn, each in a process of its own."
    )
    parts += ["![Metric against milliseconds](benchmark.png)"] if drawn else []
    parts += [f"```\n{command}\n```"] if command else []
    parts.append("\n".join(f"- {key}: {value}" for key, value in about.items()))
    return "\n\n".join(parts) + "\n"


def _tell_runs(measurements: Sequence[Measurement], about: Mapping[str, Any]) -> None:
    """Writes benchmark.json beside each run's results; what cannot be written there is told."""
    for run in dict.fromkeys(x.subject.run for x in measurements if x.subject.run is not None):
        mine = [x for x in measurements if x.subject.run == run]
        own = next((x.as_json() for x in mine if not x.subject.exported), None)
        if own is None:
            continue
        files = {Path(x.subject.weights).name: x.as_json() for x in mine if x.subject.exported}
        try:
            write_json(run / "benchmark.json", finite({**own, "exported": files, "environment": about}))
        except OSError as error:
            logger.warning("%s cannot be written: %s.", run / "benchmark.json", error.strerror or error)
