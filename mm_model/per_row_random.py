"""Random numbers per row that do not depend on the number of replicas.

The replicas of a global batch have equal seed states. Each draws the numbers for all rows of the
batch and uses those for its own rows, so all seed states advance equally. XLA draws other numbers
than TensorFlow without XLA, but these do not depend on the number of replicas either.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras

_LOCAL = threading.local()


@contextmanager
def batch_part(index: Any, count: int) -> Iterator[None]:
    """Make `uniform` draw for part `index` of `count` equal parts of the global batch.

    Applies to the current thread, because a strategy runs each replica in its own thread.

    Args:
        index: Index of the part, from 0: a tensor, or an int, which becomes a constant in a traced
            function.
        count: Number of parts.
    """
    before = _part()
    _LOCAL.part = (index, count)
    try:
        yield
    finally:
        _LOCAL.part = before


def uniform(
    shape: Sequence[Any],
    seed: keras.random.SeedGenerator,
    minval: float = 0.0,
    maxval: float = 1.0,
) -> Any:
    """Return float32 random numbers, uniform in [minval, maxval), for the rows of the current part.

    With one part, these are the numbers of `keras.random.uniform`. Several parts together get the
    numbers that one part with all their rows would get. `shape` starts with the number of rows;
    `seed` advances by one draw in any case.
    """
    index, count = _part()
    num_rows, *row_shape = shape
    all_rows = (num_rows * count, *row_shape)
    drawn: Any = keras.random.uniform(all_rows, minval, maxval, dtype="float32", seed=seed)
    if count == 1:
        return drawn
    # Not drawn[start:stop], whose length is unknown if the index is a tensor.
    start = [index * num_rows, *[0] * len(row_shape)]
    return keras.ops.slice(drawn, start, shape)


def random_states(model: keras.Model) -> list[keras.Variable]:
    """Return the states of a model's random generators, in the order of its variables."""
    # Keras' `variables` are its `weights` and these states.
    weights = {id(weight) for weight in model.weights}
    return [variable for variable in model.variables if id(variable) not in weights]


def _part() -> tuple[Any, int]:
    return getattr(_LOCAL, "part", (0, 1))
