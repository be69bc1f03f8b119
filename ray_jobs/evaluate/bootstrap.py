"""Computes confidence intervals of statistics of rows by the bootstrap.

Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentiles). If
rows are grouped, whole groups are drawn (Davison and Hinkley 1997, "Bootstrap Methods and their
Application", section 3.8).

    N rows
"""

from collections.abc import Callable, Mapping

import numpy as np

LEVEL = 0.95

Statistics = Mapping[str, float | None]


def bootstrap_intervals(
    statistics: Callable[[np.ndarray], Statistics],
    label_N: np.ndarray,
    group_N: np.ndarray | None = None,
    num_draws: int = 1000,
) -> dict[str, tuple[float, float] | None]:
    """Return the 95 % interval of each statistic; None if it is undefined for some draws.

    Args:
        statistics: Computes statistics by name, given the indices of the drawn rows.
        label_N: Labels, 0 or 1; draws with only one class are repeated.
        group_N: Index of each row's group; by default, rows are drawn one by one.
        num_draws: Number of draws.
    """
    rng, draws = np.random.default_rng(0), list[Statistics]()
    members = None
    if group_N is not None and len(np.unique(group_N)) < len(group_N):
        order = np.argsort(group_N, kind="stable")
        starts = np.flatnonzero(np.diff(group_N[order])) + 1
        members = np.split(order, starts)
    while len(draws) < num_draws:
        if members is None:
            rows = rng.integers(0, len(label_N), len(label_N))
        else:
            chosen = rng.integers(0, len(members), len(members))
            rows = np.concatenate([members[i] for i in chosen])
        if 0 < label_N[rows].sum() < len(rows):
            draws.append(statistics(rows))
    return {name: _interval([draw[name] for draw in draws]) for name in draws[0]}


def _interval(values: list[float | None]) -> tuple[float, float] | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def auc_gain(
    label: np.ndarray,
    ours: np.ndarray,
    theirs: np.ndarray,
    num_draws: int = 10_000,
    weight: np.ndarray | None = None,
) -> dict[str, float]:
    """Return the `difference` in ROC AUC of two models, with its 95 % interval `low` to `high`.

    The bootstrap is paired: it draws the same rows for both models.

    Args:
        label: 0 or 1, (N,), with both classes.
        ours: Probabilities of 1, (N,).
        theirs: Probabilities of 1 of the model to compare with, (N,).
        num_draws: Number of bootstrap draws, each of which takes about 3 ms.
        weight: Weights of the rows, (N,); by default, 1.
    """
    from sklearn.metrics import roc_auc_score

    def gain(rows: np.ndarray) -> dict[str, float]:
        own = None if weight is None else weight[rows]
        first, second = (
            roc_auc_score(label[rows], p[rows], sample_weight=own) for p in (ours, theirs)
        )
        return {"difference": float(first - second)}

    intervals = bootstrap_intervals(gain, label, num_draws=num_draws)
    low, high = intervals["difference"] or (np.nan, np.nan)
    return {**gain(np.arange(len(label))), "low": low, "high": high}
