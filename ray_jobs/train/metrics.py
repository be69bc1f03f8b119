"""How good the probabilities of a yes/no model are: NumPy and scikit-learn only.

Enters: labels 0 or 1 and the probability of 1, one of each a row.  Leaves: plain numbers for JSON.

Everything is computed in float64 from the probabilities as they are, so that the numbers equal
scikit-learn's on the same predictions. A row is called positive where probability >= threshold.
"""

from typing import Any, Literal

import numpy as np
from sklearn import metrics

ECE_BINS = 15


def binary_metrics(label: np.ndarray, probability: np.ndarray, threshold: float) -> dict[str, Any]:
    """Return all metrics of `metrics.json`.

    Where the rows are of one class, what needs the other is None: `roc_auc` and
    `balanced_accuracy` need both, `pr_auc`, `precision`, `recall` and `f1` need positives.
    `precision` is 0 where no row is called positive, as in scikit-learn. `pr_auc` is average
    precision, `confusion` is [[tn, fp], [fn, tp]], `class_counts` is [rows of 0, rows of 1].

    Args:
        label: 0 or 1, (N,) or (N, 1).
        probability: of 1, same shape.
        threshold: from which a row is called positive.

    Raises:
        ValueError: if there are no rows, lengths differ, a label is not 0 or 1, or a probability
            is not between 0 and 1.
    """
    label, probability = _checked(label, probability)
    called = (probability >= threshold).astype(np.int64)
    counts = np.bincount(label, minlength=2)
    ((tn, fp), (fn, tp)) = metrics.confusion_matrix(label, called, labels=[0, 1]).tolist()
    both, positives = bool(counts.all()), bool(counts[1])
    return {
        "accuracy": (tn + tp) / len(label),
        "balanced_accuracy": metrics.balanced_accuracy_score(label, called) if both else None,
        "roc_auc": metrics.roc_auc_score(label, probability) if both else None,
        "pr_auc": metrics.average_precision_score(label, probability) if positives else None,
        "log_loss": metrics.log_loss(label, probability, labels=[0, 1]),
        "brier": float(np.mean((probability - label) ** 2)),
        "ece": expected_calibration_error(label, probability),
        "precision": tp / max(tp + fp, 1) if positives else None,
        "recall": tp / (tp + fn) if positives else None,
        "f1": 2 * tp / (2 * tp + fp + fn) if positives else None,
        "threshold": float(threshold),
        "confusion": [[tn, fp], [fn, tp]],
        "num_rows": len(label),
        "class_counts": counts.tolist(),
    }


def validation_metrics(label: np.ndarray, probability: np.ndarray) -> dict[str, float | None]:
    """Return log_loss, roc_auc, pr_auc and accuracy (at 0.5), as `binary_metrics` does."""
    names = ("log_loss", "roc_auc", "pr_auc", "accuracy")
    found = binary_metrics(label, probability, threshold=0.5)
    return {name: found[name] for name in names}


def auc_gain(
    label: np.ndarray, ours: np.ndarray, theirs: np.ndarray, num_draws: int = 10_000
) -> dict[str, float]:
    """Return `difference` of two models' ROC AUC, ours less theirs, and its 95 % interval.

    From `low` to `high`, by a paired bootstrap: rows are drawn with replacement, for both models
    alike (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13: percentiles).

    Args:
        label: 0 or 1, (N,), both of them there.
        ours: probabilities of 1, (N,).
        theirs: likewise.
        num_draws: draws of the bootstrap; some 3 ms each.
    """
    auc, rng, differences = metrics.roc_auc_score, np.random.default_rng(0), []
    while len(differences) < num_draws:
        rows = rng.integers(0, len(label), len(label))
        drawn = label[rows]
        if 0 < drawn.sum() < len(drawn):
            differences.append(auc(drawn, ours[rows]) - auc(drawn, theirs[rows]))
    low, high = np.quantile(differences, [0.025, 0.975])
    whole = auc(label, ours) - auc(label, theirs)
    return {"difference": float(whole), "low": float(low), "high": float(high)}


def expected_calibration_error(label: np.ndarray, probability: np.ndarray) -> float:
    """Return how far probabilities are from frequencies, on average over the rows.

    The rows are put into 15 bins of equal width by their probability of 1; in each bin counts the
    absolute difference between mean probability and share of 1, weighted by the bin's rows
    (Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning", section
    "Calibration measures"; 15 bins as in Guo et al. 2017, arXiv 1706.04599, section 4.1).
    """
    rows, mean_probability, share = reliability(label, probability)
    gaps = np.abs(mean_probability - share)[rows > 0]
    return float(np.sum(gaps * rows[rows > 0]) / rows.sum())


def reliability(
    label: np.ndarray, probability: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows, mean probability and share of 1 of each of 15 bins; NaN where a bin is empty.

    A bin holds its upper edge, the first one 0 too, as in scikit-learn's `calibration_curve`.
    """
    label, probability = _checked(label, probability)
    inner_edges = np.linspace(0.0, 1.0, ECE_BINS + 1)[1:-1]
    bins = np.searchsorted(inner_edges, probability)
    rows = np.bincount(bins, minlength=ECE_BINS)
    filled = np.where(rows > 0, rows, np.nan)
    mean_probability = np.bincount(bins, weights=probability, minlength=ECE_BINS) / filled
    share = np.bincount(bins, weights=label, minlength=ECE_BINS) / filled
    return rows, mean_probability, share


def choose_threshold(
    label: np.ndarray,
    probability: np.ndarray,
    by: float | Literal["f1", "balanced_accuracy"],
) -> float:
    """Return the probability from which a row counts as positive.

    A number is returned as it is. A metric's name gives the threshold that makes the metric largest
    on these rows: half-way between the lowest probability that is called positive and the next one
    below, so that no row stands on it; of several, the one nearest to 0.5.

    Raises:
        ValueError: if `by` is another name, or the rows are not usable (see `binary_metrics`).
    """
    if not isinstance(by, str):
        return float(by)
    if by not in ("f1", "balanced_accuracy"):
        raise ValueError(f"a threshold is chosen by f1 or balanced_accuracy, not by {by!r}")
    label, probability = _checked(label, probability)
    candidates, place = np.unique(probability, return_inverse=True)
    positives = np.bincount(place, weights=label, minlength=len(candidates))
    negatives = np.bincount(place, weights=1 - label, minlength=len(candidates))
    # With candidate i as the threshold, all rows at i and above are called positive.
    tp, fp = np.cumsum(positives[::-1])[::-1], np.cumsum(negatives[::-1])[::-1]
    if by == "f1":
        score = 2 * tp / (tp + fp + max(tp[0], 1))
    else:
        score = tp / max(tp[0], 1) - fp / max(fp[0], 1)
    below = np.concatenate([[0.0], candidates[:-1]])
    best = ((candidates + below) / 2)[np.isclose(score, score.max(), rtol=0, atol=1e-12)]
    return float(best[np.argmin(np.abs(best - 0.5))])


def _checked(label: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return labels as int64 (N,) and probabilities as float64 (N,)."""
    label, probability = np.ravel(label), np.ravel(probability).astype(np.float64)
    if len(label) != len(probability) or not len(label):
        raise ValueError(
            f"metrics need a label and a probability for each of some rows, got {len(label)} "
            f"labels and {len(probability)} probabilities"
        )
    if not np.isin(label, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.unique(label)[:5].tolist()}")
    within = (probability >= 0) & (probability <= 1)
    if not within.all():
        raise ValueError(
            f"probabilities must be between 0 and 1, got {probability[~within][:5].tolist()}"
        )
    return label.astype(np.int64), probability
