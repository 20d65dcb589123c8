"""Means over seeds, paired differences between runs of the same seed, and how sure they are."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

#: Of intervals: so often, over many repetitions with other seeds, they hold the value that they are about.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean, and between which bounds it is known at `CONFIDENCE`."""

    mean: float
    low: float | None = None  # None: of one value, nothing is known about the next one
    high: float | None = None
    count: int = 1  # values
    over: str = "seeds"  # what was drawn anew to know how sure it is: "seeds", or "images" of one seed

    @property
    def within_noise(self) -> bool | None:
        """Whether 0 is within the bounds, so that it cannot be told from no difference; None without bounds."""
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high

    def text(self, style: str = "+.1f", factor: float = 1.0, unit: str = "") -> str:
        """The mean, and its bounds in brackets: "+3.1 [+1.2, +5.0]"."""
        bounds = [] if self.low is None or self.high is None else [self.low, self.high]
        known = f" [{', '.join(f'{factor * bound:{style}}' for bound in bounds)}]" if bounds else ""
        return f"{factor * self.mean:{style}}{known}{unit}"


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean of values of independent seeds, with Student's interval: mean +- t(n - 1) s / sqrt(n).

    Args:
        values: those that are not finite do not count.

    Returns:
        None where no value is left; without bounds where one is.
    """
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return None
    mean = statistics.fmean(known)
    if len(known) == 1:
        return Estimate(mean)
    half = float(stdtrit(len(known) - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(known) / math.sqrt(len(known))
    return Estimate(mean, mean - half, mean + half, len(known))


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """Mean of `values` - `reference` over the seeds that both have; None where they share none.

    Runs of one seed share the order of images and the first weights of what is not inherited, so that a part of what a
    seed changes is in both and goes out.
    """
    return estimate([value - reference[seed] for seed, value in values.items() if seed in reference])


def gap_closure(values: Mapping[int, float], baseline: Mapping[int, float], teacher: float) -> Estimate | None:
    """Mean of (value - baseline) / (teacher - baseline) over the seeds that both have.

    Args:
        values: of the student, by seed.
        baseline: of the student alone, by seed.
        teacher: of the one teacher of all seeds; how sure it is itself does not count.

    Returns:
        None where they share no seed, or the teacher is not better than the baseline of one of them.
    """
    shared = [seed for seed in values if math.isfinite(values[seed] - baseline.get(seed, math.nan))]
    if not all(teacher > baseline[seed] for seed in shared):
        return None
    return estimate([(values[seed] - baseline[seed]) / (teacher - baseline[seed]) for seed in shared])
