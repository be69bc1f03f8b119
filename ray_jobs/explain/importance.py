"""Measures how much a model depends on its inputs: importance, dependence, missing modalities.

The image part of a model runs once; only the part above it is called with changed values.

Shapes: B rows of a batch, N rows, R repeats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm_model.mean_model import own_codes
from mm_model.model_parts import CutModel
from ray_jobs.data.batch import CATEGORY, IMAGE, IMAGE_MASK, NUMERIC, TEXT, TEXT_MASK
from ray_jobs.train.metrics import row_log_loss

_NUM_REPEATS = 5
_BATCH = 256
_CORRELATED = 0.8
_GRID = 15


@dataclass(frozen=True)
class UpperPart:
    """The part of a model above its image features."""

    model: CutModel
    tensors: Mapping[str, np.ndarray]
    """Image features of N rows; with several images per row, of N × images."""
    codes: Sequence[Sequence[int]] = ()
    """As `codes` of a `MeanModel`; none if the model takes the codes of the rows."""


@dataclass(frozen=True)
class ModelRows:
    """N rows, and the models whose mean probability is explained; often a single one."""

    parts: Sequence[UpperPart]
    inputs: Mapping[str, np.ndarray]
    """Inputs of the models without images."""
    columns: Mapping[str, Sequence[str]]
    """Names of the columns by input: numbers, words, texts."""
    label_N: np.ndarray
    weight_N: np.ndarray
    is_image_optional: bool = False
    """Whether rows may lack all images."""

    @property
    def has_images(self) -> bool:
        """Whether the models take images."""
        return any(part.tensors for part in self.parts)

    def probability(self, changes: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the mean probabilities (N,) with some inputs replaced.

        Args:
            changes: Inputs by name; `image` has the row (N,) whose images each row gets.
        """
        from mm_model.calibration import sigmoid

        num_rows = len(self.label_N)
        order_N = changes.get(IMAGE, np.arange(num_rows))
        given = {name: changes.get(name, values) for name, values in self.inputs.items()}
        total_N = np.zeros(num_rows)
        for part in self.parts:
            for start in range(0, num_rows, _BATCH):
                rows = slice(start, start + _BATCH)
                inputs = own_codes({n: values[rows] for n, values in given.items()}, part.codes)
                tensors = {
                    name: values.reshape(num_rows, -1, *values.shape[1:])[order_N[rows]]
                    for name, values in part.tensors.items()
                }
                folded = {n: v.reshape(-1, *v.shape[2:]) for n, v in tensors.items()}
                logit_B1 = np.asarray(part.model.logit(folded, inputs), np.float64)
                total_N[rows] += sigmoid(logit_B1[:, 0])
        return total_N / len(self.parts)

    def permuted(self, names: Sequence[str], order_N: np.ndarray) -> dict[str, np.ndarray]:
        """Return `changes` by which some columns have the values of other rows.

        Args:
            names: Columns; none stands for the images.
            order_N: The row whose values each row gets.
        """
        changes: dict[str, np.ndarray] = {}
        for source, columns in self.columns.items():
            chosen = [i for i, column in enumerate(columns) if column in names]
            for name in (TEXT, TEXT_MASK) if source == TEXT else (source,):
                if chosen:
                    changes[name] = self.inputs[name].copy()
                    changes[name][:, chosen] = self.inputs[name][order_N][:, chosen]
        if not names:
            changes = {n: self.inputs[n][order_N] for n in self.inputs if n == IMAGE_MASK}
            changes[IMAGE] = order_N
        return changes


def permutation_importance(rows: ModelRows) -> list[dict[str, Any]]:
    """Return how much worse the model is if columns have the values of other rows, worst first.

    Each entry has its `columns`, whether it `is_image`, the increase in `log_loss` with its 95 %
    interval over rows `low` to `high`, and the decrease in `roc_auc` (Breiman 2001, "Random
    Forests", section 10). Numbers that are strongly correlated are permuted together, because each
    could replace the others.
    """
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(rows.label_N)) for _ in range(_NUM_REPEATS)]
    before_N = rows.probability({})
    found = [
        {
            "columns": names or ["image"],
            "is_image": not names,
            **_damage(rows, before_N, [rows.permuted(names, order) for order in orders]),
        }
        for names in _groups(rows)
    ]
    return sorted(found, key=lambda entry: -entry["log_loss"])


def missing_modalities(rows: ModelRows) -> list[dict[str, Any]]:
    """Return how much worse the model is without its images, its numbers and words, or its texts.

    Each entry has the kind of input that is `without`, and figures as in `permutation_importance`.
    Images are left out only if rows may lack them.
    """
    without = {
        "image": {IMAGE_MASK: 0.0} if rows.is_image_optional else {},
        "numbers and words": {NUMERIC: np.nan, CATEGORY: 0},
        "texts": {TEXT_MASK: 0.0},
    }
    changes: dict[str, dict[str, np.ndarray]] = {}
    for modality, values in without.items():
        known = {name: value for name, value in values.items() if name in rows.inputs}
        if known:
            changes[modality] = {n: np.full_like(rows.inputs[n], v) for n, v in known.items()}
    if len(changes) + (rows.has_images and "image" not in changes) < 2:
        return []
    before_N = rows.probability({})
    return [
        {"without": modality, **_damage(rows, before_N, [change])}
        for modality, change in changes.items()
    ]


def partial_dependence(
    rows: ModelRows, column: str, words: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Return the mean probability of all rows if a column has the same value in all of them.

    Source: Friedman 2001, "Greedy function approximation", section 8.2. Numbers take quantiles of
    the rows, categories those of the `words` that occur. Returns None if a column has fewer than
    two values.
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


def _damage(
    rows: ModelRows, before_N: np.ndarray, changes: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, Any]:
    """Return the mean increase in log loss and decrease in ROC AUC of several changed inputs."""
    from sklearn.metrics import roc_auc_score

    label_N, weight_N = rows.label_N, rows.weight_N / rows.weight_N.sum()
    changed_RN = np.stack([rows.probability(change) for change in changes])
    increase_N = np.mean([row_log_loss(label_N, p_N) for p_N in changed_RN], axis=0)
    increase_N -= row_log_loss(label_N, before_N)
    mean = float(weight_N @ increase_N)
    margin = 1.96 * float(np.sqrt(((weight_N * (increase_N - mean)) ** 2).sum()))
    found = {"log_loss": mean, "low": mean - margin, "high": mean + margin, "roc_auc": None}
    if 0 < label_N.sum() < len(label_N):
        before, *after = (
            roc_auc_score(label_N, p_N, sample_weight=weight_N) for p_N in (before_N, *changed_RN)
        )
        found["roc_auc"] = float(before - np.mean(after))
    return found


def _groups(rows: ModelRows) -> list[list[str]]:
    """Return the columns, with strongly correlated numbers together; no column for the images."""
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
    return [*groups, []] if rows.has_images else groups
