"""Makes rows in memory for benchmarks; imports neither Ray nor TensorFlow."""

import numpy as np

from ray_jobs.data.batch import IMAGE, LABEL, NUMERIC, WEIGHT
from ray_jobs.data.decoder import Batch, aligned_array


def make_arrays(num_rows: int, size: int, num_columns: int) -> Batch:
    """Return a batch of random rows, the same on every call.

    Args:
        num_rows: Rows of the batch.
        size: Side of the images in pixels.
        num_columns: Numeric columns.
    """
    rng = np.random.default_rng(0)
    image = aligned_array((num_rows, size, size, 3))
    image[:] = rng.integers(0, 256, image.shape, np.uint8)
    return {
        IMAGE: image,
        NUMERIC: rng.normal(size=(num_rows, num_columns)).astype(np.float32),
        LABEL: rng.integers(0, 2, (num_rows, 1)).astype(np.float32),
        WEIGHT: np.ones((num_rows, 1), np.float32),
    }
