"""Computes confidence intervals of statistics of rows by the bootstrap.

Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentiles). If
rows are grouped, whole groups are drawn (Davison and Hinkley 1997, "Bootstrap Methods and their
Application", section 3.8).

    N rows   D draws   G groups
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TypeVar

import numpy as np

LEVEL = 0.95

K = TypeVar("K", bound=Hashable)

Interval = tuple[float, float] | None
"""Lower and upper end; None if undefined, also for some draws."""

# A few arrays of this many numbers fit in a processor's cache.
_MAX_COUNTS = 1 << 19


def bootstrap_intervals(
    statistics: Callable[[np.ndarray], Mapping[K, np.ndarray]],
    label_N: np.ndarray,
    group_N: np.ndarray | None = None,
    num_draws: int = 1000,
) -> dict[K, Interval]:
    """Return the 95 % interval of each statistic; None for all if there is only one row or group.

    Args:
        statistics: Computes statistics (D,) by name, given how often each row was drawn (D, N); NaN
            where a statistic is undefined.
        label_N: Labels, 0 or 1; if there are both, draws with only one class are repeated.
        group_N: Index of each row's group; by default, rows are drawn one by one.
        num_draws: Number of draws.
    """
    num_units = len(label_N) if group_N is None else len(np.unique(group_N))
    if num_units < 2:
        return dict.fromkeys(statistics(np.ones((1, len(label_N)), np.uint16)))
    drawn = [statistics(counts_DN) for counts_DN in draw_rows(label_N, group_N, num_draws)]
    return {name: _interval(np.concatenate([d[name] for d in drawn])) for name in drawn[0]}


def draw_rows(
    label_N: np.ndarray, group_N: np.ndarray | None = None, num_draws: int = 1000
) -> Iterator[np.ndarray]:
    """Yield how often each row was drawn, (D, N), for some draws at a time.

    Args:
        label_N: As in `bootstrap_intervals`.
        group_N: As in `bootstrap_intervals`.
        num_draws: Number of draws.
    """
    rng, num_rows = np.random.default_rng(0), len(label_N)
    group_N = None if group_N is None else np.unique(group_N, return_inverse=True)[1]
    num_units = num_rows if group_N is None else int(group_N.max()) + 1
    has_both = 0 < label_N.sum() < num_rows
    missing = num_draws
    while missing:
        size = min(missing, max(_MAX_COUNTS // num_rows, 1))
        counts_DN = np.empty((size, num_rows), np.uint16)
        for draw in range(size):
            counts = np.bincount(rng.integers(0, num_units, num_units), minlength=num_units)
            counts_DN[draw] = counts if group_N is None else counts[group_N]
        if has_both:
            of_positives = counts_DN[:, label_N == 1].any(axis=1)
            counts_DN = counts_DN[of_positives & counts_DN[:, label_N == 0].any(axis=1)]
        missing -= len(counts_DN)
        if len(counts_DN):
            yield counts_DN


def _interval(values_D: np.ndarray) -> Interval:
    if np.isnan(values_D).any():
        return None
    low, high = np.quantile(values_D, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
