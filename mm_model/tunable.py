"""Hyperparameters that can change between trainings without tracing the graph again.

A spec that holds `Tunable` numbers builds a model whose graph reads variables; a spec of plain
numbers builds constants.
"""

from typing import Any

import keras
from keras import ops


class Tunable(float):
    """A positive number that the graph reads from a variable.

    `float()` keeps the initial value, so Python branches stay the same.
    """

    def __init__(self, value: float) -> None:
        # Always float32: half the precision of a mixed-precision layer has too few digits.
        self.variable = keras.Variable(
            float(value), trainable=False, dtype="float32", autocast=False, name="tunable"
        )

    def assign(self, value: float) -> None:
        """Set the value that the graph reads from now on."""
        self.variable.assign(value)


def current_value(value: float, like: Any = None) -> Any:
    """Return a plain number as it is, or the tensor of a tunable's current value.

    Args:
        value: A number or a tunable.
        like: Tensor whose dtype a tunable's value is cast to.
    """
    if not isinstance(value, Tunable):
        return value
    current = ops.convert_to_tensor(value.variable)
    return current if like is None else ops.cast(current, like.dtype)


def l2_regularizer(l2: float) -> Any:
    """Return the L2 penalty of a kernel, or None for 0."""
    if isinstance(l2, Tunable):

        def penalty(kernel: Any) -> Any:
            return current_value(l2, kernel) * ops.sum(ops.square(kernel))

        return penalty
    return keras.regularizers.L2(l2) if l2 else None
