"""What a report says about several seeds: a table, and sentences that tell differences from noise."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from d2kd.evaluation.results import ModelResult
from d2kd.evaluation.seeds import estimate_in
from d2kd.evaluation.statistics import Estimate
from d2kd.evaluation.tasks import metric_named

#: A cell: its text, and the number that it is sorted by.
Cell = tuple[str, float | None]

NOISE = "within noise"
IMAGES = "images"


def seed_table(models: Mapping[str, ModelResult], report: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Header and rows of the table of seeds; without rows where every model is a single run, and no image is drawn."""
    if not report.get("seeds"):
        return [], []
    columns = {f"over {models['baseline'].title}": "over_baseline"} if "baseline" in models else {}
    columns |= {f"over {models['inherit'].title}": "over_inherit"} if "inherit" in models else {}
    rows = []
    for name, model in models.items():
        values = report["seeds"]["values"][name]
        shown = ", ".join(f"{_number(value)} ({seed})" for seed, value in values.items())
        row: list[Cell] = [(model.title, None), (shown or "-", None), _cell(estimate_in(report, "mean", name), ".1f")]
        row += [_cell(estimate_in(report, key, name), "+.1f", noise=True) for key in columns.values()]
        rows.append([*row, _cell(estimate_in(report, "gap_closure", name), ".0f", 100, " %")])
    metric = metric_named(report["metric"])
    return ["model", f"{metric.heading} (seed)", f"mean {metric.heading}", *columns, "gap closure"], rows


def seed_notes(report: Mapping[str, Any]) -> str:
    """How the table of seeds is to be read."""
    confidence = 100 * report["seeds"]["confidence"]
    found = [of for key in ("over_baseline", "over_inherit") for of in report["seeds"][key].values() if of]
    images = (
        f" Where it says {IMAGES}, there is one seed, and the interval is that of test images drawn with replacement: "
        "what another training would change is not in it, and may be more."
    )
    return (
        f"In brackets: {confidence:.0f} % intervals (Student's t over seeds). Differences and gap closures are those "
        f"of runs with the same seed; {NOISE} means that 0 is in the interval. The teacher counts as given, and "
        "nothing is corrected for the number of comparisons: of twenty differences that are none, one is expected to "
        "look like one. Gap closure is the mean gain over the mean gap of these runs, and unbounded where that gap is "
        f"{NOISE}. Metrics and times are means over seeds; pictures and curves are those of the first one."
        + (images if any(of["over"] == "images" for of in found) else "")
    )


def seed_findings(models: Mapping[str, ModelResult], report: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each student that shares seeds with the baseline: how far apart they are, and how surely."""
    unit = metric_named(report["metric"]).unit
    for key, other in (("over_baseline", "baseline"), ("over_inherit", "inherit")):
        for name in (report["seeds"] or {}).get(key, ()):
            found, title = estimate_in(report, key, name), models[name].title
            if found is None:
                if other in models:
                    yield f"{title} and {models[other].title} have no seed in common, so there are no pairs to compare."
            elif found.over == "images":
                noise = f", which is {NOISE}" if found.within_noise else ""
                yield (
                    f"{title} over {models[other].title}: {found.text()} {unit} over drawings of the test images"
                    f"{noise}; another seed may change more."
                )
            elif found.low is None:
                yield (
                    f"{title} over {models[other].title}: {found.mean:+.1f} {unit} with the one seed that they share, "
                    "which does not tell what another one would give."
                )
            else:
                noise = f", which is {NOISE}" if found.within_noise else ""
                yield f"{title} over {models[other].title}: {found.text()} {unit} in {found.count} pairs{noise}."


def _cell(found: Estimate | None, style: str, factor: float = 1.0, unit: str = "", noise: bool = False) -> Cell:
    if found is None:
        return "-", None
    images = f" ({IMAGES})" if found.over == "images" else ""
    return found.text(style, factor, unit) + images + (f", {NOISE}" if noise and found.within_noise else ""), found.mean


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.1f}"
