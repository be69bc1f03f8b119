"""Computes what follows from the choice of a decision threshold: errors, costs and net benefit.

A threshold is chosen on validation rows and applied to the evaluated rows.

Shapes: N rows, T thresholds.
"""

import numpy as np

from ray_jobs.train.metrics import ThresholdCounts

TARGETS = (0.8, 0.9, 0.95)
"""Recalls, and precisions, for which a threshold is chosen."""
_MAX_POINTS = 201


def choose_thresholds(
    counts: ThresholdCounts, cost_false_negative: float = 1.0, cost_false_positive: float = 1.0
) -> dict[str, float | None]:
    """Return thresholds by purpose, chosen on these rows; None for one that is impossible.

    `cost` has the least expected cost. `recall_0.9` has the highest precision among those with at
    least this recall, and `precision_0.9` the highest recall among those with at least this
    precision.
    """
    cost_T = counts.cost_T(cost_false_negative, cost_false_positive)
    least_T = np.isclose(cost_T, cost_T.min(), rtol=0, atol=1e-12)
    # Of equal thresholds, the middle one is farthest from the rows that would change the cost.
    middle = np.flatnonzero(least_T)[int(least_T.sum() - 1) // 2]
    chosen: dict[str, float | None] = {"cost": float(counts.threshold_T[middle])}
    rates = {"recall": counts.recall_T, "precision": counts.precision_T}
    for name, other in (("recall", "precision"), ("precision", "recall")):
        for target in TARGETS:
            is_enough_T = np.nan_to_num(rates[name], nan=-1.0) >= target - 1e-12
            best_T = np.where(is_enough_T, np.nan_to_num(rates[other], nan=-1.0), -1.0)
            index = int(np.argmax(best_T))
            found = best_T[index] >= 0
            chosen[f"{name}_{target:g}"] = float(counts.threshold_T[index]) if found else None
    return chosen


def threshold_curves(
    label_N: np.ndarray,
    probability_N: np.ndarray,
    weight_N: np.ndarray | None,
    cost_false_negative: float,
    cost_false_positive: float,
) -> dict[str, list[float | None]]:
    """Return metrics, cost and net benefit at evenly spaced thresholds from 0 to 1."""
    threshold_T = np.linspace(0, 1, _MAX_POINTS)
    counts = ThresholdCounts.of(label_N, probability_N, weight_N, threshold_T)
    # The odds of a threshold of 1 are infinite.
    inside_T = threshold_T < 1
    curves = {
        "threshold": threshold_T,
        "precision": counts.precision_T,
        "recall": counts.recall_T,
        "specificity": counts.specificity_T,
        "f1": counts.f1_T,
        "cost": counts.cost_T(cost_false_negative, cost_false_positive),
        "net_benefit": np.where(inside_T, counts.net_benefit_T, np.nan),
        "net_benefit_of_all": np.where(inside_T, counts.net_benefit_of_all_T, np.nan),
    }
    return {name: [_number(value) for value in values] for name, values in curves.items()}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
