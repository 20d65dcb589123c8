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
    low: float | None = None  # None: of one value, nothing is known about the next one, or a ratio has no bounds
    high: float | None = None
    count: int = 1  # values
    over: str = "seeds"  # what was drawn anew to know how sure it is: "seeds", or "images" of one seed

    @property
    def within_noise(self) -> bool | None:
        """Whether 0 is within the bounds, so that it cannot be told from no difference; None without bounds."""
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high

    def text(self, style: str = "+.1f", factor: float = 1.0, unit: str = "") -> str:
        """The mean, and its bounds in brackets: "+3.1 [+1.2, +5.0]"; "[unbounded]" where several values have none."""
        bounds = [] if self.low is None or self.high is None else [self.low, self.high]
        words = ", ".join(f"{factor * bound:{style}}" for bound in bounds) or ("unbounded" if self.count > 1 else "")
        return f"{factor * self.mean:{style}}{f' [{words}]' if words else ''}{unit}"


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
    half = _quantile(len(known)) * statistics.stdev(known) / math.sqrt(len(known))
    return Estimate(mean, mean - half, mean + half, len(known))


def _quantile(count: int) -> float:
    """Student's t between which and its negative `CONFIDENCE` of the means of `count` values are."""
    return float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """Mean of `values` - `reference` over the seeds that both have; None where they share none.

    Runs of one seed share the order of images and the first weights of what is not inherited, so that a part of what a
    seed changes is in both and goes out.
    """
    return estimate([value - reference[seed] for seed, value in values.items() if seed in reference])


def gap_closure(values: Mapping[int, float], baseline: Mapping[int, float], teacher: float) -> Estimate | None:
    """The mean of value - baseline over that of teacher - baseline, of the seeds that both have.

    A mean of each seed's ratio would be ruled by the seed whose baseline happens to come nearest to the teacher. The
    bounds are those of a ratio of means (Fieller 1954), which holds all r for which the mean of
    (value - baseline) - r (teacher - baseline) cannot be told from 0; there are none where the gap itself cannot.

    Args:
        values: of the student, by seed.
        baseline: of the student alone, by seed.
        teacher: of the one teacher of all seeds; how sure it is itself does not count.

    Returns:
        None where they share no seed, or the teacher is not better than the baseline on average.
    """
    shared = [seed for seed in values if math.isfinite(values[seed] - baseline.get(seed, math.nan))]
    gains = [values[seed] - baseline[seed] for seed in shared]
    gaps = [teacher - baseline[seed] for seed in shared]
    if not shared or not (gap := statistics.fmean(gaps)) > 0:
        return None
    gain, count = statistics.fmean(gains), len(shared)
    if count == 1:
        return Estimate(gain / gap)
    factor = _quantile(count) ** 2 / count
    # All r with a r^2 - 2 b r + c <= 0.
    a = gap**2 - factor * statistics.variance(gaps)
    b = gap * gain - factor * statistics.covariance(gaps, gains)
    c = gain**2 - factor * statistics.variance(gains)
    if a <= 0:
        return Estimate(gain / gap, count=count)
    half = math.sqrt(max(b**2 - a * c, 0.0))
    return Estimate(gain / gap, (b - half) / a, (b + half) / a, count)
