import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn import metrics

from ray_jobs.evaluate.bootstrap import auc_gain, bootstrap_intervals


def test_the_interval_of_a_mean_over_groups_has_the_standard_error_of_the_groups():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(100), 5)
    values = rng.normal(size=100)[group]
    label = np.arange(500) % 2
    intervals = bootstrap_intervals(lambda rows: {"mean": values[rows].mean()}, label, group)
    low, high = intervals["mean"] or (0, 0)
    expected = 2 * 1.96 * values[::5].std() / np.sqrt(100)
    assert high - low == pytest.approx(expected, rel=0.15)
    assert low < values.mean() < high
    # Rows of a group are equal, so single rows would give a narrower interval.
    single = bootstrap_intervals(lambda rows: {"mean": values[rows].mean()}, label)["mean"]
    assert single is not None
    assert single[1] - single[0] < 0.6 * expected


def test_draws_have_both_classes_and_an_undefined_statistic_has_no_interval():
    label = np.array([0, 0, 0, 0, 0, 1])

    def statistics(rows):
        assert 0 < label[rows].sum() < 6
        return {"rows": float(len(rows)), "undefined": None}

    assert bootstrap_intervals(statistics, label, num_draws=200) == {
        "rows": (6.0, 6.0),
        "undefined": None,
    }


def test_the_interval_of_a_gain_equals_scipys_paired_bootstrap():
    rng = np.random.default_rng(0)
    label = np.arange(120) % 3 == 0
    ours = label + rng.normal(size=120)
    theirs = label + 2 * rng.normal(size=120)
    label = label.astype(int)
    found = auc_gain(label, ours, theirs, num_draws=400)

    def auc(y, score):
        """The share of pairs in order; `roc_auc_score` takes seconds for this many samples."""
        return np.mean(score[y == 1][:, None] > score[y == 0])

    def gain(y, a, b):
        return auc(y, a) - auc(y, b)

    expected = bootstrap(
        (label, ours, theirs), gain, paired=True, vectorized=False, n_resamples=400,
        method="percentile", rng=1,
    ).confidence_interval  # fmt: skip
    scores = [metrics.roc_auc_score(label, by) for by in (ours, theirs)]
    assert found["difference"] == pytest.approx(scores[0] - scores[1])
    assert found["low"] == pytest.approx(expected.low, abs=0.02)
    assert found["high"] == pytest.approx(expected.high, abs=0.02)
    same = auc_gain(label, ours, ours, num_draws=50)
    assert same == {"difference": 0.0, "low": 0.0, "high": 0.0}


def test_the_gain_in_auc_is_weighted():
    rng = np.random.default_rng(3)
    label, ours = rng.integers(0, 2, 101), rng.random(101)
    theirs, weight = ours[::-1].copy(), np.resize([1, 4, 2, 7], 101)
    gain = auc_gain(label, ours, theirs, 20, weight)
    aucs = [metrics.roc_auc_score(label, p, sample_weight=weight) for p in (ours, theirs)]
    assert gain["difference"] == pytest.approx(aucs[0] - aucs[1])
