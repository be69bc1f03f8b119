"""Measures how much a model depends on each column: permutation importance, partial dependence.

The image part of the model runs once; only the part above it is called with changed values.

Shapes: B rows of a batch, N rows, R repeats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm_model.model_parts import CutModel
from ray_jobs.data.batch import CATEGORY, NUMERIC, TEXT, TEXT_MASK

IMAGE_COLUMN = "image"

_NUM_REPEATS = 5
_BATCH = 256
_CORRELATED = 0.8
_GRID = 15


@dataclass(frozen=True)
class ModelRows:
    """N rows with what the upper part of a model takes."""

    model: CutModel
    inputs: Mapping[str, np.ndarray]
    """Inputs of the model without images."""
    tensors: Mapping[str, np.ndarray]
    """Image features; with several images per row, of N × images."""
    columns: Mapping[str, Sequence[str]]
    """Names of the columns by input: numbers, words, texts."""
    label_N: np.ndarray
    weight_N: np.ndarray

    def probability(self, changes: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the probabilities (N,) with some inputs or tensors replaced."""
        from mm_model.calibration import sigmoid

        logits: list[np.ndarray] = []
        num_rows = len(self.label_N)
        for start in range(0, num_rows, _BATCH):
            part = slice(start, start + _BATCH)
            inputs, tensors = (
                {n: _rows(changes.get(n, v), num_rows, part) for n, v in values.items()}
                for values in (self.inputs, self.tensors)
            )
            logits.append(np.asarray(self.model.logit(tensors, inputs))[:, 0])
        return sigmoid(np.concatenate(logits).astype(np.float64))

    def permuted(self, names: Sequence[str], order_N: np.ndarray) -> dict[str, np.ndarray]:
        """Return inputs and tensors in which some columns have the values of other rows."""
        changes: dict[str, np.ndarray] = {}
        for source, columns in self.columns.items():
            chosen = [i for i, column in enumerate(columns) if column in names]
            for name in (TEXT, TEXT_MASK) if source == TEXT else (source,):
                if chosen:
                    changes[name] = self.inputs[name].copy()
                    changes[name][:, chosen] = self.inputs[name][order_N][:, chosen]
        if IMAGE_COLUMN in names:
            for name, values in self.tensors.items():
                by_row = values.reshape(len(order_N), -1, *values.shape[1:])
                changes[name] = by_row[order_N].reshape(values.shape)
        return changes


def permutation_importance(rows: ModelRows) -> list[dict[str, Any]]:
    """Return how much worse the model is if columns have the values of other rows, worst first.

    Each entry has its `columns`, the increase in `log_loss` with its 95 % interval over rows `low`
    to `high`, and the decrease in `roc_auc` (Breiman 2001, "Random Forests", section 10). Numbers
    that are strongly correlated are permuted together, because each could replace the others.
    """
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    label_N = rows.label_N
    has_both = 0 < label_N.sum() < len(label_N)
    probability_N = rows.probability({})
    loss_N = _losses(label_N, probability_N)

    def auc(probability_N: np.ndarray) -> float:
        return float(roc_auc_score(label_N, probability_N, sample_weight=rows.weight_N))

    orders = [rng.permutation(len(label_N)) for _ in range(_NUM_REPEATS)]
    found: list[dict[str, Any]] = []
    for names in _groups(rows):
        changed_RN = np.stack([rows.probability(rows.permuted(names, order)) for order in orders])
        increase_N = np.mean([_losses(label_N, p_N) for p_N in changed_RN], axis=0) - loss_N
        mean = float(np.average(increase_N, weights=rows.weight_N))
        weight_N = rows.weight_N / rows.weight_N.sum()
        margin = 1.96 * float(np.sqrt(((weight_N * (increase_N - mean)) ** 2).sum()))
        found.append(
            {
                "columns": names,
                "log_loss": mean,
                "low": mean - margin,
                "high": mean + margin,
                "roc_auc": auc(probability_N) - np.mean([auc(p_N) for p_N in changed_RN]).item()
                if has_both
                else None,
            }
        )
    return sorted(found, key=lambda entry: -entry["log_loss"])


def partial_dependence(
    rows: ModelRows, column: str, words: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Return the mean probability of all rows if a column has the same value in all of them.

    Source: Friedman 2001, "Greedy function approximation", section 8.2. Numbers take quantiles of
    the rows, categories their `words`. Returns None if the column has fewer than two values.
    """
    (source,) = [name for name, columns in rows.columns.items() if column in columns]
    index = list(rows.columns[source]).index(column)
    given = rows.inputs[source][:, index]
    if source == NUMERIC:
        known = given[np.isfinite(given)]
        values = np.unique(np.quantile(known, np.linspace(0, 1, _GRID))) if len(known) else known
        texts: list[Any] = values.tolist()
    else:
        values = np.unique(given)
        # The codes 0 and 1 stand for missing and unknown words.
        texts = ["missing" if v == 0 else "unknown" if v == 1 else words[v - 2] for v in values]
    if len(values) < 2:
        return None
    probabilities = []
    for value in values:
        changed = rows.inputs[source].copy()
        changed[:, index] = value
        changed_N = rows.probability({source: changed})
        probabilities.append(float(np.average(changed_N, weights=rows.weight_N)))
    return {"column": column, "values": texts, "probability": probabilities}


def _groups(rows: ModelRows) -> list[list[str]]:
    """Return the columns, with strongly correlated numbers together."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.stats import rankdata

    numbers = list(rows.columns.get(NUMERIC, ()))
    groups = [[name] for name in numbers]
    if len(numbers) > 1:
        values = rows.inputs[NUMERIC].astype(np.float64)
        values = np.where(np.isfinite(values), values, np.nanmedian(values, axis=0))
        ranks = rankdata(np.nan_to_num(values), axis=0)
        ranks = (ranks - ranks.mean(axis=0)) / np.maximum(ranks.std(axis=0), 1e-9)
        distance = 1 - np.abs(ranks.T @ ranks) / len(ranks)
        upper = np.triu_indices(len(numbers), 1)
        tree = linkage(np.maximum(distance[upper], 0), "complete")
        cluster = fcluster(tree, 1 - _CORRELATED, "distance")
        groups = [
            [name for name, own in zip(numbers, cluster, strict=True) if own == k]
            for k in dict.fromkeys(cluster)
        ]
    groups += [[name] for source in (CATEGORY, TEXT) for name in rows.columns.get(source, ())]
    return [*groups, [IMAGE_COLUMN]] if rows.tensors else groups


def _rows(values: np.ndarray, num_rows: int, part: slice) -> np.ndarray:
    """Return some rows; an array may have several entries per row."""
    return values.reshape(num_rows, -1, *values.shape[1:])[part].reshape(-1, *values.shape[1:])


def _losses(label_N: np.ndarray, probability_N: np.ndarray) -> np.ndarray:
    epsilon = np.finfo(np.float64).eps
    clipped_N = np.clip(probability_N, epsilon, 1 - epsilon)
    return -np.log(np.where(label_N == 1, clipped_N, 1 - clipped_N))
