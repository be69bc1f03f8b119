"""The contract of one batch: names, types and shapes; and how a global batch is shared out.

    image       uint8    (B, H, W, 3); of several images a row (B, N, H, W, 3)
    features    float32  (B, V, F), views and width of what a frozen backbone gave, where the shards
                         hold it in place of images; of several images a row (B, N, V, F)
    image_mask  float32  (B, N), 0 where an image is missing; with several images a row only
    numeric     float32  (B, F), NaN where missing, columns in the manifest's order
    category    int32    (B, C), codes of the manifest's vocabularies; with categories only
    label       float32  (B, 1)
    weight      float32  (B, 1), 0 for rows that only fill a batch

Imports NumPy at most, so that specs may use it.
"""

import numpy as np

KEY = "key"
IMAGE = "image"
FEATURES = "features"
IMAGE_MASK = "image_mask"
NUMERIC = "numeric"
CATEGORY = "category"
LABEL = "label"
WEIGHT = "weight"

INPUT_TYPES = {
    IMAGE: np.uint8,
    FEATURES: np.float32,
    IMAGE_MASK: np.float32,
    NUMERIC: np.float32,
    CATEGORY: np.int32,
}
"""What a model may take."""

MAX_STREAMS = 64


def num_streams(global_batch_size: int) -> int:
    """Return the number of streams that rows are dealt to: the greatest divisor up to 64.

    Each step takes the same number of rows from every stream and a worker serves an equal share of
    the streams, so the order of rows does not depend on how many workers there are.
    """
    return max(n for n in range(1, MAX_STREAMS + 1) if global_batch_size % n == 0)
