"""The plot of a masked teacher's gate: drift and time over the share of the patches that it computes."""

from collections.abc import Iterable

from matplotlib.figure import Figure

from .curves import COLORS


def masking_plot(points: Iterable[tuple[str, float, float, float]], resized: float) -> Figure:
    """Draws the distance to the whole teacher's features, and the time, by selector.

    Args:
        points: (selector, share of the patches, cosine distance, time over that of the whole teacher).
        resized: the distance of the whole teacher's features on resized images, a line across.
    """
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    by_selector: dict[str, list[tuple[float, float, float]]] = {}
    for selector, *values in points:
        by_selector.setdefault(selector, []).append((values[0], values[1], values[2]))
    for color, (selector, rows) in zip(COLORS[1:], by_selector.items()):
        ratios, distances, times = zip(*sorted(rows))
        left.plot(ratios, distances, "o-", color=color, label=selector)
        right.plot(ratios, times, "o-", color=color, label=selector)
    left.axhline(resized, color=COLORS[0], linestyle="--", label="whole teacher, image resized by 10 %")
    left.set_ylabel("cosine distance to the whole teacher")
    right.plot([0, 1], [0, 1], color=COLORS[0], linestyle=":")
    right.set_ylabel("time / that of the whole teacher")
    for axes in (left, right):
        axes.set_xlabel("share of the patches")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    return figure
