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


def test_gap_closure_is_the_mean_over_seeds_and_needs_a_better_teacher():
    baseline = {1: 50.0, 2: 60.0}
    found = gap_closure({1: 65.0, 2: 75.0, 3: 0.0}, baseline, 80.0)
    assert found.mean == pytest.approx((15 / 30 + 15 / 20) / 2) and found.count == 2
    assert gap_closure({1: 65.0, 2: 75.0}, baseline, 60.0) is None
    assert gap_closure({1: 65.0}, baseline, 60.0).mean == pytest.approx(1.5)
    assert gap_closure({1: 65.0}, baseline, math.nan) is None


def test_text_has_the_bounds():
    assert Estimate(3.14, 1.0, 5.25, 3).text() == "+3.1 [+1.0, +5.2]" and Estimate(0.5).text(".0f", 100, " %") == "50 %"
