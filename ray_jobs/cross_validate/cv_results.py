"""Computes the metrics of out-of-fold predictions, and compares them with those of other specs.

Each row is predicted once per repeat, by the model of the fold that scores it. A metric of all rows
is the mean over the repeats.

    N rows   R repeats   D draws
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ray_jobs.checks.finding import Finding, warning
from ray_jobs.config.errors import JobError
from ray_jobs.data.batch import KEY, LABEL, WEIGHT
from ray_jobs.data.folds import Fold, FoldRows
from ray_jobs.evaluate.uncertainty.bootstrap import bootstrap_intervals
from ray_jobs.evaluate.uncertainty.draw_metrics import BIASED, DrawMetrics
from ray_jobs.evaluate.uncertainty.model_comparison import COMPARED, Statistics, values_of
from ray_jobs.evaluate.uncertainty.model_comparison import compare as compare_statistics
from ray_jobs.predict.predictor import PROBABILITY
from ray_jobs.storage.folder import Folder
from ray_jobs.train.metrics import binary_metrics

ROWS = "rows.parquet"
"""File with predicted rows; written last, so the folder of a fold that has it is complete."""
THRESHOLD = "threshold"
_ALPHA = 0.01
METRICS = ("roc_auc", "pr_auc", "log_loss", "brier", "ece", "accuracy", "balanced_accuracy", "f1")


@dataclass(frozen=True)
class OutOfFold:
    """Predictions of N rows in R repeats."""

    label_N: np.ndarray
    weight_N: np.ndarray | None
    group_N: np.ndarray
    fold_RN: np.ndarray
    """Index of the fold that scores each row."""
    probability_RN: np.ndarray
    threshold_RN: np.ndarray
    """Decision threshold of the fold's model."""
    keys: tuple[str, ...]

    @classmethod
    def of(cls, rows: FoldRows, folds: Sequence[Fold], tables: Sequence[pa.Table]) -> "OutOfFold":
        """Combine the predicted rows of all folds."""
        shape = (folds[-1].repeat + 1, len(rows.label_N))
        fold_RN = np.zeros(shape, np.int64)
        probability_RN, threshold_RN = np.zeros(shape), np.zeros(shape)
        for fold, table in zip(folds, tables, strict=True):
            is_scored = fold.is_scored_N
            if table[KEY].to_pylist() != rows.table[KEY].filter(pa.array(is_scored)).to_pylist():
                raise JobError(
                    f"the predicted rows of fold {fold.name} are not those that it scores; choose "
                    "another --run.name"
                )
            fold_RN[fold.repeat, is_scored] = fold.index
            probability_RN[fold.repeat, is_scored] = table[PROBABILITY].to_numpy()
            threshold_RN[fold.repeat, is_scored] = table[THRESHOLD].to_numpy()
        keys = tuple(rows.table[KEY].to_pylist())
        return cls(
            rows.label_N, rows.weight_N, rows.group_N, fold_RN, probability_RN, threshold_RN, keys
        )

    def table(self) -> pa.Table:
        """Return the predictions as a table, repeat by repeat in stored order."""
        num_repeats, num_rows = self.fold_RN.shape
        columns = {
            KEY: list(self.keys) * num_repeats,
            LABEL: np.tile(self.label_N, num_repeats),
            PROBABILITY: self.probability_RN.ravel(),
            THRESHOLD: self.threshold_RN.ravel(),
            "repeat": np.repeat(np.arange(num_repeats) + 1, num_rows),
            "fold": self.fold_RN.ravel() + 1,
        }
        if self.weight_N is not None:
            columns[WEIGHT] = np.tile(self.weight_N, num_repeats)
        return pa.table(columns)

    def statistics(self, names: Sequence[str]) -> Statistics:
        """Return a function that computes metrics of drawn rows, as the mean over the repeats."""
        repeats = [
            DrawMetrics(self.label_N, probability_N, threshold_N, self.weight_N, names)
            for probability_N, threshold_N in zip(
                self.probability_RN, self.threshold_RN, strict=True
            )
        ]

        def mean(counts_DN: np.ndarray) -> dict[str, np.ndarray]:
            found = [repeat.of(counts_DN) for repeat in repeats]
            return {name: np.mean([of[name] for of in found], axis=0) for name in names}

        return mean

    def fold_metrics(self, fold: Fold) -> dict[str, float | None]:
        """Return the metrics of the scored rows of one fold."""
        rows, repeat = fold.is_scored_N, fold.repeat
        weight = None if self.weight_N is None else self.weight_N[rows]
        probability, threshold = self.probability_RN[repeat, rows], self.threshold_RN[repeat, rows]
        metrics = binary_metrics(self.label_N[rows], probability, threshold, weight)
        return {name: metrics[name] for name in METRICS}


def summarize(out_of_fold: OutOfFold, folds: Sequence[Fold]) -> dict[str, Any]:
    """Return the content of metrics.json.

    `metrics` has, by name, the `value` on all rows with its 95 % interval `low` to `high`, and the
    mean and standard deviation of the metric over the folds of all repeats. The calibration error
    has no interval (see `BIASED`).
    """
    label_N, statistics = out_of_fold.label_N, out_of_fold.statistics(METRICS)
    values = values_of(statistics, len(label_N))
    intervals = bootstrap_intervals(statistics, label_N, out_of_fold.group_N)
    by_fold = [out_of_fold.fold_metrics(fold) for fold in folds]
    metrics = {}
    for name in METRICS:
        low, high = (None, None) if name in BIASED else intervals[name] or (None, None)
        of_folds = [value for m in by_fold if (value := m[name]) is not None]
        metrics[name] = {
            "value": values[name],
            "low": low,
            "high": high,
            "mean_of_folds": float(np.mean(of_folds)) if of_folds else None,
            "std_of_folds": float(np.std(of_folds, ddof=1)) if len(of_folds) > 1 else None,
        }
    return {
        "num_rows": len(label_N),
        "num_groups": len(np.unique(out_of_fold.group_N)),
        "class_counts": np.bincount(label_N, minlength=2).tolist(),
        "num_folds": max(fold.index for fold in folds) + 1,
        "num_repeats": len(out_of_fold.fold_RN),
        "metrics": metrics,
        "folds": [
            {
                "repeat": f.repeat + 1,
                "fold": f.index + 1,
                "num_rows": int(f.is_scored_N.sum()),
                "class_counts": np.bincount(label_N[f.is_scored_N], minlength=2).tolist(),
                **m,
            }
            for f, m in zip(folds, by_fold, strict=True)
        ],
    }


def fold_findings(summary: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield a finding if the ROC AUC of the folds varies more than chance explains.

    Cochran's Q test (Cochran 1954, "The Combination of Estimates from Different Experiments") with
    the variances of Hanley and McNeil 1982, "The Meaning and Use of the Area under a ROC Curve". It
    assumes independent rows, so data with groups has no finding.

    Args:
        summary: Result of `summarize`.
    """
    from scipy.stats import chi2

    # The folds of different repeats share rows.
    folds = [f for f in summary["folds"] if f["repeat"] == 1 and f["roc_auc"] is not None]
    if summary["num_groups"] < summary["num_rows"] or len(folds) < 2:
        return
    auc = np.array([fold["roc_auc"] for fold in folds])
    positives, negatives = (np.array([fold["class_counts"][i] for fold in folds]) for i in (1, 0))
    mean = np.average(auc, weights=positives)
    both_positive, both_negative = mean / (2 - mean), 2 * mean**2 / (1 + mean)
    variance = mean * (1 - mean) + (positives - 1) * (both_positive - mean**2)
    variance = (variance + (negatives - 1) * (both_negative - mean**2)) / (positives * negatives)
    p_value = float(chi2.sf(((auc - mean) ** 2 / np.maximum(variance, 1e-12)).sum(), len(auc) - 1))
    if p_value < _ALPHA:
        yield warning(
            "unstable_folds",
            f"The ROC AUC of the {len(auc)} folds is {auc.min():.3f} to {auc.max():.3f}, which "
            f"varies more than chance explains (p = {p_value:.2g})",
            "look at the rows of the worst fold",
        )


def compare(ours: OutOfFold, theirs: OutOfFold) -> dict[str, dict[str, Any]]:
    """Return the comparison of two specs on the same folds, by metric."""
    first, second = (each.statistics(COMPARED) for each in (ours, theirs))
    return compare_statistics(first, {"": second}, ours.label_N, ours.group_N)[""]


def write_rows(folder: Folder, rows: pa.Table) -> None:
    """Write predicted rows."""
    folder.write_parquet(ROWS, rows)


def read_rows(folder: Folder) -> pa.Table:
    """Read predicted rows."""
    return folder.read_parquet(ROWS)
