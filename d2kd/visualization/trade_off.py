"""What a model gives against what it takes: a metric over milliseconds."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from d2kd.visualization.curves import COLORS


class Trade(NamedTuple):
    """A model in the plot."""

    name: str
    milliseconds: float
    metric: float
    #: Models of one family have one color.
    family: str = ""
    #: Drawn as a ring instead of a disc.
    hollow: bool = False


def trade_off(points: Sequence[Trade], metric: str = "AP") -> Figure:
    """Draws models by time and metric, each with its name; those of a family are joined.

    Args:
        points: one or more.
        metric: what the vertical axis is called.
    """
    figure = Figure(figsize=(7.5, 4.2), dpi=120, layout="constrained")
    axis = figure.subplots()
    families = list(dict.fromkeys(point.family for point in points))
    for family in families:
        color = COLORS[families.index(family) % len(COLORS)]
        mine = sorted((p for p in points if p.family == family), key=lambda p: p.milliseconds)
        axis.plot([p.milliseconds for p in mine], [p.metric for p in mine], color=color, linewidth=1, alpha=0.4)
        for number, point in enumerate(mine):
            fill = "white" if point.hollow else color
            axis.plot(point.milliseconds, point.metric, "o", color=color, markerfacecolor=fill, markersize=8)
            above = number % 2 == 0  # neighbors of a family have the same metric
            axis.annotate(
                f"{point.name}\n{point.milliseconds:.1f} ms",
                (point.milliseconds, point.metric),
                xytext=(0, 9 if above else -9),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                color=color,
                fontsize=8,
            )
    low, high = min(p.metric for p in points), max(p.metric for p in points)
    room = max(high - low, 1.0) * 0.3
    axis.set(xlabel="milliseconds an image (less is better)", ylabel=metric, ylim=(low - room, high + room))
    axis.set_xlim(0, max(p.milliseconds for p in points) * 1.15)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
