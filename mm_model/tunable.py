"""Hyperparameters that can change between training runs without tracing the graph again.

A spec with `Tunable` numbers builds a model whose graph reads variables; a spec with plain numbers
builds one whose graph contains constants.
"""

from typing import Any

import keras
from keras import ops


class Tunable(float):
    """A positive number that the graph reads from a variable.

    `float()` keeps the initial value, so Python branches stay the same.
    """

    def __init__(self, value: float) -> None:
        # Always float32, because the half precision of a mixed-precision layer has too few digits.
        self.variable = keras.Variable(
            float(value), trainable=False, dtype="float32", autocast=False, name="tunable"
        )

    def assign(self, value: float) -> None:
        """Set the value that the graph reads from now on."""
        self.variable.assign(value)


def current_value(value: float, like: Any = None) -> Any:
    """Return a plain number unchanged, or a tensor with the current value of a tunable.

    Args:
        value: A number or a tunable.
        like: Tensor to whose dtype a tunable's value is cast.
    """
    if not isinstance(value, Tunable):
        return value
    current = ops.convert_to_tensor(value.variable)
    return current if like is None else ops.cast(current, like.dtype)


def l2_regularizer(l2: float) -> Any:
    """Return a regularizer for kernels, or None if `l2` is 0."""
    if isinstance(l2, Tunable):

        def penalty(kernel: Any) -> Any:
            return current_value(l2, kernel) * ops.sum(ops.square(kernel))

        return penalty
    return keras.regularizers.L2(l2) if l2 else None
