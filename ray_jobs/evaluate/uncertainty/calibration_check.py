"""Checks whether predicted probabilities agree with the labels.

Shapes: N rows, D draws, K bins.
"""

from typing import Any

import numpy as np

from ray_jobs.train.metrics import ECE_BINS, bin_of, reliability

_NUM_DRAWS = 1000
_MAX_NUMBERS = 1 << 22
_Z = 1.959964  # the 97.5 % quantile of the normal distribution


def calibration_check(
    label_N: np.ndarray, probability_N: np.ndarray, weight_N: np.ndarray | None = None
) -> dict[str, float]:
    """Return the calibration error, and what it would be if all probabilities were right.

    On few rows, the calibration error is above 0 even for right probabilities. `expected` is its
    mean, and `high` its 95 % quantile, over labels drawn from the probabilities; `p_value` is the
    fraction of draws with at least the found error (after Bröcker and Smith 2007, "Increasing the
    Reliability of Reliability Diagrams", section 3b, who also draw the probabilities). Assumes
    independent rows.
    """
    weight_N = np.ones(len(label_N)) if weight_N is None else weight_N
    bins_NK = np.arange(ECE_BINS) == bin_of(probability_N)[:, None]

    def errors(label_DN: np.ndarray) -> np.ndarray:
        gap_DN = (probability_N - label_DN) * weight_N
        return np.abs(gap_DN @ bins_NK).sum(axis=1) / weight_N.sum()

    rng, drawn = np.random.default_rng(0), list[np.ndarray]()
    size = max(_MAX_NUMBERS // len(label_N), 1)
    for start in range(0, _NUM_DRAWS, size):
        shape = (min(size, _NUM_DRAWS - start), len(label_N))
        drawn.append(errors((rng.random(shape) < probability_N).astype(np.float64)))
    errors_D, (found,) = np.concatenate(drawn), errors(label_N[None].astype(np.float64))
    return {
        "ece": float(found),
        "expected": float(errors_D.mean()),
        "high": float(np.quantile(errors_D, 0.95)),
        # The found error counts as one of the draws, so that the value is never 0.
        "p_value": float((1 + (errors_D >= found - 1e-9).sum()) / (1 + len(errors_D))),
    }


def reliability_diagram(
    label_N: np.ndarray, probability_N: np.ndarray, weight_N: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Return the rows of each bin that has any, and its fraction of positives with an interval.

    The interval `low` to `high` is Wilson's (Wilson 1927, "Probable Inference, the Law of
    Succession, and Statistical Inference"). Weighted rows count as (sum of weights)² / sum of
    squared weights rows (Kish 1965, "Survey Sampling", section 11.7).
    """
    _, mean_K, fraction_K = reliability(label_N, probability_N, weight_N)
    weight_N = np.ones(len(label_N)) if weight_N is None else weight_N
    bin_N = bin_of(probability_N)
    num_K = np.bincount(bin_N, minlength=ECE_BINS)
    found: list[dict[str, Any]] = []
    for k in np.flatnonzero(num_K):
        weight = weight_N[bin_N == k]
        low, high = wilson_interval(float(fraction_K[k]), weight.sum() ** 2 / (weight**2).sum())
        found.append(
            {
                "num_rows": int(num_K[k]),
                "probability": float(mean_K[k]),
                "positives": float(fraction_K[k]),
                "low": low,
                "high": high,
            }
        )
    return found


def wilson_interval(fraction: float, num_rows: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a fraction of rows."""
    scale = 1 + _Z**2 / num_rows
    centre = fraction + _Z**2 / (2 * num_rows)
    margin = _Z * np.sqrt(fraction * (1 - fraction) / num_rows + _Z**2 / (4 * num_rows**2))
    # Rounding may give a tiny number instead of 0.
    low, high = np.clip([(centre - margin) / scale, (centre + margin) / scale], 0, 1)
    return float(low), float(high)
