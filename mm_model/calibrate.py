"""Fits the blend of the heads and the calibration of the result on held-out rows; NumPy only.

Shapes: N rows, M heads.
"""

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def log_loss(logits: np.ndarray, y: np.ndarray) -> float:
    """Return the mean cross-entropy of logits; y may be probabilities."""
    logits, y = np.asarray(logits, np.float64), np.asarray(y, np.float64)
    return float(np.mean(np.logaddexp(0.0, logits) - y * logits))
