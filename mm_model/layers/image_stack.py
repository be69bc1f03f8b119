"""Converts several images per row to a batch of single images and back; selects feature views.

Shapes: B rows, N images per row, V views, T tokens, F and G features, H × W pixels.
"""

from typing import Any

import keras
from keras import layers, ops

from mm_model import per_row_random


@keras.saving.register_keras_serializable("mm_model")
class FoldImages(layers.Layer):
    """Turns several images per row into one batch, so that one branch processes all of them.

    Replaces a missing image by the first present image of its row, because its placeholder
    resembles no photo and would distort the batch-norm statistics in training. In a row without
    images, the placeholders stay. `UnfoldImages` ignores both later. Also folds precomputed
    features (V, F) per image.

    Input: images (B, N, H, W, 3), mask (B, N), 0 for missing.  Output: (B × N, H, W, 3).
    """

    def __init__(self, **kwargs: Any) -> None:
        # Half precision cannot represent fractions of pixel values up to 255.
        super().__init__(autocast=False, **kwargs)

    def call(self, images_and_mask: Any) -> Any:
        """Replace missing images and fold."""
        images_BNHWC, mask_BN = images_and_mask
        num_images, *image_shape = images_BNHWC.shape[1:]
        present_BN = mask_BN > 0
        first_B1 = ops.argmax(ops.cast(present_BN, "int32"), axis=1, keepdims=True)
        chosen_BN: Any = ops.where(present_BN, ops.arange(num_images, dtype="int32"), first_B1)
        shape: Any = ops.shape(mask_BN)
        start_B1: Any = ops.expand_dims(ops.arange(shape[0], dtype="int32") * num_images, 1)
        folded = ops.reshape(images_BNHWC, (-1, *image_shape))
        return ops.take(folded, ops.reshape(start_B1 + chosen_BN, (-1,)), axis=0)


@keras.saving.register_keras_serializable("mm_model")
class UnfoldImages(layers.Layer):
    """Turns features of single images into features of rows.

    The pooled features of a row are the mean over its present images (zeros if there is none), so
    they depend neither on the order of the images nor on missing ones. The tokens of a row are
    the tokens of all its images, with zeros for missing images.

    Input: pooled (B × N, F), tokens (B × N, T, G), mask (B, N).
    Output: pooled (B, F), tokens (B, N × T, G).
    """

    def call(self, features_and_mask: Any) -> Any:
        """Unfold and pool."""
        pooled, tokens, mask_BN = features_and_mask
        num_images = mask_BN.shape[1]
        num_tokens, width = tokens.shape[1:]
        present_BN1: Any = ops.expand_dims(ops.cast(mask_BN > 0, pooled.dtype), 2)
        pooled_BNF: Any = ops.reshape(pooled, (-1, num_images, pooled.shape[-1]))
        sum_BF: Any = ops.sum(pooled_BNF * present_BN1, axis=1)
        pooled_BF = sum_BF / ops.maximum(ops.sum(present_BN1, axis=1), 1)
        tokens_BNX: Any = ops.reshape(tokens, (-1, num_images, num_tokens * width))
        tokens_BNX = tokens_BNX * ops.cast(present_BN1, tokens.dtype)
        return pooled_BF, ops.reshape(tokens_BNX, (-1, num_images * num_tokens, width))


@keras.saving.register_keras_serializable("mm_model")
class JointWithoutImage(layers.Layer):
    """Replaces the image head's logit by that of the joint head in rows without an image.

    The image head then has no vote in the blend, and learns nothing from these rows.

    Input: image logit (B, 1), joint logit (B, 1), mask (B, N).  Output: (B, 1).
    """

    def call(self, logits_and_mask: Any) -> Any:
        """Choose the logit of each row."""
        image_B1, joint_B1, mask_BN = logits_and_mask
        has_image_B1 = ops.any(mask_BN > 0, axis=1, keepdims=True)
        return ops.where(has_image_B1, image_B1, ops.stop_gradient(joint_B1))


@keras.saving.register_keras_serializable("mm_model")
class PickView(layers.Layer):
    """Selects one of several precomputed feature views of each image, with or without tokens.

    Inference uses the first view, which comes from the original image. Training draws one of the
    others, which come from augmented images. A single view is used in both.

    Input: (B, V, F) or (B, V, T, F).  Output: (B, F) or (B, T, F).
    """

    def __init__(self, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, features: Any, training: bool = False) -> Any:
        """Select a view."""
        num_views, *of_view = features.shape[1:]
        if not training or num_views == 1:
            return features[:, 0]
        shape: Any = ops.shape(features)
        draw_B: Any = per_row_random.uniform(
            (shape[0],), self.seed_generator, 1.0, float(num_views)
        )
        drawn_B: Any = ops.cast(ops.floor(draw_B), "int32")
        # A draw just below the upper bound may be rounded up to it.
        view_B: Any = ops.minimum(drawn_B, num_views - 1)
        start_B: Any = ops.arange(shape[0], dtype="int32") * num_views
        return ops.take(ops.reshape(features, (-1, *of_view)), start_B + view_B, axis=0)
