"""Paired t, Holm and the bootstrap over tasks and seeds, against scipy and numbers worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from gist_dist.report.statistics import bootstrap, holm, paired


def test_paired_differences_are_student_s():
    differences = [1.2, 0.4, 0.9, 1.7, 0.3]
    found = paired(differences)
    interval = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert (found.number, found.mean) == (5, pytest.approx(0.9))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(stats.ttest_rel(differences, np.zeros(5)).pvalue)


def test_one_pair_and_equal_pairs_claim_no_chance():
    alone = paired([2.0])
    assert (alone.mean, alone.low, alone.p) == (2.0, None, None)
    equal = paired([2.0, 2.0])
    assert (equal.sd, equal.low, equal.high, equal.p) == (0.0, 2.0, 2.0, None)


def test_holm_is_worked_out_by_hand():
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06], nan_ok=True)
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_bootstrap_covers_both_tasks_and_seeds():
    """Where all tasks differ alike only the seeds vary, and the other way round."""
    rng = np.random.default_rng(3)
    seeds = rng.normal(1.0, 0.5, 8).tolist()
    alike = bootstrap({f"task {number}": seeds for number in range(6)})
    drawn = rng.choice(seeds, (20_000, 8)).mean(axis=1)
    assert alike == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)
    apart = bootstrap({f"task {number}": [float(number)] * 8 for number in range(6)})
    assert apart is not None and apart[0] < 1.5 < 3.5 < apart[1]
    assert bootstrap({"one": [1.0, 2.0]}) is None and bootstrap({"one": [1.0], "two": [2.0]}) is None
    assert bootstrap({"a": seeds, "b": seeds[::-1]}, seed=1) == bootstrap({"a": seeds, "b": seeds[::-1]}, seed=1)
