"""Finds parts of the rows in which the model is worse than in the others.

`slice_metrics` looks at the values of one column at a time, `cohorts` at combinations of columns.
Intervals are corrected for the number of slices (Bonferroni), so that among many slices, the worst
one does not stand out by chance alone.

Shapes: N rows, S slices, G groups.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ray_jobs.config.text import number_text
from ray_jobs.evaluate.evaluated_rows import EvaluatedRows

MIN_ROWS = 20
"""Slices with fewer rows are left out."""

_LEVEL = 0.95
_NUM_QUANTILES = 4
_MAX_DEPTH = 3
_MAX_WORDS = 50
_MIN_COHORT = 0.02


@dataclass(frozen=True)
class Slice:
    """The rows with some values of a column."""

    column: str
    value: str
    is_member_N: np.ndarray


def slice_metrics(rows: EvaluatedRows, threshold: float) -> list[dict[str, Any]]:
    """Return the metrics of every slice of every column, the highest log loss first.

    Each has `column`, `value`, `num_rows`, `num_positive`, `accuracy`, `roc_auc`, the mean
    `probability`, the fraction of `positives`, and the `log_loss`. `difference` is the log loss of
    the slice minus that of the other rows, with its corrected 95 % interval `low` to `high`;
    `is_worse` says whether the interval is above 0.
    """
    # One slice for rows that several columns select, such as those without an image.
    distinct = {part.is_member_N.tobytes(): part for part in _slices(rows)}.values()
    slices = [part for part in distinct if _is_large_enough(rows, part.is_member_N)]
    found = [_metrics(rows, s, threshold, len(slices)) for s in slices]
    return sorted(found, key=lambda metrics: -metrics["log_loss"])


def cohorts(rows: EvaluatedRows, threshold: float) -> list[dict[str, Any]]:
    """Return the metrics of combinations of values in which the model is worse, as in slices.

    A decision tree on one half of the rows, or groups, divides them by their log loss; the figures
    are those of the other half (Athey and Imbens 2016, "Recursive partitioning for heterogeneous
    causal effects", honest estimation). Returns only those that are worse.
    """
    from sklearn.tree import DecisionTreeRegressor

    columns, names = _features(rows)
    is_first_N = np.random.default_rng(0).permutation(int(rows.units_N.max()) + 1)[rows.units_N] % 2
    fit_N = is_first_N == 1
    min_leaf = max(MIN_ROWS, int(_MIN_COHORT * fit_N.sum()))
    if not names or fit_N.sum() < 2 * min_leaf or (~fit_N).sum() < 2 * min_leaf:
        return []
    tree = DecisionTreeRegressor(max_depth=_MAX_DEPTH, min_samples_leaf=min_leaf, random_state=0)
    # Without the clip, a few rows with an extreme loss would determine the tree.
    clipped_N = np.minimum(rows.log_loss_N, np.quantile(rows.log_loss_N, 0.99))
    tree.fit(columns[fit_N], clipped_N[fit_N], rows.weights_N[fit_N])
    leaf_N = tree.apply(columns)
    found = []
    paths, others = dict(_paths(tree.tree_, names)), rows.take(np.flatnonzero(~fit_N))
    for leaf, conditions in paths.items():
        is_member_N = (leaf_N == leaf)[~fit_N]
        if conditions and _is_large_enough(others, is_member_N):
            cohort = Slice("", " and ".join(conditions), is_member_N)
            found.append(_metrics(others, cohort, threshold, len(paths)))
    worse = [metrics for metrics in found if metrics["is_worse"]]
    return sorted(worse, key=lambda metrics: -metrics["log_loss"])


def _slices(rows: EvaluatedRows) -> Iterator[Slice]:
    for column, values in rows.words.items():
        for word in _frequent_words(values):
            equal_N = pa.compute.equal(values, word).fill_null(False)  # type: ignore[attr-defined]
            yield Slice(column, word, equal_N.to_numpy(zero_copy_only=False))
        yield Slice(column, "missing", values.is_null().to_numpy(zero_copy_only=False))
    for column, values_N in rows.numbers.items():
        known_N = np.isfinite(values_N)
        yield Slice(column, "missing", ~known_N)
        if not known_N.any():
            continue
        known = np.sort(values_N[known_N])
        edges = np.unique(np.quantile(known, np.linspace(0, 1, _NUM_QUANTILES + 1)))
        frequent = known[len(known) // 2]
        if len(edges) <= 3 or np.mean(known == frequent) > 0.5:
            # Quartiles would divide rows with equal values, or hardly any rows.
            yield Slice(column, number_text(float(frequent)), values_N == frequent)
            yield Slice(column, f"below {number_text(float(frequent))}", values_N < frequent)
            yield Slice(column, f"above {number_text(float(frequent))}", values_N > frequent)
            continue
        for i, (low, high) in enumerate(itertools.pairwise(edges)):
            from_low_N = values_N >= low if i == 0 else values_N > low
            text = f"{number_text(low)} to {number_text(high)}"
            yield Slice(column, text, known_N & from_low_N & (values_N <= high))


def _frequent_words(values: pa.Array) -> list[str]:
    """Return the words with enough rows, the most frequent first."""
    counts = values.drop_null().value_counts().to_pylist()
    counts = sorted(counts, key=lambda count: (-count["counts"], count["values"]))
    return [c["values"] for c in counts[:_MAX_WORDS] if c["counts"] >= MIN_ROWS]


def _is_large_enough(rows: EvaluatedRows, is_member_N: np.ndarray) -> bool:
    """Whether a slice and the other rows have enough rows and groups to be compared."""
    if not MIN_ROWS <= is_member_N.sum() < len(is_member_N):
        return False
    return all(len(np.unique(rows.units_N[part])) > 1 for part in (is_member_N, ~is_member_N))


def _metrics(rows: EvaluatedRows, part: Slice, threshold: float, num_slices: int) -> dict[str, Any]:
    from sklearn.metrics import roc_auc_score

    member_N = part.is_member_N
    label, probability = rows.label_N[member_N], rows.probability_N[member_N]
    weight = rows.weights_N[member_N]
    difference, low, high = _difference(rows, member_N, 1 - (1 - _LEVEL) / num_slices)
    is_correct = (probability >= threshold) == (label == 1)
    has_both = 0 < label.sum() < len(label)
    return {
        "column": part.column,
        "value": part.value,
        "num_rows": int(member_N.sum()),
        "num_positive": int(label.sum()),
        "accuracy": float(np.average(is_correct, weights=weight)),
        "roc_auc": (
            float(roc_auc_score(label, probability, sample_weight=weight)) if has_both else None
        ),
        "probability": float(np.average(probability, weights=weight)),
        "positives": float(np.average(label, weights=weight)),
        "log_loss": float(np.average(rows.log_loss_N[member_N], weights=weight)),
        "difference": difference,
        "low": low,
        "high": high,
        "is_worse": low > 0,
    }


def _difference(
    rows: EvaluatedRows, member_N: np.ndarray, level: float
) -> tuple[float, float, float]:
    """Return the difference in mean log loss from the other rows, with its interval.

    The variance is that of a difference of weighted means of independent groups (Cameron and Miller
    2015, "A Practitioner's Guide to Cluster-Robust Inference", section II).
    """
    from scipy.stats import t

    influence_N = np.zeros(len(member_N))
    means = []
    for sign, part_N in ((1.0, member_N), (-1.0, ~member_N)):
        weight = rows.weights_N[part_N]
        mean = np.average(rows.log_loss_N[part_N], weights=weight)
        influence_N[part_N] = sign * weight * (rows.log_loss_N[part_N] - mean) / weight.sum()
        means.append(mean)
    by_group_G = np.bincount(rows.units_N, influence_N)
    num_groups = min(len(np.unique(rows.units_N[part])) for part in (member_N, ~member_N))
    difference = float(means[0] - means[1])
    scale = num_groups / (num_groups - 1)
    margin = t.ppf((1 + level) / 2, num_groups - 1) * np.sqrt(scale * (by_group_G**2).sum())
    return difference, float(difference - margin), float(difference + margin)


def _features(rows: EvaluatedRows) -> tuple[np.ndarray, list[tuple[str, str | None]]]:
    """Return the features of a tree, and for each of them its column and, if it is one, the word.

    Frequent words are features of their own; numbers may be missing.
    """
    columns: list[np.ndarray] = list(rows.numbers.values())
    names: list[tuple[str, str | None]] = [(column, None) for column in rows.numbers]
    for column, values in rows.words.items():
        for word in _frequent_words(values):
            equal = pa.compute.equal(values, word).fill_null(False)  # type: ignore[attr-defined]
            columns.append(equal.to_numpy(zero_copy_only=False).astype(np.float64))
            names.append((column, word))
    return np.stack(columns, axis=1) if columns else np.zeros((len(rows.label_N), 0)), names


def _paths(
    tree: Any, names: Sequence[tuple[str, str | None]], node: int = 0, path: tuple[str, ...] = ()
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield each leaf of a tree with the conditions of its rows."""
    if tree.children_left[node] < 0:
        yield node, path
        return
    column, word = names[tree.feature[node]]
    limit = number_text(float(tree.threshold[node]))
    below, above = (f"{column} ≤ {limit}", f"{column} > {limit}")
    if word is not None:
        below, above = f"{column} ≠ {word}", f"{column} = {word}"
    elif tree.missing_go_to_left[node]:
        below += " or missing"
    else:
        above += " or missing"
    yield from _paths(tree, names, tree.children_left[node], (*path, below))
    yield from _paths(tree, names, tree.children_right[node], (*path, above))
