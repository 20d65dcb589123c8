"""Means over seeds and paired differences: against textbook values, literal formulas and drawn samples."""

import math
import statistics

import numpy as np
import pytest

from d2kd.evaluation.statistics import Estimate, estimate, gap_closure, paired_difference


@pytest.mark.parametrize("count, quantile", [(2, 12.7062), (3, 4.3027), (5, 2.7764), (31, 2.0423)])
def test_the_interval_is_students(count, quantile):
    values = list(np.random.default_rng(count).normal(5, 2, count))
    found = estimate(values)
    half = quantile * statistics.stdev(values) / math.sqrt(count)
    assert found.count == count and found.mean == pytest.approx(statistics.mean(values))
    assert [found.low, found.high] == pytest.approx([found.mean - half, found.mean + half], abs=1e-3)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 1.5, (2000, 3))
    held = [found.low <= 3.0 <= found.high for found in map(estimate, draws.tolist())]
    assert 0.93 < statistics.mean(held) < 0.97


def test_one_seed_has_no_interval_and_none_no_estimate():
    assert estimate([4.0, math.nan]) == Estimate(4.0) and Estimate(4.0).within_noise is None
    assert estimate([math.nan]) is None and estimate([]) is None


def test_pairs_take_out_what_a_seed_does_to_both():
    baseline = {1: 10.0, 2: 20.0, 3: 30.0, 7: 0.0}
    found = paired_difference({1: 12.0, 2: 22.5, 3: 31.5, 4: 99.0}, baseline)
    assert found.count == 3 and found.mean == pytest.approx(2.0) and found.within_noise is False
    assert found.high - found.low == pytest.approx(2 * 4.3027 * 0.5 / math.sqrt(3), abs=1e-3)
    assert paired_difference({1: 10.5, 2: 19.0}, baseline).within_noise is True
    assert paired_difference({5: 1.0}, baseline) is None


def test_gap_closure_is_the_mean_gain_over_the_mean_gap_and_needs_a_better_teacher():
    baseline = {1: 50.0, 2: 60.0}
    found = gap_closure({1: 65.0, 2: 75.0, 3: 0.0}, baseline, 80.0)
    assert found.mean == pytest.approx((15 + 15) / (30 + 20)) and found.count == 2
    assert gap_closure({1: 65.0, 2: 75.0}, baseline, 55.0) is None
    assert gap_closure({1: 65.0}, baseline, 60.0) == Estimate(1.5)
    assert gap_closure({1: 65.0}, baseline, math.nan) is None and gap_closure({3: 65.0}, baseline, 80.0) is None


def test_gap_closure_is_bounded_by_ratios_that_the_seeds_cannot_tell_from_it():
    baseline = {1: 50.0, 2: 54.0, 3: 49.0, 4: 52.0}
    student = {1: 65.0, 2: 66.0, 3: 66.5, 4: 64.0}
    found = gap_closure(student, baseline, 80.0)
    for ratio in (found.low, found.high):  # just so far that what is left has 0 at an end of its interval
        left = estimate([student[seed] - base - ratio * (80 - base) for seed, base in baseline.items()])
        assert min(abs(left.low), abs(left.high)) == pytest.approx(0, abs=1e-9)
    assert found.low < found.mean < found.high


def test_gap_closure_has_no_bounds_where_the_gap_is_noise():
    baseline = {1: 79.0, 2: 70.0, 3: 78.9}
    found = gap_closure({1: 80.0, 2: 80.0, 3: 80.0}, baseline, 80.0)
    assert found == Estimate(1.0, count=3) and found.within_noise is None
    assert found.text(".0f", 100, " %") == "100 [unbounded] %"


def test_the_bounds_of_a_gap_closure_hold_the_truth_as_often_as_they_say():
    rng, held = np.random.default_rng(0), []
    for _ in range(2000):
        base, noise = rng.normal(60, 2, 3), rng.normal(0, 1, 3)
        student = {n: 75.0 + one for n, one in enumerate(noise)}  # of a gap of 20, 15
        found = gap_closure(student, dict(enumerate(base.tolist())), 80.0)
        held.append(found.low is None or found.low <= 0.75 <= found.high)
    assert 0.93 < statistics.mean(held) < 0.97


def test_text_has_the_bounds():
    assert Estimate(3.14, 1.0, 5.25, 3).text() == "+3.1 [+1.0, +5.2]" and Estimate(0.5).text(".0f", 100, " %") == "50 %"
