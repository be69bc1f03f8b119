import json
import warnings
from itertools import pairwise

import numpy as np
import pytest
from sklearn import calibration, metrics

from ray_jobs.train.metrics import (
    ECE_BINS,
    binary_metrics,
    choose_threshold,
    validation_metrics,
)


def rows(num_rows: int, seed: int, dtype: str = "f4") -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = np.arange(num_rows) % 4 == 0
    logit = rng.normal(size=num_rows) + 1.5 * label - 0.7
    return label.astype(np.int8), (1 / (1 + np.exp(-2 * logit))).astype(dtype)


def reference_metrics(label, probability, threshold) -> dict:
    probability = probability.astype(np.float64)
    called = probability >= threshold
    true, mean = calibration.calibration_curve(label, probability, n_bins=ECE_BINS)
    edges = np.linspace(0, 1, ECE_BINS + 1)
    counts = [np.sum((probability > low) & (probability <= high)) for low, high in pairwise(edges)]
    counts[0] += np.sum(probability == 0)
    weights = [count for count in counts if count]
    return {
        "accuracy": metrics.accuracy_score(label, called),
        "balanced_accuracy": metrics.balanced_accuracy_score(label, called),
        "roc_auc": metrics.roc_auc_score(label, probability),
        "pr_auc": metrics.average_precision_score(label, probability),
        "log_loss": metrics.log_loss(label, probability),
        "brier": metrics.brier_score_loss(label, probability),
        "ece": np.average(np.abs(true - mean), weights=weights),
        "precision": metrics.precision_score(label, called, zero_division=0),
        "recall": metrics.recall_score(label, called),
        "f1": metrics.f1_score(label, called),
    }


@pytest.mark.parametrize("threshold", [0.05, 0.73, 1.0])
@pytest.mark.parametrize(
    ("label", "probability"),
    [
        *(rows(num_rows, num_rows, dtype) for num_rows in (5, 1001) for dtype in ("f4", "f8")),
        # Certain and tied.
        (np.array([0, 1, 0, 1, 1, 0]), np.array([0.0, 1.0, 1.0, 0.0, 0.5, 0.5])),
    ],
)
def test_metrics_equal_those_of_scikit_learn_and_are_valid_json(label, probability, threshold):
    found = binary_metrics(label[:, None], probability[:, None], threshold)
    expected = reference_metrics(label, probability, threshold)
    assert found.keys() == {*expected, "threshold", "confusion", "num_rows", "class_counts"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    confusion = metrics.confusion_matrix(label, probability.astype(np.float64) >= threshold)
    assert found["confusion"] == confusion.tolist()
    assert found["class_counts"] == np.bincount(label).tolist()
    assert (found["num_rows"], found["threshold"]) == (len(label), threshold)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_row_at_the_threshold_is_positive_and_one_just_below_negative():
    assert binary_metrics(np.array([1, 0]), np.array([0.3, 0.2]), 0.3)["confusion"] == [
        [1, 0],
        [0, 1],
    ]
    just_below = np.float32(0.7)
    assert float(just_below) < 0.7
    label, probability = np.array([1, 0]), np.array([just_below, 0.1], np.float32)
    assert binary_metrics(label, probability, 0.7)["confusion"] == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("only", "undefined"),
    [
        (0, {"balanced_accuracy", "roc_auc", "pr_auc", "precision", "recall", "f1"}),
        (1, {"balanced_accuracy", "roc_auc"}),
    ],
)
def test_metrics_that_need_both_classes_are_null_without_a_warning(only, undefined):
    probability = np.array([0.2, 0.4, 0.9])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = binary_metrics(np.full(3, only), probability, 0.5)
    assert {name for name, value in found.items() if value is None} == undefined
    assert found["log_loss"] == pytest.approx(-np.log(np.abs(1 - only - probability)).mean())
    assert found["brier"] == pytest.approx(np.mean((only - probability) ** 2))
    assert found["accuracy"] == pytest.approx([2 / 3, 1 / 3][only])


def test_validation_metrics_equal_those_of_the_evaluation():
    label, probability = rows(100, seed=3)
    whole = binary_metrics(label, probability, 0.5)
    found = validation_metrics(label, probability)
    assert list(found) == ["log_loss", "roc_auc", "pr_auc", "accuracy"]
    assert found == {name: whole[name] for name in found}


@pytest.mark.parametrize("by", ["f1", "balanced_accuracy"])
@pytest.mark.parametrize("seed", range(5))
def test_the_chosen_threshold_maximizes_the_metric(by, seed):
    label, probability = rows(60, seed, "f8")
    chosen = choose_threshold(label, probability, by)
    scores = {float(p): binary_metrics(label, probability, float(p))[by] for p in probability}
    best = max(scores.values())
    assert binary_metrics(label, probability, chosen)[by] == pytest.approx(best, abs=1e-12)
    ties = [p for p, score in scores.items() if score == pytest.approx(best, abs=1e-12)]
    halves = [(p + max([q for q in scores if q < p], default=0.0)) / 2 for p in ties]
    assert chosen == pytest.approx(min(halves, key=lambda p: abs(p - 0.5)), abs=1e-12)
    # Rounding does not change predictions at the chosen threshold.
    rounded = probability.astype("f4").astype("f8")
    np.testing.assert_array_equal(rounded >= chosen, probability >= chosen)


@pytest.mark.parametrize("only", [0, 1])
@pytest.mark.parametrize("by", ["f1", "balanced_accuracy"])
def test_a_threshold_can_be_chosen_from_rows_of_one_class(by, only):
    chosen = choose_threshold(np.full(3, only), np.array([0.3, 0.45, 0.6]), by)
    assert chosen == pytest.approx(0.525) or chosen in (0.15, 0.375)


@pytest.mark.parametrize(
    ("label", "probability", "message"),
    [
        ([], [], "at least one, got 0 and 0"),
        ([0, 1], [0.5], "as many labels as probabilities and at least one, got 2 and 1"),
        ([0, 2], [0.5, 0.5], r"labels must be 0 or 1, got \[0, 2\]"),
        ([0, 1], [0.5, np.nan], r"between 0 and 1, got \[nan\]"),
        ([0, 1], [0.5, 1.5], r"between 0 and 1, got \[1.5\]"),
    ],
)
def test_invalid_rows_are_rejected_with_their_values(label, probability, message):
    with pytest.raises(ValueError, match=message):
        binary_metrics(np.array(label), np.array(probability), 0.5)


@pytest.mark.parametrize("by", ["f1", "balanced_accuracy"])
@pytest.mark.parametrize("unit", [1, 1e-4])
def test_weighted_metrics_equal_those_of_repeated_rows_and_of_scikit_learn(by, unit):
    """AutoGluon's weighted metrics took labels for probabilities (autogluon#5052), or failed."""
    label, probability = rows(101, 3)
    probability = probability.astype(np.float64)
    repeats = np.resize([1, 9, 1, 2, 30], 101)
    found = binary_metrics(label, probability, 0.4, unit * repeats)
    whole = (np.repeat(label, repeats), np.repeat(probability, repeats))
    expected = binary_metrics(*whole, 0.4)
    plain = binary_metrics(label, probability, 0.4)
    counts = ("confusion", "num_rows", "class_counts")
    for name, value in expected.items():
        assert found[name] == (plain[name] if name in counts else pytest.approx(value)), name
    changed = set(plain) - set(counts) - {"threshold"}
    assert all(found[name] != pytest.approx(plain[name], abs=1e-4) for name in changed)
    weight = {"sample_weight": repeats}
    assert found["roc_auc"] == pytest.approx(metrics.roc_auc_score(label, probability, **weight))
    brier = metrics.brier_score_loss(label, probability, **weight)
    assert found["brier"] == pytest.approx(brier)
    threshold = choose_threshold(label, probability, by, unit * repeats)
    assert threshold == pytest.approx(choose_threshold(*whole, by))
    assert threshold != choose_threshold(label, probability, by)
