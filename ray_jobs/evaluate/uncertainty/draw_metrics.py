"""Computes the metrics of `binary_metrics` for many weightings of the same rows at once.

A bootstrap draw is a weighting: how often each row was drawn.

    N rows   D draws   U distinct probabilities   C columns of sums
"""

from collections.abc import Iterable

import numpy as np

from ray_jobs.train.metrics import ECE_BINS, bin_of, row_log_loss

METRICS = (
    "accuracy", "balanced_accuracy", "roc_auc", "pr_auc", "log_loss", "brier", "ece", "precision",
    "recall", "f1",
)  # fmt: skip

BIASED = ("ece",)
"""Metrics without a bootstrap interval: on few rows, the calibration error even of a calibrated
model is above 0, and that of its draws is higher still."""


class DrawMetrics:
    """The metrics of one model's predictions, as functions of the rows that are drawn.

    Args:
        label_N: 0 or 1.
        probability_N: Probability of 1.
        threshold: Lowest probability of a predicted positive; one for all rows, or one for each.
        weight_N: Weights of the rows; by default, 1.
        names: Metrics to compute, of `METRICS`.
    """

    def __init__(
        self,
        label_N: np.ndarray,
        probability_N: np.ndarray,
        threshold: float | np.ndarray,
        weight_N: np.ndarray | None = None,
        names: Iterable[str] = METRICS,
    ) -> None:
        self.names = tuple(names)
        order_N = self._order_N = np.argsort(probability_N, kind="stable")
        self._weight_N = None if weight_N is None else weight_N[order_N].astype(np.float64)
        columns_NC = _sum_columns(label_N, probability_N, threshold, with_bins="ece" in self.names)
        self._sum_columns_NC = columns_NC[order_N]
        self._is_positive_N = label_N[order_N].astype(np.float64)
        sorted_N = probability_N[order_N]
        starts_U = np.flatnonzero(np.append(True, sorted_N[1:] != sorted_N[:-1]))
        self._starts_U = starts_U if len(starts_U) < len(sorted_N) else None

    def of(self, counts_DN: np.ndarray) -> dict[str, np.ndarray]:
        """Return each metric (D,), given how often each row was drawn; NaN where undefined."""
        weight_DN = counts_DN[:, self._order_N].astype(np.float64)
        if self._weight_N is not None:
            weight_DN *= self._weight_N
        tn, fp, fn, tp, log_loss, brier, *gaps = (weight_DN @ self._sum_columns_NC).T
        negatives, positives = tn + fp, fn + tp
        total = negatives + positives
        recall = _ratio(tp, positives)
        found = {
            "accuracy": (tn + tp) / total,
            "balanced_accuracy": (recall + _ratio(tn, negatives)) / 2,
            "log_loss": log_loss / total,
            "brier": brier / total,
            "ece": np.abs(gaps).sum(axis=0) / total,
            # Without predicted positives, precision is 0, as in scikit-learn.
            "precision": np.where(positives > 0, _ratio(tp, tp + fp, otherwise=0.0), np.nan),
            "recall": recall,
            "f1": np.where(positives > 0, _ratio(2 * tp, 2 * tp + fp + fn), np.nan),
        }
        if {"roc_auc", "pr_auc"} & set(self.names):
            found |= self._areas(weight_DN)
        return {name: found[name] for name in self.names}

    def _areas(self, weight_DN: np.ndarray) -> dict[str, np.ndarray]:
        """Return ROC AUC and average precision, given the weights in order of probability.

        Equal probabilities are one threshold.
        """
        positive_DU = weight_DN * self._is_positive_N
        negative_DU = weight_DN - positive_DU
        if self._starts_U is not None:
            positive_DU = np.add.reduceat(positive_DU, self._starts_U, axis=1)
            negative_DU = np.add.reduceat(negative_DU, self._starts_U, axis=1)
        below_DU = np.cumsum(negative_DU, axis=1)
        positives, negatives = positive_DU.sum(axis=1), below_DU[:, -1]
        areas = {}
        if "roc_auc" in self.names:
            in_order = np.einsum("du,du->d", positive_DU, below_DU - negative_DU / 2)
            areas["roc_auc"] = _ratio(in_order, positives * negatives)
        if "pr_auc" in self.names:
            # With a probability as the threshold, the rows at it and above are predicted positive.
            fp_DU = negatives[:, None] - below_DU + negative_DU
            tp_DU = positives[:, None] - np.cumsum(positive_DU, axis=1) + positive_DU
            precision_DU = _ratio(tp_DU, tp_DU + fp_DU, otherwise=0.0)
            areas["pr_auc"] = _ratio(np.einsum("du,du->d", positive_DU, precision_DU), positives)
        return areas


def _sum_columns(
    label_N: np.ndarray,
    probability_N: np.ndarray,
    threshold: float | np.ndarray,
    with_bins: bool,
) -> np.ndarray:
    """Return what each row adds to the sums: four cells, log loss, Brier score, ECE bins (N, C)."""
    probability_N = probability_N.astype(np.float64)
    is_predicted_N, is_positive_N = probability_N >= threshold, label_N == 1
    gap_N = probability_N - label_N
    cells = [
        (is_positive_N == label) & (is_predicted_N == prediction)
        for label in (False, True)
        for prediction in (False, True)
    ]
    columns = [*cells, row_log_loss(label_N, probability_N), gap_N**2]
    if with_bins:
        bins_NK = np.arange(ECE_BINS) == bin_of(probability_N)[:, None]
        columns.append(gap_N[:, None] * bins_NK)
    return np.column_stack(columns)


def _ratio(above: np.ndarray, below: np.ndarray, otherwise: float = np.nan) -> np.ndarray:
    """Return above / below, or another number where both are 0."""
    return np.divide(above, below, out=np.full(above.shape, otherwise), where=below > 0)
