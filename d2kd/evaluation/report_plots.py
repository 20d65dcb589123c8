"""The plots of report.html as SVG: a metric against what a model costs, and curves over iterations."""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from d2kd.visualization.curves import smooth

WIDTH, HEIGHT = 400, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 14, 44  # margins around the area of the data
#: From this ratio of the largest to the smallest value on, an axis is logarithmic.
LOG_FROM = 5.0
#: Colors and dashes of models that page.css has; further models begin anew.
STYLES = 6
_LINE = 15  # height of a label
_LETTER = 6.4  # mean width of a letter
_LONGEST = 24  # letters of a label


class Cost(NamedTuple):
    """What a model scores, and what it costs."""

    name: str  # as the plot calls it
    metric: float
    cost: float  # above 0
    unit: str  # of the cost, with what it is: "milliseconds an image", "million parameters"


class Axis(NamedTuple):
    """A range of values on one side of a plot."""

    low: float
    high: float
    logarithmic: bool

    def place(self, value: float) -> float:
        """Where a value is, from 0 at `low` to 1 at `high`."""
        low, high, value = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values in the range."""
        step = _round_step(self.high - self.low)
        equal = [n * step for n in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]
        if not self.logarithmic:
            return equal
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        decades = [10.0**p for p in powers]
        ticks = [digit * decade for decade in decades for digit in (1, 2, 5) if self.low <= digit * decade <= self.high]
        tens = [tick for tick in decades if self.low <= tick <= self.high]
        return tens if len(ticks) > 7 and len(tens) > 2 else ticks if len(ticks) > 2 else equal


def axis(values: Sequence[float], *, logarithmic: bool = False, zero: bool = False) -> Axis:
    """An axis with room for finite values.

    Args:
        values: at least one; above 0 for a logarithmic axis.
        logarithmic: tick by factors.
        zero: begin at 0 where no value is below it.
    """
    low, high = min(values), max(values)
    if logarithmic:
        low, high = low / 1.35, high * 1.35
        return Axis(low, high, True)
    span = max(high - low, 0.1 * abs(high), 1e-6)
    low = min(low, 0.0) if zero else low - 0.1 * span
    step = _round_step(max(high - low, span) * 1.1)
    return Axis(math.floor(low / step + 1e-9) * step, math.ceil(high / step + 0.15) * step, False)


def trade_off(points: Sequence[Cost], metric: str = "AP", arrow: tuple[str, str] | None = None) -> str:
    """Draws what models score against what they cost, as SVG; "" without a point.

    Args:
        points: all with the same unit. Those with a number that is not finite, or without a cost, are left out.
        metric: what the vertical axis is called.
        arrow: the names of two points, of which an arrow leads from the first to the second.
    """
    numbered = [(n, p) for n, p in enumerate(points) if math.isfinite(p.metric) and 0 < p.cost < math.inf]
    if not numbered:
        return ""
    costs, metrics = [p.cost for _, p in numbered], [p.metric for _, p in numbered]
    across = axis(costs, logarithmic=max(costs) / min(costs) >= LOG_FROM, zero=True)
    up = axis(metrics, zero=min(metrics) < 0.5 * max(metrics))
    unit = numbered[0][1].unit
    places = {p.name: _at(across, up, p.cost, p.metric) for _, p in numbered}
    parts = list(_frame(across, up, unit, metric))
    if arrow and set(arrow) <= set(places):
        parts.append(_arrow(places[arrow[0]], places[arrow[1]]))
    for number, point in numbered:
        x, y = places[point.name]
        title = html.escape(f"{point.name}: {point.metric:.1f} {metric}, {_short(point.cost)} {unit}")
        parts.append(f'<g class="m{number % STYLES}"><title>{title}</title>{_marker(number, x, y, 7)}</g>')
    for (_, point), (x, y, end) in zip(numbered, _label_places([places[p.name] for _, p in numbered], numbered)):
        text = html.escape(_label(point))
        parts.append(f'<text class="label" x="{x:.1f}" y="{y:.1f}"{end}>{text}</text>')
    described = "; ".join(f"{p.name} {p.metric:.1f} {metric} at {_short(p.cost)} {unit}" for _, p in numbered)
    return _svg(parts, described)


def curves(lines: Mapping[str, np.ndarray], label: str, *, marked: bool = False, logarithmic: bool = False) -> str:
    """Draws values over iterations, as SVG; "" without a value.

    Args:
        lines: (N, 2) of iteration and value, by the name of the model, in the order of the colors.
        label: what the vertical axis is called.
        marked: every value has its mark; else lines of many values are smoothed.
        logarithmic: the vertical axis is, if all values are above 0.
    """
    drawn = {
        name: (number, line if marked else smooth(line))
        for number, (name, values) in enumerate(lines.items())
        if len(line := values[np.isfinite(values).all(1)])
    }
    if not drawn:
        return ""
    values = np.concatenate([line for _, line in drawn.values()])
    up = axis(values[:, 1].tolist(), logarithmic=bool(logarithmic and (values[:, 1] > 0).all()), zero=True)
    across = axis([*values[:, 0].tolist(), 0.0, 1.0], zero=True)
    across = across._replace(high=max(float(values[:, 0].max()), 1.0))
    parts = list(_frame(across, up, "iteration", label))
    for name, (number, line) in drawn.items():
        places = [_at(across, up, float(x), float(y)) for x, y in line]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        size = 4 if len(places) > 1 else 6
        marks = "".join(_marker(number, x, y, size) for x, y in places) if marked else ""
        last = html.escape(f"{name}: {line[-1, 1]:.3g} at iteration {line[-1, 0]:,.0f}")
        parts.append(f'<g class="m{number % STYLES}"><title>{last}</title><path class="line" d="{path}"/>{marks}</g>')
    return _svg(parts, f"{label} over iterations of {', '.join(drawn)}")


def swatch(number: int) -> str:
    """The sign of a model in legends: its line and its mark."""
    inner = f'<path class="line" d="M1 8H27"/>{_marker(number, 14, 8, 4.5)}'
    return f'<svg class="swatch m{number % STYLES}" viewBox="0 0 28 16" aria-hidden="true">{inner}</svg>'


def _svg(parts: Sequence[str], described: str) -> str:
    label = html.escape(described)
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _frame(across: Axis, up: Axis, below: str, beside: str) -> Iterator[str]:
    """Grid, numbers and names of both axes."""
    bottom = HEIGHT - BOTTOM
    for tick in up.ticks():
        y = _at(across, up, across.low, tick)[1]
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
    for tick in across.ticks():
        x = _at(across, up, tick, up.low)[0]
        yield f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{_short(tick)}</text>'
    middle, center = (LEFT + WIDTH - RIGHT) / 2, (TOP + bottom) / 2
    yield f'<text class="name" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(below)}</text>'
    turned = f'transform="rotate(-90 13 {center})"'
    yield f'<text class="name" x="13" y="{center}" text-anchor="middle" {turned}>{html.escape(beside)}</text>'


def _at(across: Axis, up: Axis, x: float, y: float) -> tuple[float, float]:
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return LEFT + width * across.place(x), TOP + height * (1 - up.place(y))


def _marker(number: int, x: float, y: float, size: float) -> str:
    """A shape for every style, so that colors are not needed to tell models apart."""
    low, high, left, right = y + size, y - size, x - size, x + size
    shapes = (
        f"M{left:.1f} {y:.1f}a{size} {size} 0 1 0 {2 * size} 0a{size} {size} 0 1 0 {-2 * size} 0Z",
        f"M{left:.1f} {high:.1f}H{right:.1f}V{low:.1f}H{left:.1f}Z",
        f"M{x:.1f} {high:.1f}L{right:.1f} {low:.1f}H{left:.1f}Z",
        f"M{x:.1f} {high - 1:.1f}L{right + 1:.1f} {y:.1f}L{x:.1f} {low + 1:.1f}L{left - 1:.1f} {y:.1f}Z",
        f"M{x:.1f} {low:.1f}L{right:.1f} {high:.1f}H{left:.1f}Z",
        f"M{left:.1f} {high:.1f}L{right:.1f} {low:.1f}M{left:.1f} {low:.1f}L{right:.1f} {high:.1f}",
    )
    return f'<path class="marker" d="{shapes[number % STYLES]}"/>'


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    """A line that leaves the marks at both ends free."""
    length = math.dist(start, end)
    if length < 36:
        return ""
    across, along = (end[0] - start[0]) / length, (end[1] - start[1]) / length
    x0, y0, x1, y1 = start[0] + 11 * across, start[1] + 11 * along, end[0] - 12 * across, end[1] - 12 * along
    head = "".join(
        f"M{x1 - 7 * across + s * 4 * along:.1f} {y1 - 7 * along - s * 4 * across:.1f}L{x1:.1f} {y1:.1f}"
        for s in (1, -1)
    )
    return f'<path class="arrow" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/><path class="head" d="{head}"/>'


def _label(point: Cost) -> str:
    name = point.name if len(point.name) <= _LONGEST else point.name[: _LONGEST - 1] + "…"
    return f"{name} {point.metric:.1f}"


def _label_places(
    places: Sequence[tuple[float, float]], points: Sequence[tuple[int, Cost]]
) -> list[tuple[float, float, str]]:
    """Where labels stand beside their points, moved apart upwards and downwards; with the side that they end at."""
    order = sorted(range(len(places)), key=lambda n: places[n][1])
    heights: dict[int, float] = {}
    last = -math.inf
    for n in order:
        last = heights[n] = max(places[n][1] + 4, last + _LINE)
    limit = float(HEIGHT - BOTTOM - 4)
    for n in reversed(order):
        heights[n] = min(heights[n], limit)
        limit = heights[n] - _LINE
    found = []
    for n, (x, _) in enumerate(places):
        fits = x + 12 + _LETTER * len(_label(points[n][1])) <= WIDTH
        found.append((x + 12 if fits else x - 12, heights[n], "" if fits else ' text-anchor="end"'))
    return found


def _round_step(span: float) -> float:
    """A step of 1, 2 or 5 times a power of ten, of which about five make the span."""
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    return next((digit * power for digit in (1, 2, 5) if digit * power >= raw), 10 * power)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
