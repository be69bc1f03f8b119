"""Computes the distribution, drift and leakage of one column from its values in each split."""

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.metrics import roc_auc_score

from mm_model.statistics import Vocabulary
from ray_jobs.checks.column_drift import number_drift, word_drift
from ray_jobs.config.prepare_spec import SPLITS, Split
from ray_jobs.inspect.report_schema import (
    CategoryColumn,
    CategorySummary,
    Leakage,
    NumericColumn,
    NumericSummary,
)

LEAK_THRESHOLD = 0.99
LEAK_ROWS = 10
"""Minimum number of rows per class before a column is reported as a leak."""
TOP_WORDS = 12

_BINS = 30

Values = Mapping[Split, np.ndarray]


def numeric_statistics(column: str, values: Values, labels: Values) -> NumericColumn:
    """Return the statistics of a numeric column.

    Args:
        column: Name of the column.
        values: Values of each split; NaN is missing.
        labels: Labels of each split, 0 or 1.
    """
    values = {split: np.asarray(values[split], np.float64) for split in SPLITS}
    present = {split: v[~np.isnan(v)] for split, v in values.items()}
    edges = _bin_edges(present["train"], [present[split] for split in SPLITS[1:]])
    value, label = _concatenate(values), _concatenate(labels)
    missing = np.isnan(value)
    return NumericColumn(
        column=column,
        edges=tuple(edges.tolist()),
        splits={s: _numeric_summary(len(values[s]), present[s], edges) for s in SPLITS},
        drift={split: number_drift(values["train"], values[split]) for split in SPLITS[1:]},
        leak=_leakage((label[~missing], value[~missing]), (label, missing)),
    )


def category_statistics(vocabulary: Vocabulary, codes: Values, labels: Values) -> CategoryColumn:
    """Return the statistics of a categorical column.

    Args:
        vocabulary: Vocabulary of the column.
        codes: Codes of each split's rows in the vocabulary.
        labels: Labels of each split, 0 or 1.
    """
    counts = {s: np.bincount(codes[s], minlength=vocabulary.num_codes) for s in SPLITS}
    # Codes by frequency in the training split, then by word; the first two do not stand for words.
    frequent = 2 + np.argsort(-counts["train"][2:], kind="stable")
    top = frequent[:TOP_WORDS]
    return CategoryColumn(
        column=vocabulary.column,
        num_words=len(vocabulary.words),
        splits={
            split: CategorySummary(
                num_rows=len(codes[split]),
                missing=int(counts[split][Vocabulary.MISSING]),
                unknown=int(counts[split][Vocabulary.UNKNOWN]),
                top={vocabulary.words[code - 2]: int(counts[split][code]) for code in top},
            )
            for split in SPLITS
        },
        drift={split: word_drift(counts["train"], counts[split]) for split in SPLITS[1:]},
        leak=_category_leakage(codes, labels, counts["train"]),
    )


def _concatenate(values: Values) -> np.ndarray:
    return np.concatenate([values[split] for split in SPLITS])


def _bin_edges(train: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Return histogram edges that ignore outliers; a few whole numbers get one bin each."""
    filled = [values for values in (train, *others) if len(values)]
    if not filled:
        return np.empty(0)
    present = filled[0]
    low, high = np.quantile(present, [0.005, 0.995])
    # Extend to the other splits, within limits that keep the shape of the training data visible.
    min_low, max_high = low - (high - low), high + (high - low)
    for values in filled[1:]:
        low = min(low, max(min_low, np.quantile(values, 0.01)))
        high = max(high, min(max_high, np.quantile(values, 0.99)))
    if high - low < _BINS and (present == np.rint(present)).all():
        low, high = np.floor(low), np.ceil(high)
        return np.arange(low, high + 2) - 0.5
    if low == high:
        margin = max(0.5, abs(low) * 1e-6)
        return np.array([low - margin, low + margin])
    return np.linspace(low, high, _BINS + 1)


def _numeric_summary(num_rows: int, present: np.ndarray, edges: np.ndarray) -> NumericSummary:
    functions = {
        "mean": np.mean, "std": np.std, "min": np.min, "median": np.median, "max": np.max,
    }  # fmt: skip
    bins = np.searchsorted(edges[1:-1], present, side="right")
    return NumericSummary(
        num_rows=num_rows,
        missing=num_rows - len(present),
        histogram=tuple(np.bincount(bins, minlength=max(len(edges) - 1, 0)).tolist()),
        **{name: float(f(present)) if len(present) else None for name, f in functions.items()},
    )


def _category_leakage(codes: Values, labels: Values, train_rows: np.ndarray) -> Leakage:
    positives = np.bincount(codes["train"], labels["train"], minlength=len(train_rows))
    overall = positives.sum() / max(train_rows.sum(), 1)
    share = np.where(train_rows > 0, positives / np.maximum(train_rows, 1), overall)
    code, label = (np.concatenate([v[s] for s in SPLITS[1:]]) for v in (codes, labels))
    missing = _concatenate(codes) == Vocabulary.MISSING
    return _leakage((label, share[code]), (_concatenate(labels), missing))


def _leakage(
    values: tuple[np.ndarray, np.ndarray], missing: tuple[np.ndarray, np.ndarray]
) -> Leakage:
    """Return the leakage of a column.

    Args:
        values: Labels and values as scores, of the rows that have a value.
        missing: Labels and whether the value is missing, of all rows.
    """
    aucs: list[float | None] = []
    suspect = False
    for label, score in (values, missing):
        rows = int(np.bincount(label, minlength=2).min())
        auc = float(roc_auc_score(label, score)) if rows else None
        if auc is not None and rows >= LEAK_ROWS and max(auc, 1 - auc) >= LEAK_THRESHOLD:
            suspect = True
        aucs.append(auc)
    return Leakage(auc=aucs[0], missing_auc=aucs[1], suspect=suspect)
