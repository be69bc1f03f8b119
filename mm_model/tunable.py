"""Numbers of a model that can be turned while its graph stays: for one training after another.

A `Tunable` is a float wherever Python asks, such as for whether there is dropout at all, and a
variable where the graph computes with it. A spec that holds tunables
makes such a model; the model of a spec without them holds constants.
"""

from typing import Any

import keras
from keras import ops


class Tunable(float):
    """A number above 0 that the graph reads anew each time.

    As a float it stays what it began as, so that whoever branches on it branches as before.
    """

    def __init__(self, value: float) -> None:
        # Not the precision of the layer that computes with it: half of that is too few digits.
        self.variable = keras.Variable(
            float(value), trainable=False, dtype="float32", autocast=False, name="tunable"
        )

    def assign(self, value: float) -> None:
        """Let the graph compute with another number from now on."""
        self.variable.assign(value)


def current_value(value: float, like: Any = None) -> Any:
    """Return what to compute with: the number itself, or what a tunable stands at.

    Args:
        value: a number or a tunable.
        like: tensor whose type it is to have, where it is a tunable's; a number has any.
    """
    if not isinstance(value, Tunable):
        return value
    found = ops.convert_to_tensor(value.variable)
    return found if like is None else ops.cast(found, like.dtype)
