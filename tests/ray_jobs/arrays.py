"""Comparing the weights of two models."""

from collections.abc import Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]


def distance(first: Arrays, second: Arrays) -> float:
    """Return the largest distance of two tensors, as a share of the largest weight in them."""
    pairs = zip(first.values(), second.values(), strict=True)
    # NumPy's largest is not a number where one of them is not; Python's may pass it over.
    return float(np.max([np.abs(a - b).max() / max(np.abs(b).max(), 1e-12) for a, b in pairs]))


def same_arrays(first: Arrays, second: Arrays) -> bool:
    """Whether two copies of variables are bitwise the same, in the same order."""
    pairs = zip(first.values(), second.values(), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)
