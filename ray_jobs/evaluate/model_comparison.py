"""Compares the predictions of two models on the same rows.

N rows   D draws
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ray_jobs.evaluate.bootstrap import bootstrap_intervals

COMPARED = ("roc_auc", "pr_auc", "log_loss", "brier", "accuracy")

_LOWER_IS_BETTER = ("log_loss", "brier")

Statistics = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Computes metrics (D,) by name, given how often each row was drawn (D, N)."""


def compare(
    ours: Statistics, theirs: Statistics, label_N: np.ndarray, group_N: np.ndarray | None = None
) -> dict[str, dict[str, Any]]:
    """Return, by metric, the `difference` of ours from theirs, its 95 % interval and a verdict.

    The bootstrap draws the same rows for both. The verdict is "better", "worse", or, if the
    interval includes 0, "cannot be told apart".

    Args:
        ours: Metrics of `COMPARED` of the first model.
        theirs: Metrics of the second model.
        label_N: Labels, 0 or 1.
        group_N: Index of each row's group; by default, rows are drawn one by one.
    """

    def differences(counts_DN: np.ndarray) -> dict[str, np.ndarray]:
        first, second = ours(counts_DN), theirs(counts_DN)
        return {name: first[name] - second[name] for name in COMPARED}

    values = values_of(differences, len(label_N))
    compared: dict[str, dict[str, Any]] = {}
    for name, interval in bootstrap_intervals(differences, label_N, group_N).items():
        low, high = interval or (None, None)
        verdict = "cannot be told apart"
        if low is not None and high is not None and not low <= 0 <= high:
            verdict = "better" if (low > 0) != (name in _LOWER_IS_BETTER) else "worse"
        compared[name] = {
            "difference": values[name], "low": low, "high": high, "verdict": verdict,
        }  # fmt: skip
    return compared


def values_of(statistics: Statistics, num_rows: int) -> dict[str, float | None]:
    """Return the statistics of all rows, None where they are undefined."""
    values = statistics(np.ones((1, num_rows), np.uint16))
    return {name: None if np.isnan(value[0]) else float(value[0]) for name, value in values.items()}
