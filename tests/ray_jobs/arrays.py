"""Copies and compares weights."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras

Arrays = Mapping[Any, np.ndarray]


def arrays_of(variables: "Sequence[keras.Variable]") -> dict[str, np.ndarray]:
    """Return a copy of every variable by index and path, as in checkpoints."""
    return {f"{i:05d} {v.path}": np.array(v.numpy()) for i, v in enumerate(variables)}


def distance(first: Arrays, second: Arrays) -> float:
    """Return the largest difference of two tensors relative to the largest weight in them."""
    pairs = zip(first.values(), second.values(), strict=True)
    # Unlike Python's max, NumPy's propagates NaN.
    return float(np.max([np.abs(a - b).max() / max(np.abs(b).max(), 1e-12) for a, b in pairs]))


def same_arrays(first: Arrays, second: Arrays) -> bool:
    """Whether two copies of variables are bitwise equal, in the same order."""
    pairs = zip(first.values(), second.values(), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


def identical(first: Arrays, second: Arrays) -> bool:
    """Whether names, dtypes, shapes and bits are equal, in any order."""

    def bits(arrays: Arrays) -> dict[str, object]:
        return {name: (v.dtype, v.shape, v.tobytes()) for name, v in arrays.items()}

    return bits(first) == bits(second)
