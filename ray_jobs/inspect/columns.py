"""One column's values by split → its distribution, drift against training, leakage.

Enters: arrays of the rows looked at, by split.  Leaves: facts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn.metrics import roc_auc_score

from mm_model.statistics import Vocabulary
from ray_jobs.config.spec import SPLITS, Split
from ray_jobs.inspect.facts import (
    CategoryFacts,
    DriftFacts,
    LeakFacts,
    NumberFacts,
    NumericFacts,
    WordFacts,
)

PSI_THRESHOLD = 0.2
"""By custom, a population stability index from 0.1 is a slight and one from 0.25 a major shift."""
P_VALUE_THRESHOLD = 0.001
"""Small splits differ by chance: what is flagged is also unlikely to be chance."""
MISSING_THRESHOLD = 0.05
"""Difference between two shares of missing values."""
LEAK_THRESHOLD = 0.99
LEAK_ROWS = 10
"""Rows that each class needs at least for a suspicion."""
TOP_WORDS = 12

_BINS = 30
_PSI_BINS = 10
_PSI_WORDS = 20
_LEAST_SHARE = 1e-4

Values = Mapping[Split, np.ndarray]


def numeric_facts(column: str, values: Values, labels: Values) -> NumericFacts:
    """Return the facts of a column of numbers.

    Args:
        column: name.
        values: of each split, NaN for missing.
        labels: of each split, 0 or 1.
    """
    values = {split: np.asarray(v, np.float64) for split, v in values.items()}
    present = {split: v[~np.isnan(v)] for split, v in values.items()}
    edges = _bin_edges(present["train"], [present[split] for split in SPLITS[1:]])
    return NumericFacts(
        column=column,
        edges=tuple(edges.tolist()),
        splits={
            split: _number_facts(len(values[split]), present[split], edges) for split in SPLITS
        },
        drift={
            split: _drift(
                _psi(*_decile_counts(present["train"], present[split])),
                _kolmogorov_smirnov(present["train"], present[split]),
                [(len(present[s]), len(values[s])) for s in ("train", split)],
            )
            for split in SPLITS[1:]
        },
        leak=_numeric_leak(values, labels),
    )


def category_facts(vocabulary: Vocabulary, codes: Values, labels: Values) -> CategoryFacts:
    """Return the facts of a column of words.

    Args:
        vocabulary: of the column.
        codes: of each split's rows, by the vocabulary.
        labels: of each split, 0 or 1.
    """
    counts = {s: np.bincount(codes[s], minlength=vocabulary.num_codes) for s in SPLITS}
    # Codes of the most frequent words of training first; ties in the order of the words.
    frequent = 2 + np.argsort(-counts["train"][2:], kind="stable")
    drift = {}
    for split in SPLITS[1:]:
        pair = [_lumped(counts[s], frequent[:_PSI_WORDS]) for s in ("train", split)]
        drift[split] = _drift(
            _psi(*pair),
            (None, _chi_squared(np.stack(pair))),
            [(int(counts[s][1:].sum()), len(codes[s])) for s in ("train", split)],
        )
    return CategoryFacts(
        column=vocabulary.column,
        num_words=len(vocabulary.words),
        splits={
            split: WordFacts(
                num_rows=len(codes[split]),
                missing=int(counts[split][Vocabulary.MISSING]),
                unknown=int(counts[split][Vocabulary.UNKNOWN]),
                top={
                    vocabulary.words[code - 2]: int(counts[split][code])
                    for code in frequent[:TOP_WORDS]
                },
            )
            for split in SPLITS
        },
        drift=drift,
        leak=_category_leak(codes, labels, vocabulary.num_codes),
    )


def share_p_value(counts: list[tuple[int, int]]) -> float | None:
    """Return the chance that two shares differ as they do, by chi-squared; None if both are equal.

    Args:
        counts: (rows with the trait, rows) of both.
    """
    return _chi_squared(np.array([(some, total - some) for some, total in counts]))


def auc(label: np.ndarray, score: np.ndarray) -> float | None:
    """Return the ROC AUC of a score; None where there is one class only."""
    if len(np.unique(label)) < 2:
        return None
    return float(roc_auc_score(label, score))


def _bin_edges(train: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Return bins that outliers do not stretch; of few whole numbers each has a bin of its own."""
    filled = [values for values in (train, *others) if len(values)]
    if not filled:
        return np.empty(0)
    present = filled[0]
    low, high = np.quantile(present, [0.005, 0.995])
    # Other splits may be elsewhere, but not so far that nothing is seen of training's shape.
    least, most = low - (high - low), high + (high - low)
    for values in filled[1:]:
        low = min(low, max(least, np.quantile(values, 0.01)))
        high = max(high, min(most, np.quantile(values, 0.99)))
    whole = bool((present == np.rint(present)).all())
    if whole and high - low < _BINS:
        low, high = np.floor(low), np.ceil(high)
        return np.arange(low, high + 2) - 0.5
    if low == high:
        margin = max(0.5, abs(low) * 1e-6)
        return np.array([low - margin, low + margin])
    return np.linspace(low, high, _BINS + 1)


def _number_facts(num_rows: int, present: np.ndarray, edges: np.ndarray) -> NumberFacts:
    if not len(present):
        return NumberFacts(
            num_rows=num_rows, missing=num_rows, mean=None, std=None, min=None, median=None,
            max=None, histogram=(0,) * max(len(edges) - 1, 0),
        )  # fmt: skip
    bins = np.searchsorted(edges[1:-1], present, side="right")
    return NumberFacts(
        num_rows=num_rows,
        missing=num_rows - len(present),
        mean=float(present.mean()),
        std=float(present.std()),
        min=float(present.min()),
        median=float(np.median(present)),
        max=float(present.max()),
        histogram=tuple(np.bincount(bins, minlength=len(edges) - 1).tolist()),
    )


def _decile_counts(train: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many values lie between the training values' deciles."""
    if not len(train):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    cuts = np.unique(np.quantile(train, np.arange(1, _PSI_BINS) / _PSI_BINS))
    first, second = (
        np.bincount(np.searchsorted(cuts, v, side="left"), minlength=len(cuts) + 1)
        for v in (train, other)
    )
    return first, second


def _lumped(counts: np.ndarray, frequent: np.ndarray) -> np.ndarray:
    """Return the counts of the frequent words, of all others, and of the unknown ones."""
    named = counts[frequent]
    return np.append(named, [counts[2:].sum() - named.sum(), counts[Vocabulary.UNKNOWN]])


def _psi(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return the population stability index of two rows of counts; an empty bin counts 1e-4."""
    if not first.sum() or not second.sum():
        return None
    p, q = (np.maximum(counts / counts.sum(), _LEAST_SHARE) for counts in (first, second))
    return float(((q - p) * np.log(q / p)).sum())


def _kolmogorov_smirnov(train: np.ndarray, other: np.ndarray) -> tuple[float | None, float | None]:
    if not len(train) or not len(other):
        return None, None
    result: Any = stats.ks_2samp(train, other, method="asymp")
    return float(result.statistic), float(result.pvalue)


def _chi_squared(counts: np.ndarray) -> float | None:
    """Return the p-value of a contingency table; None where it has one row or column only."""
    counts = counts[counts.sum(axis=1) > 0][:, counts.sum(axis=0) > 0]
    if min(counts.shape) < 2:
        return None
    result: Any = stats.chi2_contingency(counts)
    return float(result.pvalue)


def _drift(
    psi: float | None,
    test: tuple[float | None, float | None],
    present: list[tuple[int, int]],
) -> DriftFacts:
    """Judge a column; `present` is (values there, rows) of training and of the other split."""
    (statistic, p_value), missing_p_value = test, share_p_value(present)
    shares = [some / total if total else None for some, total in present]
    apart = abs(shares[0] - shares[1]) if None not in shares else 0.0  # pyright: ignore
    return DriftFacts(
        psi=psi,
        ks=statistic,
        p_value=p_value,
        missing_p_value=missing_p_value,
        values_drifted=bool(psi is not None and psi >= PSI_THRESHOLD and _unlikely(p_value)),
        missing_drifted=bool(apart >= MISSING_THRESHOLD and _unlikely(missing_p_value)),
    )


def _unlikely(p_value: float | None) -> bool:
    return p_value is not None and p_value < P_VALUE_THRESHOLD


def _numeric_leak(values: Values, labels: Values) -> LeakFacts:
    value = np.concatenate([values[s] for s in SPLITS])
    label = np.concatenate([labels[s] for s in SPLITS])
    missing = np.isnan(value)
    return _leak(
        (label[~missing], value[~missing]),
        (label, missing),
    )


def _category_leak(codes: Values, labels: Values, num_codes: int) -> LeakFacts:
    rows = np.bincount(codes["train"], minlength=num_codes)
    positives = np.bincount(codes["train"], labels["train"], minlength=num_codes)
    overall = positives.sum() / max(rows.sum(), 1)
    share = np.where(rows > 0, positives / np.maximum(rows, 1), overall)
    code = np.concatenate([codes[s] for s in SPLITS[1:]])
    label = np.concatenate([labels[s] for s in SPLITS[1:]])
    everything = np.concatenate([codes[s] for s in SPLITS])
    return _leak(
        (label, share[code]),
        (np.concatenate([labels[s] for s in SPLITS]), everything == Vocabulary.MISSING),
    )


def _leak(
    values: tuple[np.ndarray, np.ndarray], missing: tuple[np.ndarray, np.ndarray]
) -> LeakFacts:
    """Judge two scores, each with its labels."""
    found = [auc(label, score) for label, score in (values, missing)]
    enough = [min(np.bincount(label, minlength=2)) >= LEAK_ROWS for label, _ in (values, missing)]
    suspect = any(
        value is not None and many and max(value, 1 - value) >= LEAK_THRESHOLD
        for value, many in zip(found, enough, strict=True)
    )
    return LeakFacts(auc=found[0], missing_auc=found[1], suspect=suspect)
