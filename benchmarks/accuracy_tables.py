"""The tables of benchmarks/accuracy.py: what methods have above others on the test split, and what tuning found."""

import math
from collections.abc import Mapping
from typing import Any

from accuracy_runs import Bench, checksum, default, trial_directory
from suites import FACTORS, tuned

from d2kd.evaluation.statistics import Estimate, estimate, gap_closure


def tuning_table(bench: Bench) -> str:
    """Markdown table of all finished trials."""
    lines = [
        "| method | tried | " + " | ".join(f"x {factor:g}" for factor in FACTORS) + " |",
        "| --- | --- |" + " ---: |" * len(FACTORS),
    ]
    for name, key in tuned(bench.suite).items():
        paths = [bench.root / trial_directory(name, default(key) * factor) for factor in FACTORS]
        scores = [bench.scores(path).get("val") for path in paths]
        best = max((score for score in scores if score is not None), default=None)
        cells = ["-" if x is None else f"**{x:.1f}**" if x == best else f"{x:.1f}" for x in scores]
        lines.append(f"| {name} | `{key}`, default {default(key):g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(bench: Bench) -> dict[str, Any]:
    """What the table says, and val beside it: of every row its scores, their mean, and what it has above others."""
    teacher = bench.scores(bench.teacher_folder)
    rows = {name: bench.finished(name) for name in bench.suite.entries}
    of_test = {name: {seed: found["test"] for seed, found in scores.items()} for name, scores in rows.items()}
    base = of_test["baseline"]
    described = {}
    for name, scores in of_test.items():
        evaluated = bench.evaluated(name)
        if evaluated:
            others = name not in ("baseline", "inherit only")
            described[name] = {
                "scores": rows[name],
                "diverged": [seed for seed in evaluated if seed not in scores],
                "mean": estimate(list(scores.values())),
                "over_baseline": bench.over(name, "baseline") if name != "baseline" else None,
                "over_inherit_only": bench.over(name, "inherit only") if others else None,
                "gap_closure": gap_closure(scores, base, teacher.get("test", math.nan)) if name != "baseline" else None,
            }
    return {
        "suite": bench.suite.marker,
        "metric": bench.suite.metric,
        "length": bench.length._asdict(),
        "dataset": checksum(bench.data),
        "teacher": teacher,
        "rows": described,
    }


def table(bench: Bench, content: Mapping[str, Any]) -> str:
    """Markdown table of what `summary` gives, on the test split."""
    length, rows = bench.length, content["rows"]
    columns = {"over baseline": "over_baseline", "over inherit only": "over_inherit_only"}
    columns = {heading: key for heading, key in columns.items() if any(row[key] for row in rows.values())}
    header = ["run", "seeds", f"{bench.suite.called} (mean)", "lowest to highest", *columns, "gap closure"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, row in rows.items():
        scores = [found["test"] for found in row["scores"].values()]
        spread = f"{min(scores):.1f} to {max(scores):.1f}" if len(scores) > 1 else "one seed" if scores else "-"
        closure = row["gap_closure"]
        lost = f", {len(row['diverged'])} diverged" if row["diverged"] else ""
        cells = [name, f"{len(scores)}{lost}", f"{row['mean'].mean:.1f}" if row["mean"] else "-", spread]
        cells += [difference_text(row[key]) for key in columns.values()]
        lines.append([*cells, closure.text(".0f", 100, " %") if closure else "-"])
    teacher = content["teacher"].get("test", math.nan)
    about = (
        f"Teacher: {teacher:.1f} {bench.suite.called} after {length.teacher:,} iterations of {length.teacher_images} "
        f"images; students: {length.student:,} iterations of {length.student_images}. On test."
    )
    return "\n".join([about, "", *(f"| {' | '.join(line)} |" for line in lines)])


def difference_text(difference: Estimate | None) -> str:
    """A difference with its interval, and whether it is noise."""
    if difference is None:
        return "-"
    over = " (images)" if difference.over == "images" else ""
    return difference.text() + over + (", noise" if difference.within_noise else "")
