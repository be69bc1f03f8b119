import numpy as np
import pytest

from ray_jobs.evaluate.uncertainty.bootstrap import bootstrap_intervals, draw_rows
from ray_jobs.evaluate.uncertainty.draw_metrics import METRICS, DrawMetrics
from ray_jobs.train.metrics import binary_metrics


def mean_of(values: np.ndarray):
    return lambda counts_DN: {"mean": counts_DN @ values / counts_DN.sum(axis=1)}


def test_the_interval_of_a_mean_over_groups_has_the_standard_error_of_the_groups():
    rng = np.random.default_rng(0)
    # Group numbers need not be consecutive.
    group = np.repeat(np.arange(100) * 7, 5)
    values = np.repeat(rng.normal(size=100), 5)
    label = np.arange(500) % 2
    low, high = bootstrap_intervals(mean_of(values), label, group)["mean"] or (0, 0)
    expected = 2 * 1.96 * values[::5].std() / np.sqrt(100)
    assert high - low == pytest.approx(expected, rel=0.15)
    assert low < values.mean() < high
    # Rows of a group are equal, so single rows would give a narrower interval.
    single = bootstrap_intervals(mean_of(values), label)["mean"]
    assert single is not None
    assert single[1] - single[0] < 0.6 * expected


def test_draws_have_both_classes_and_an_undefined_statistic_has_no_interval():
    label = np.array([0, 0, 0, 0, 0, 1])
    counts_DN = np.concatenate(list(draw_rows(label, num_draws=200)))
    assert counts_DN.shape == (200, 6)
    assert (counts_DN.sum(axis=1) == 6).all()
    assert ((counts_DN @ label > 0) & (counts_DN @ label < 6)).all()

    def statistics(counts_DN):
        rows = counts_DN.sum(axis=1)
        return {"rows": rows, "undefined": np.where(rows > 6, 1.0, np.nan)}

    assert bootstrap_intervals(statistics, label) == {"rows": (6.0, 6.0), "undefined": None}
    only_negative = bootstrap_intervals(mean_of(np.arange(6)), np.zeros(6))["mean"]
    assert only_negative is not None


@pytest.mark.parametrize("digits", [1, 9], ids=["ties", "no ties"])
def test_the_metrics_of_a_draw_are_those_of_the_drawn_rows(digits):
    rng = np.random.default_rng(1)
    label, weight = rng.integers(0, 2, 60), rng.random(60) + 0.1
    probability = np.round(0.6 * rng.random(60) + 0.4 * label, digits)
    threshold = np.where(np.arange(60) % 2, 0.4, 0.7)
    draws = DrawMetrics(label, probability, threshold, weight)
    counts_DN = np.concatenate(list(draw_rows(label, num_draws=5)))
    found = draws.of(counts_DN)
    assert tuple(found) == METRICS
    for draw, counts in enumerate(counts_DN):
        rows = np.repeat(np.arange(60), counts)
        expected = binary_metrics(label[rows], probability[rows], threshold[rows], weight[rows])
        for name in METRICS:
            assert found[name][draw] == pytest.approx(expected[name]), name


@pytest.mark.parametrize("label", [0, 1])
def test_metrics_that_need_the_other_class_are_undefined(label):
    rows = np.full(5, label), np.linspace(0, 1, 5)
    found = DrawMetrics(*rows, 0.5).of(np.ones((1, 5)))
    expected = binary_metrics(*rows, 0.5)
    assert [n for n, v in found.items() if np.isnan(v[0])] == [
        n for n in METRICS if expected[n] is None
    ]
    assert found["log_loss"][0] == pytest.approx(expected["log_loss"])


@pytest.mark.slow  # a million draws, 20 s
def test_intervals_of_300_rows_cover_the_true_metric_in_95_percent_of_datasets():
    names = ("accuracy", "roc_auc", "log_loss", "precision", "recall")

    def simulate(num_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        label = (rng.random(num_rows) < 0.3).astype(int)
        score = rng.normal(size=num_rows) + 1.6 * label
        return label, 1 / (1 + np.exp(1.28 - 1.6 * score - np.log(3 / 7)))

    true = binary_metrics(*simulate(2_000_000, 0), 0.5)
    num_covered = dict.fromkeys(names, 0)
    for seed in range(1000):
        label, probability = simulate(300, seed + 1)
        draws = DrawMetrics(label, probability, 0.5, names=names)
        for name, interval in bootstrap_intervals(draws.of, label).items():
            low, high = interval or (0, 0)
            num_covered[name] += low <= true[name] <= high
    assert all(920 <= covered <= 980 for covered in num_covered.values()), num_covered
