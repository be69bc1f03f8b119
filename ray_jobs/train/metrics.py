"""Computes the metrics of a binary classifier, with NumPy and scikit-learn only.

Input: per row, a label 0 or 1 and the probability of 1. Output: plain numbers for JSON.

Everything is computed in float64, so the numbers equal scikit-learn's. A row is predicted positive
if probability >= threshold.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

ECE_BINS = 15


def binary_metrics(
    label: np.ndarray,
    probability: np.ndarray,
    threshold: float | np.ndarray,
    weight: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return all metrics of `metrics.json`.

    A metric is None if the rows lack a class that it needs: `roc_auc` and `balanced_accuracy` need
    both classes; `pr_auc`, `precision`, `recall` and `f1` need positives. `precision` is 0 if no
    row is predicted positive, as in scikit-learn. `pr_auc` is average precision, `confusion` is
    [[tn, fp], [fn, tp]], and `class_counts` is [rows with 0, rows with 1]. Both count rows; with
    weights, all other metrics are weighted as by scikit-learn's `sample_weight`.

    Args:
        label: 0 or 1, (N,) or (N, 1).
        probability: Probability of 1, same shape.
        threshold: Lowest probability of a predicted positive; one for all rows, or one for each.
        weight: Positive weight of each row, (N,); by default, 1.

    Raises:
        ValueError: If there are no rows, lengths differ, a label is not 0 or 1, or a probability
            is not between 0 and 1.
    """
    # This import takes a second, which the start-up of a worker need not wait for.
    from sklearn import metrics

    label, probability = _validated(label, probability)
    predicted = (probability >= threshold).astype(np.int64)
    counts = np.bincount(label, minlength=2)
    cells = 2 * label + predicted
    confusion = np.bincount(cells, minlength=4).reshape(2, 2).tolist()
    (tn, fp, fn, tp) = np.bincount(cells, weight, 4).tolist()
    by: dict[str, Any] = {"sample_weight": weight}
    both, positives = bool(counts.all()), bool(counts[1])
    rows = (label, probability)
    return {
        "accuracy": (tn + tp) / (tn + fp + fn + tp),
        "balanced_accuracy": (
            metrics.balanced_accuracy_score(label, predicted, **by) if both else None
        ),
        "roc_auc": metrics.roc_auc_score(*rows, **by) if both else None,
        "pr_auc": metrics.average_precision_score(*rows, **by) if positives else None,
        "log_loss": metrics.log_loss(*rows, labels=[0, 1], **by),
        "brier": float(np.average((probability - label) ** 2, weights=weight)),
        "ece": expected_calibration_error(*rows, weight),
        "precision": tp / ((tp + fp) or 1) if positives else None,
        "recall": tp / (tp + fn) if positives else None,
        "f1": 2 * tp / (2 * tp + fp + fn) if positives else None,
        "threshold": float(threshold) if np.ndim(threshold) == 0 else None,
        "confusion": confusion,
        "num_rows": len(label),
        "class_counts": counts.tolist(),
    }


def row_log_loss(label_N: np.ndarray, probability_N: np.ndarray) -> np.ndarray:
    """Return the log loss of each row; as in scikit-learn, that of a wrong row stays finite."""
    epsilon = np.finfo(np.float64).eps
    clipped_N = np.clip(probability_N.astype(np.float64), epsilon, 1 - epsilon)
    return -np.log(np.where(label_N == 1, clipped_N, 1 - clipped_N))


def validation_metrics(
    label: np.ndarray, probability: np.ndarray, weight: np.ndarray | None = None
) -> dict[str, float | None]:
    """Return log_loss, roc_auc, pr_auc and accuracy at 0.5, as in `binary_metrics`."""
    values = binary_metrics(label, probability, 0.5, weight)
    return {name: values[name] for name in ("log_loss", "roc_auc", "pr_auc", "accuracy")}


def expected_calibration_error(
    label: np.ndarray, probability: np.ndarray, weight: np.ndarray | None = None
) -> float:
    """Return the expected calibration error (ECE) over 15 bins of equal width.

    It is the mean absolute difference between the mean probability and the fraction of positives
    of a bin, weighted by the bin's rows (Naeini et al. 2015, "Obtaining Well Calibrated
    Probabilities Using Bayesian Binning", section "Calibration measures"; 15 bins as in Guo et al.
    2017, arXiv 1706.04599, section 4.1).
    """
    rows, mean_probability, fraction = reliability(label, probability, weight)
    gaps = np.abs(mean_probability - fraction)[rows > 0]
    return float(np.sum(gaps * rows[rows > 0]) / rows.sum())


def reliability(
    label: np.ndarray, probability: np.ndarray, weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows, mean probability and fraction of positives of each of 15 bins.

    With weights, the rows are their total weight. Empty bins have NaN.
    """
    label, probability = _validated(label, probability)
    bins = bin_of(probability)
    rows = np.bincount(bins, weight, minlength=ECE_BINS)
    filled = np.where(rows > 0, rows, np.nan)
    weight = np.ones(len(label)) if weight is None else weight
    mean_probability = np.bincount(bins, weight * probability, ECE_BINS) / filled
    fraction = np.bincount(bins, weight * label, ECE_BINS) / filled
    return rows, mean_probability, fraction


def bin_of(probability: np.ndarray) -> np.ndarray:
    """Return the index of each probability's bin.

    Bins include their upper edge, and the first one also 0, as in scikit-learn's
    `calibration_curve`.
    """
    return np.searchsorted(np.linspace(0.0, 1.0, ECE_BINS + 1)[1:-1], probability)


def choose_threshold(
    label: np.ndarray,
    probability: np.ndarray,
    by: float | Literal["f1", "balanced_accuracy"],
    weight: np.ndarray | None = None,
) -> float:
    """Return the decision threshold: the lowest probability of a predicted positive.

    A number is returned unchanged. For the name of a metric, returns the threshold that maximizes
    it on these rows: halfway between the lowest probability that is predicted positive and the next
    lower one, so that rounding cannot change a prediction. If several thresholds maximize it,
    returns the one nearest to 0.5.

    Raises:
        ValueError: If `by` is another name, or the rows are unusable (see `binary_metrics`).
    """
    if not isinstance(by, str):
        return float(by)
    if by not in ("f1", "balanced_accuracy"):
        raise ValueError(f"the threshold metric must be f1 or balanced_accuracy, not {by!r}")
    label, probability = _validated(label, probability)
    # The last threshold predicts no row positive.
    counts = ThresholdCounts.of(label, probability, weight)
    rates = (counts.f1_T,) if by == "f1" else (counts.recall_T, counts.specificity_T)
    score_T = np.nan_to_num(rates).sum(axis=0)[:-1]
    best = counts.threshold_T[:-1][np.isclose(score_T, score_T.max(), rtol=0, atol=1e-12)]
    return float(best[np.argmin(np.abs(best - 0.5))])


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
        found = {name: float(value[index]) for name, value in values.items()}
        return {name: None if np.isnan(value) else value for name, value in found.items()}


def _validated(label: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return labels as int64 (N,) and probabilities as float64 (N,)."""
    label, probability = np.ravel(label), np.ravel(probability).astype(np.float64)
    if len(label) != len(probability) or not len(label):
        raise ValueError(
            f"metrics need as many labels as probabilities and at least one, got {len(label)} and "
            f"{len(probability)}"
        )
    if not np.isin(label, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.unique(label)[:5].tolist()}")
    is_valid = (probability >= 0) & (probability <= 1)
    if not is_valid.all():
        raise ValueError(
            f"probabilities must be between 0 and 1, got {probability[~is_valid][:5].tolist()}"
        )
    return label.astype(np.int64), probability


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
