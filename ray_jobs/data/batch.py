"""Defines the arrays of a batch: names, types and shapes.

    image       uint8    (B, H, W, 3), or (B, N, H, W, 3) with several or optional images per row
    features    float32  (B, V, F) or (B, N, V, F); replaces `image` if the shards contain features
                         of a frozen backbone: V views of the image, F features each; with tokens
                         (B, V, 1 + T, F) or (B, N, V, 1 + T, F)
    image_mask  float32  (B, N), 0 for a missing image; only with several or optional images per row
    numeric     float32  (B, F), NaN for a missing number; columns in the manifest's order
    category    int32    (B, C), codes of the manifest's vocabularies; only with categories
    text        int32    (B, C, L), token ids of C text columns; only with texts
    text_mask   float32  (B, C, L), 0 for padding and in a missing text; only with texts
    text_cut    float32  (B, 1), number of the row's texts with more than L tokens; only with texts
    label       float32  (B, 1)
    weight      float32  (B, 1), from `prepare.weight_column`, else 1; 0 for rows that only fill the
                         last batch

Imports only NumPy.
"""

import numpy as np

KEY = "key"
IMAGE = "image"
FEATURES = "features"
IMAGE_MASK = "image_mask"
NUMERIC = "numeric"
CATEGORY = "category"
TEXT = "text"
TEXT_MASK = "text_mask"
TEXT_CUT = "text_cut"
LABEL = "label"
FOLD = "fold"
"""Column of the shards with the fold of each row, if `prepare.fold_column` is set."""
GROUP = "group"
"""Column of the shards with the group of each row, if `prepare.group_column` is set."""
WEIGHT = "weight"
ORIGINAL_PIXELS = "original_pixels"
"""Column of the shards: number of pixels of the largest image of a row, before it was resized."""

INPUT_TYPES = {
    IMAGE: np.uint8,
    FEATURES: np.float32,
    IMAGE_MASK: np.float32,
    NUMERIC: np.float32,
    CATEGORY: np.int32,
    TEXT: np.int32,
    TEXT_MASK: np.float32,
}
"""NumPy types of the possible inputs of a model."""
