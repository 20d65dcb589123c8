"""The results of a teacher and its student in one table of text, for the log."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from d2kd.evaluation.missing import class_of_metric

#: So many classes are listed; of more, those that differ most.
MAX_CLASSES = 100
SHOWN_CLASSES = 20


class Row(NamedTuple):
    """A metric of both models; NaN where one of them lacks it."""

    name: str
    teacher: float
    student: float

    @property
    def difference(self) -> float:
        """What the student has above the teacher."""
        return self.student - self.teacher


def side_by_side(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> str:
    """Returns a table of metric, teacher, student and difference: the main metrics first, those of classes after them.

    Args:
        teacher: results as Detectron2's evaluators give them; of several datasets, by dataset.
        student: likewise. What one of both lacks, or is not finite, is "-".
    """
    values = [{(*path, name): value for path, name, value in _numbers(results)} for results in (teacher, student)]
    names = list(dict.fromkeys([*values[0], *values[1]]))
    rows = [(name[-1], Row("/".join(name), *(v.get(name, math.nan) for v in values))) for name in names]
    main = [row for metric, row in rows if not class_of_metric(metric)]
    classes = [row for metric, row in rows if class_of_metric(metric)]
    note = ""
    if len(classes) > MAX_CLASSES:
        differing = [row for row in classes if math.isfinite(row.difference)]
        note = f"\nOf {len(classes)} metrics of classes, the {SHOWN_CLASSES} that differ most; result.json has all."
        classes = sorted(differing, key=lambda row: -abs(row.difference))[:SHOWN_CLASSES]
    return _text([*main, *classes]) + note


def _numbers(results: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, float]]:
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, (*path, name))
        elif value is not None:
            yield path, name, float(value)


def _text(rows: list[Row]) -> str:
    cells = [["metric", "teacher", "student", "difference"]]
    for row in rows:
        numbers = (_cell(row.teacher), _cell(row.student), _cell(row.difference, "+"))
        cells.append([row.name, *numbers])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join([c[0].ljust(widths[0]), *map(str.rjust, c[1:], widths[1:])]) + " |" for c in cells]
    rule = "|".join([":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def _cell(value: float, sign: str = "") -> str:
    return f"{value:{sign}.2f}" if math.isfinite(value) else "-"
