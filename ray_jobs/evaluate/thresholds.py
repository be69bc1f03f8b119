"""Computes what follows from the choice of a decision threshold: errors, costs and net benefit.

A threshold is chosen on validation rows and applied to the evaluated rows.

Shapes: N rows, T thresholds.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

TARGETS = (0.8, 0.9, 0.95)
"""Recalls, and precisions, for which a threshold is chosen."""
_MAX_POINTS = 201


@dataclass(frozen=True)
class ThresholdCounts:
    """Weights of the rows by label and prediction, for each threshold; higher ones come last."""

    threshold_T: np.ndarray
    tp_T: np.ndarray
    fp_T: np.ndarray
    positives: float
    negatives: float

    @classmethod
    def of(
        cls,
        label_N: np.ndarray,
        probability_N: np.ndarray,
        weight_N: np.ndarray | None = None,
        threshold_T: np.ndarray | None = None,
    ) -> "ThresholdCounts":
        """Count the predictions at some thresholds.

        Args:
            label_N: 0 or 1.
            probability_N: Probability of 1.
            weight_N: Weights of the rows; by default, 1.
            threshold_T: Thresholds in ascending order. Default: all that differ in a prediction.
                Each is halfway between two probabilities, so that rounding cannot change a
                prediction; the last one predicts no row positive.
        """
        values_U, index_N = np.unique(probability_N, return_inverse=True)
        weight_N = np.ones(len(label_N)) if weight_N is None else weight_N
        positives_U = np.bincount(index_N, weight_N * label_N, len(values_U))
        negatives_U = np.bincount(index_N, weight_N * (1 - label_N), len(values_U))
        if threshold_T is None:
            above = max((1 + values_U[-1]) / 2, np.nextafter(values_U[-1], 2))
            ends = [values_U[0] / 2], [above]
            threshold_T = np.concatenate([ends[0], (values_U[1:] + values_U[:-1]) / 2, ends[1]])
        first_T = np.searchsorted(values_U, threshold_T)
        tp_T, fp_T = (
            np.append(np.cumsum(counts[::-1])[::-1], 0.0)[first_T]
            for counts in (positives_U, negatives_U)
        )
        return cls(threshold_T, tp_T, fp_T, float(positives_U.sum()), float(negatives_U.sum()))

    @property
    def precision_T(self) -> np.ndarray:
        """Precision; NaN if no row is predicted positive."""
        return _divide(self.tp_T, self.tp_T + self.fp_T)

    @property
    def recall_T(self) -> np.ndarray:
        """Recall; NaN without positives."""
        return _divide(self.tp_T, np.full(len(self.tp_T), self.positives))

    @property
    def specificity_T(self) -> np.ndarray:
        """Specificity; NaN without negatives."""
        return 1 - _divide(self.fp_T, np.full(len(self.fp_T), self.negatives))

    @property
    def f1_T(self) -> np.ndarray:
        """F1 score; NaN without positives."""
        f1_T = _divide(2 * self.tp_T, self.tp_T + self.fp_T + self.positives)
        return f1_T if self.positives else np.full(len(f1_T), np.nan)

    @property
    def net_benefit_T(self) -> np.ndarray:
        """Net benefit (Vickers and Elkin 2006, "Decision curve analysis").

        True positives minus false positives at the odds of the threshold, per row.
        """
        return self._benefit(self.tp_T, self.fp_T)

    @property
    def net_benefit_of_all_T(self) -> np.ndarray:
        """Net benefit if every row is predicted positive."""
        return self._benefit(self.positives, self.negatives)

    def _benefit(self, tp: Any, fp: Any) -> np.ndarray:
        odds_T = self.threshold_T / np.maximum(1 - self.threshold_T, 1e-9)
        return (tp - fp * odds_T) / (self.positives + self.negatives)

    def cost_T(self, cost_false_negative: float, cost_false_positive: float) -> np.ndarray:
        """Return the mean cost per row."""
        false_negatives_T = self.positives - self.tp_T
        cost_T = cost_false_negative * false_negatives_T + cost_false_positive * self.fp_T
        return cost_T / (self.positives + self.negatives)

    def at(self, index: int) -> dict[str, float | None]:
        """Return threshold, precision, recall, specificity and F1 score at one threshold."""
        values = {
            "threshold": self.threshold_T,
            "precision": self.precision_T,
            "recall": self.recall_T,
            "specificity": self.specificity_T,
            "f1": self.f1_T,
        }
        return {name: _number(value[index]) for name, value in values.items()}


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


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
