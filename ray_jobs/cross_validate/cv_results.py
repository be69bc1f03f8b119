"""Computes the metrics of out-of-fold predictions, and compares them with those of other specs.

Each row is predicted once per repeat, by the model of the fold that scores it. A metric of all rows
is the mean over the repeats.

    N rows   R repeats
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.config.errors import JobError
from ray_jobs.data.batch import KEY, LABEL, WEIGHT
from ray_jobs.data.folds import Fold, FoldRows
from ray_jobs.evaluate.bootstrap import bootstrap_intervals
from ray_jobs.predict.predictor import PROBABILITY
from ray_jobs.storage.folder import Folder
from ray_jobs.train.metrics import binary_metrics

ROWS = "rows.parquet"
"""File with predicted rows; written last, so the folder of a fold that has it is complete."""
THRESHOLD = "threshold"
METRICS = ("roc_auc", "pr_auc", "log_loss", "brier", "ece", "accuracy", "balanced_accuracy", "f1")
COMPARED = ("roc_auc", "pr_auc", "log_loss", "brier", "accuracy")

_LOWER_IS_BETTER = ("log_loss", "brier", "ece")


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

    def metrics(self, rows: np.ndarray | slice, names: Sequence[str]) -> dict[str, float | None]:
        """Return the metrics of some rows, as the mean over the repeats."""
        repeats = [self._metrics_of(repeat, rows) for repeat in range(len(self.fold_RN))]
        return {name: _mean([metrics[name] for metrics in repeats]) for name in names}

    def fold_metrics(self, fold: Fold) -> dict[str, float | None]:
        """Return the metrics of the scored rows of one fold."""
        metrics = self._metrics_of(fold.repeat, fold.is_scored_N)
        return {name: metrics[name] for name in METRICS}

    def _metrics_of(self, repeat: int, rows: np.ndarray | slice) -> dict[str, Any]:
        weight = None if self.weight_N is None else self.weight_N[rows]
        probability, threshold = self.probability_RN[repeat, rows], self.threshold_RN[repeat, rows]
        return binary_metrics(self.label_N[rows], probability, threshold, weight)


def summarize(out_of_fold: OutOfFold, folds: Sequence[Fold]) -> dict[str, Any]:
    """Return the content of metrics.json.

    `metrics` has, by name, the `value` on all rows with its 95 % interval `low` to `high`, and the
    mean and standard deviation of the metric over the folds of all repeats.
    """
    values = out_of_fold.metrics(slice(None), METRICS)
    intervals = bootstrap_intervals(
        lambda rows: out_of_fold.metrics(rows, METRICS), out_of_fold.label_N, out_of_fold.group_N
    )
    by_fold = [out_of_fold.fold_metrics(fold) for fold in folds]
    metrics = {}
    for name in METRICS:
        low, high = intervals[name] or (None, None)
        of_folds = [value for m in by_fold if (value := m[name]) is not None]
        metrics[name] = {
            "value": values[name],
            "low": low,
            "high": high,
            "mean_of_folds": float(np.mean(of_folds)) if of_folds else None,
            "std_of_folds": float(np.std(of_folds, ddof=1)) if len(of_folds) > 1 else None,
        }
    return {
        "num_rows": len(out_of_fold.label_N),
        "num_groups": len(np.unique(out_of_fold.group_N)),
        "class_counts": np.bincount(out_of_fold.label_N, minlength=2).tolist(),
        "num_folds": max(fold.index for fold in folds) + 1,
        "num_repeats": len(out_of_fold.fold_RN),
        "metrics": metrics,
        "folds": [
            {"repeat": f.repeat + 1, "fold": f.index + 1, "num_rows": int(f.is_scored_N.sum()), **m}
            for f, m in zip(folds, by_fold, strict=True)
        ],
    }


def compare(ours: OutOfFold, theirs: OutOfFold) -> dict[str, dict[str, Any]]:
    """Return, by metric, the `difference` of ours from theirs, its 95 % interval and a verdict.

    The bootstrap draws the same rows for both.
    """

    def differences(rows: Any) -> Mapping[str, float | None]:
        first, second = (each.metrics(rows, COMPARED) for each in (ours, theirs))
        return {name: _difference(first[name], second[name]) for name in COMPARED}

    values = differences(slice(None))
    intervals = bootstrap_intervals(differences, ours.label_N, ours.group_N)
    compared: dict[str, dict[str, Any]] = {}
    for name in COMPARED:
        low, high = intervals[name] or (None, None)
        verdict = "cannot be told apart"
        if low is not None and high is not None and not low <= 0 <= high:
            verdict = "better" if (low > 0) != (name in _LOWER_IS_BETTER) else "worse"
        compared[name] = {
            "difference": values[name], "low": low, "high": high, "verdict": verdict,
        }  # fmt: skip
    return compared


def write_rows(folder: Folder, rows: pa.Table) -> None:
    """Write predicted rows."""
    stream = io.BytesIO()
    pq.write_table(rows, stream)
    folder.write_bytes(ROWS, stream.getvalue())


def read_rows(folder: Folder) -> pa.Table:
    """Read predicted rows."""
    return pq.read_table(io.BytesIO(folder.read_bytes(ROWS)))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _difference(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second
