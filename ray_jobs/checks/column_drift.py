"""Measures how the values of a column differ from those of the training rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from mm_model.spec import Spec
from mm_model.statistics import Vocabulary

PSI_THRESHOLD = 0.2
"""By convention, a population stability index of 0.1 is a slight and one of 0.25 a major shift."""
P_VALUE_THRESHOLD = 0.001
"""Small splits differ by chance, so drift must also be significant."""
MISSING_THRESHOLD = 0.05
"""Minimum difference between two fractions, of missing values or of positive rows, to report."""

_PSI_BINS = 10
_PSI_WORDS = 20
_MIN_SHARE = 1e-4


class Drift(Spec):
    """How the distribution of a column differs from that of the training rows."""

    psi: float | None
    """Population stability index of the values that are not missing."""
    ks: float | None
    """Two-sample Kolmogorov-Smirnov statistic; null for categorical columns."""
    p_value: float | None
    """P-value of the Kolmogorov-Smirnov test; for categorical columns, of the chi-squared test."""
    missing_p_value: float | None
    """P-value of the chi-squared test for a difference in the fractions of missing values."""
    values_drifted: bool
    missing_drifted: bool


def number_drift(train_N: np.ndarray, other_N: np.ndarray) -> Drift:
    """Return the drift of a column of numbers; NaN is missing."""
    train, other = (values[~np.isnan(values)] for values in (train_N, other_N))
    return _drift(
        _psi(*_decile_counts(train, other)),
        *_kolmogorov_smirnov(train, other),
        [(len(train), len(train_N)), (len(other), len(other_N))],
    )


def word_drift(train: np.ndarray, other: np.ndarray) -> Drift:
    """Return the drift of a column of words, given the rows with each code of its vocabulary."""
    frequent = 2 + np.argsort(-train[2:], kind="stable")[:_PSI_WORDS]
    pair = [_group_rare(counts, frequent) for counts in (train, other)]
    present = [(int(counts[1:].sum()), int(counts.sum())) for counts in (train, other)]
    return _drift(_psi(*pair), None, _chi_squared(np.stack(pair)), present)


def compare_fractions(counts: Sequence[tuple[int, int]]) -> tuple[float | None, bool]:
    """Return the chi-squared p-value of two fractions, and whether they differ notably.

    Args:
        counts: For each fraction, its numerator and denominator in rows.
    """
    p_value = _chi_squared(np.array([(some, total - some) for some, total in counts]))
    fractions = [some / total for some, total in counts if total]
    differ = len(fractions) == 2 and abs(fractions[0] - fractions[1]) >= MISSING_THRESHOLD
    return p_value, differ and _is_significant(p_value)


def _decile_counts(train: np.ndarray, other: np.ndarray) -> list[np.ndarray]:
    """Count the values of both arrays between the deciles of the training values."""
    if not len(train):
        return [np.zeros(0, np.int64)] * 2
    cuts = np.unique(np.quantile(train, np.arange(1, _PSI_BINS) / _PSI_BINS))
    return [
        np.bincount(np.searchsorted(cuts, values, side="left"), minlength=len(cuts) + 1)
        for values in (train, other)
    ]


def _group_rare(counts: np.ndarray, frequent: np.ndarray) -> np.ndarray:
    """Return the counts of the frequent words, then of all other and of unknown words."""
    named = counts[frequent]
    return np.append(named, [counts[2:].sum() - named.sum(), counts[Vocabulary.UNKNOWN]])


def _psi(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return the population stability index of two histograms; an empty bin counts as 1e-4."""
    if not first.sum() or not second.sum():
        return None
    p, q = (np.maximum(counts / counts.sum(), _MIN_SHARE) for counts in (first, second))
    return float(((q - p) * np.log(q / p)).sum())


def _kolmogorov_smirnov(train: np.ndarray, other: np.ndarray) -> tuple[float | None, float | None]:
    """Return the two-sample statistic and its p-value."""
    if not len(train) or not len(other):
        return None, None
    result: Any = stats.ks_2samp(train, other, method="asymp")
    return float(result.statistic), float(result.pvalue)


def _chi_squared(counts: np.ndarray) -> float | None:
    """Return the p-value of a contingency table; None if only one row or column has counts."""
    counts = counts[counts.sum(axis=1) > 0][:, counts.sum(axis=0) > 0]
    if min(counts.shape) < 2:
        return None
    result: Any = stats.chi2_contingency(counts)
    return float(result.pvalue)


def _drift(
    psi: float | None, ks: float | None, p_value: float | None, present: Sequence[tuple[int, int]]
) -> Drift:
    """Return the drift of a column.

    Args:
        psi: Population stability index.
        ks: Kolmogorov-Smirnov statistic.
        p_value: P-value of the difference between the values.
        present: Number of present values and of rows, for the training and the other split.
    """
    missing_p_value, missing_drifted = compare_fractions(present)
    return Drift(
        psi=psi,
        ks=ks,
        p_value=p_value,
        missing_p_value=missing_p_value,
        values_drifted=psi is not None and psi >= PSI_THRESHOLD and _is_significant(p_value),
        missing_drifted=missing_drifted,
    )


def _is_significant(p_value: float | None) -> bool:
    return p_value is not None and p_value < P_VALUE_THRESHOLD
