import numpy as np
import pytest
from scipy.stats import bootstrap, chi2
from sklearn import metrics

from ray_jobs.evaluate.uncertainty.draw_metrics import DrawMetrics
from ray_jobs.evaluate.uncertainty.model_comparison import COMPARED, compare, mcnemar


def draws(label, probability, weight=None):
    return DrawMetrics(label, probability, 0.5, weight, COMPARED).of


def test_the_interval_of_a_difference_equals_scipys_paired_bootstrap():
    rng = np.random.default_rng(0)
    label = (np.arange(120) % 3 == 0).astype(int)
    ours = 1 / (1 + np.exp(-label - rng.normal(size=120)))
    theirs = 1 / (1 + np.exp(-label - 2 * rng.normal(size=120)))
    others = {"theirs": draws(label, theirs), "ours": draws(label, ours)}
    compared = compare(draws(label, ours), others, label)
    found = compared["theirs"]["roc_auc"]

    def auc(y, score):
        """The share of pairs in order; `roc_auc_score` takes seconds for this many samples."""
        return np.mean(score[y == 1][:, None] > score[y == 0])

    expected = bootstrap(
        (label, ours, theirs), lambda y, a, b: auc(y, a) - auc(y, b), paired=True,
        vectorized=False, n_resamples=400, method="percentile", rng=1,
    ).confidence_interval  # fmt: skip
    scores = [metrics.roc_auc_score(label, by) for by in (ours, theirs)]
    assert found["difference"] == pytest.approx(scores[0] - scores[1])
    assert found["low"] == pytest.approx(expected.low, abs=0.02)
    assert found["high"] == pytest.approx(expected.high, abs=0.02)
    assert set(compared["theirs"]) == set(compared["ours"]) == set(COMPARED)
    for values in compared["ours"].values():
        assert values == {
            "difference": 0.0, "low": 0.0, "high": 0.0, "verdict": "cannot be told apart",
        }  # fmt: skip


def test_the_verdict_says_which_model_is_better_in_every_metric():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 400)
    right, random = 0.1 + 0.8 * label, rng.random(400)
    verdicts = compare(draws(label, right), {"random": draws(label, random)}, label)["random"]
    assert {values["verdict"] for values in verdicts.values()} == {"better"}
    verdicts = compare(draws(label, random), {"right": draws(label, right)}, label)["right"]
    assert {values["verdict"] for values in verdicts.values()} == {"worse"}


def test_differences_are_weighted():
    rng = np.random.default_rng(3)
    label, ours = rng.integers(0, 2, 101), rng.random(101)
    theirs, weight = ours[::-1].copy(), np.resize([1, 4, 2, 7], 101)
    others = {"theirs": draws(label, theirs, weight)}
    gain = compare(draws(label, ours, weight), others, label)["theirs"]["roc_auc"]
    aucs = [metrics.roc_auc_score(label, p, sample_weight=weight) for p in (ours, theirs)]
    assert gain["difference"] == pytest.approx(aucs[0] - aucs[1])


def test_mcnemar_counts_rows_that_only_one_model_classifies_correctly():
    ours = np.array([True] * 700 + [False] * 300)
    theirs = np.array([True] * 600 + [False] * 100 + [True] * 60 + [False] * 240)
    found = mcnemar(ours, theirs)
    assert (found["only_ours"], found["only_theirs"]) == (100, 60)
    # The chi-squared test with continuity correction approximates the exact one.
    assert found["p_value"] == pytest.approx(chi2.sf((abs(100 - 60) - 1) ** 2 / 160, 1), rel=0.06)
    assert mcnemar(ours, ours) == {"only_ours": 0, "only_theirs": 0, "p_value": 1.0}
