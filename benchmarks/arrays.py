"""Rows for benchmarks that lie ready in memory; NumPy only."""

import numpy as np

from ray_jobs.data.batch import IMAGE, LABEL, NUMERIC, WEIGHT
from ray_jobs.data.reader import Batch, aligned


def make_arrays(num_rows: int, size: int, num_columns: int) -> Batch:
    """Return a batch of so many rows, always the same ones.

    Args:
        num_rows: of all arrays.
        size: side of the images in pixels.
        num_columns: numbers of a row.
    """
    rng = np.random.default_rng(0)
    image = aligned((num_rows, size, size, 3))
    image[:] = rng.integers(0, 256, image.shape, np.uint8)
    return {
        IMAGE: image,
        NUMERIC: rng.normal(size=(num_rows, num_columns)).astype(np.float32),
        LABEL: rng.integers(0, 2, (num_rows, 1)).astype(np.float32),
        WEIGHT: np.ones((num_rows, 1), np.float32),
    }
