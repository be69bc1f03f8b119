"""Compares the predictions of two models on the same rows.

N rows   D draws
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ray_jobs.evaluate.uncertainty.bootstrap import K, bootstrap_intervals

COMPARED = ("roc_auc", "pr_auc", "log_loss", "brier", "accuracy")
METRIC_NAMES = {
    "roc_auc": "ROC AUC",
    "pr_auc": "average precision",
    "log_loss": "log loss",
    "brier": "Brier score",
    "ece": "calibration error (ECE)",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1 score",
}

_LOWER_IS_BETTER = ("log_loss", "brier")

Statistics = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Computes metrics (D,) by name, given how often each row was drawn (D, N)."""


def compare(
    ours: Statistics,
    others: Mapping[str, Statistics],
    label_N: np.ndarray,
    group_N: np.ndarray | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return, by model and metric, the `difference` of ours, its 95 % interval and a verdict.

    The bootstrap draws the same rows for all models. The verdict is "better", "worse", or, if the
    interval includes 0, "cannot be told apart".

    Args:
        ours: Metrics of `COMPARED` of our model.
        others: Metrics of other models by name.
        label_N: Labels, 0 or 1.
        group_N: Index of each row's group; by default, rows are drawn one by one.
    """

    def differences(counts_DN: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
        first = ours(counts_DN)
        return {
            (name, metric): first[metric] - second[metric]
            for name, second in ((name, other(counts_DN)) for name, other in others.items())
            for metric in COMPARED
        }

    values = values_of(differences, len(label_N))
    compared: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in others}
    for (name, metric), interval in bootstrap_intervals(differences, label_N, group_N).items():
        low, high = interval or (None, None)
        verdict = "cannot be told apart"
        if low is not None and high is not None and not low <= 0 <= high:
            verdict = "better" if (low > 0) != (metric in _LOWER_IS_BETTER) else "worse"
        compared[name][metric] = {
            "difference": values[name, metric], "low": low, "high": high, "verdict": verdict,
        }  # fmt: skip
    return compared


def mcnemar(correct_N: np.ndarray, other_correct_N: np.ndarray) -> dict[str, Any]:
    """Return how many rows only one of two models classifies correctly, with the p-value.

    The exact test of McNemar 1947, "Note on the sampling error of the difference between correlated
    proportions or percentages": if the models are equally good, both are equally likely to be the
    correct one.

    Args:
        correct_N: Whether our model is correct.
        other_correct_N: Whether the other model is correct.
    """
    from scipy.stats import binomtest

    only_ours = int((correct_N & ~other_correct_N).sum())
    only_theirs = int((other_correct_N & ~correct_N).sum())
    differing = only_ours + only_theirs
    p_value = float(binomtest(only_ours, differing).pvalue) if differing else 1.0
    return {"only_ours": only_ours, "only_theirs": only_theirs, "p_value": p_value}


def values_of(
    statistics: Callable[[np.ndarray], Mapping[K, np.ndarray]], num_rows: int
) -> dict[K, float | None]:
    """Return the statistics of all rows, None where they are undefined."""
    values = statistics(np.ones((1, num_rows), np.uint16))
    return {name: None if np.isnan(value[0]) else float(value[0]) for name, value in values.items()}
