"""Random numbers of which a replica gets its rows' share.

Several replicas that share a global batch keep equal seed states, each draws for all rows of the
batch and takes those of its own. So what a row draws does not depend on how many replicas there
are, and all seed states advance alike. (XLA draws other numbers than TensorFlow without it; they
are again the same for any number of replicas.)
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras

_LOCAL = threading.local()


@contextmanager
def replica(index: Any, count: int) -> Iterator[None]:
    """Let this thread compute part `index` of `count` equal parts of the global batch.

    Where a function is traced, a part that is an int becomes a constant of the graph; it may be a
    tensor, too. It is the thread's own, since a strategy of several devices runs each replica in a
    thread of its own.

    Raises:
        ValueError: if there is no such part.
    """
    if isinstance(index, int) and not 0 <= index < count:
        raise ValueError(f"part {index} of {count} does not exist; parts count from 0")
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
    """Return uniform numbers in [minval, maxval) for the rows of this part.

    With one part they are those of `keras.random.uniform`; several parts together draw what one
    part of all their rows would.

    Args:
        shape: of the result; rows come first.
        seed: advances by one draw, whatever the part.
        minval: smallest number.
        maxval: above the largest number.
        dtype: of the numbers.
    """
    index, count = _part()
    num_rows, *of_a_row = shape
    all_rows = (num_rows * count, *of_a_row)
    drawn: Any = keras.random.uniform(all_rows, minval, maxval, dtype=dtype, seed=seed)
    if count == 1:
        return drawn
    # Not as drawn[start:stop], whose length would be unknown where the index is a tensor.
    start = [index * num_rows, *[0] * len(of_a_row)]
    return keras.ops.slice(drawn, start, shape)


def _part() -> tuple[Any, int]:
    return getattr(_LOCAL, "part", (0, 1))
