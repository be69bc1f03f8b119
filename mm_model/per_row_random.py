"""Random numbers per row that do not depend on the number of replicas.

Replicas that share a global batch have equal seed states. Each draws the numbers of all rows of the
batch and uses those of its own rows, so all seed states advance equally. (XLA draws different
numbers than TensorFlow without XLA, but again the same for any number of replicas.)
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
        index: Number of the part, from 0: an int, which a traced function contains as a constant,
            or a tensor.
        count: Number of parts.

    Raises:
        ValueError: If `index` is not in [0, `count`).
    """
    if isinstance(index, int) and not 0 <= index < count:
        raise ValueError(f"part {index} of {count} does not exist; parts are numbered from 0")
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
    dtype: str = "float32",
) -> Any:
    """Return uniform random numbers in [minval, maxval) for the rows of the current part.

    With one part, these are the numbers of `keras.random.uniform`; several parts together draw what
    one part with all their rows would draw. `shape` starts with the number of rows; `seed` advances
    by one draw in any case.
    """
    index, count = _part()
    num_rows, *row_shape = shape
    all_rows = (num_rows * count, *row_shape)
    drawn: Any = keras.random.uniform(all_rows, minval, maxval, dtype=dtype, seed=seed)
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
