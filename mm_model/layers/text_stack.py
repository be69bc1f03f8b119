"""Converts several texts per row to a batch of single texts and back; embeds token ids.

Shapes: B rows, C text columns, L tokens per text, R texts, F features.
"""

from typing import Any

import keras
from keras import layers, ops

from mm_model import per_row_random


@keras.saving.register_keras_serializable("mm_model")
class FoldTexts(layers.Layer):
    """Turns the texts of all columns into one batch, so that one encoder processes all of them.

    Input: ids (B, C, L), mask (B, C, L).  Output: ids (B × C, L), mask (B × C, L).
    """

    def __init__(self, **kwargs: Any) -> None:
        # Half precision cannot represent large ids.
        super().__init__(autocast=False, **kwargs)

    def call(self, ids_and_mask: Any) -> Any:
        """Fold."""
        return tuple(ops.reshape(x, (-1, x.shape[-1])) for x in ids_and_mask)


@keras.saving.register_keras_serializable("mm_model")
class UnfoldTexts(layers.Layer):
    """Turns features of single texts into features of rows.

    Adds a learned vector to all features of a column. The pooled features of a text are the mean
    over its tokens. In place of a missing text, there is one token, a learned vector of the column.
    Training replaces a random fraction of the texts by it, so that the model learns what to predict
    without a text, even if the training data contain no such rows.

    Input: tokens (B × C, L, F), mask (B, C, L).
    Output: pooled (B, C × F), tokens (B, C × L, F), mask (B, C × L).

    Args:
        dropout: Fraction of the texts to replace in training.
        seed: Seed for the random replacement.
    """

    def __init__(self, dropout: float = 0.0, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dropout = dropout
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape: Any) -> None:
        """Create the vectors of each column."""
        (*_, width), (_, num_columns, _) = input_shape
        shape = (1, num_columns, 1, width)
        self.column = self.add_weight(shape=shape, initializer="zeros", name="column")
        self.missing = self.add_weight(shape=shape, initializer="zeros", name="missing")

    def call(self, tokens_and_mask: Any, training: bool = False) -> Any:
        """Unfold and pool."""
        tokens, mask_BCL = tokens_and_mask
        _, num_columns, length = mask_BCL.shape
        width = tokens.shape[-1]
        present_BC1: Any = ops.any(mask_BCL > 0, axis=2, keepdims=True)
        if training and self.dropout:
            shape: Any = ops.shape(present_BC1)
            draw_BC1 = per_row_random.uniform(shape, self.seed_generator)
            present_BC1 = ops.logical_and(present_BC1, draw_BC1 >= self.dropout)
        is_first_L: Any = ops.equal(ops.arange(length), 0)
        mask_BCL = ops.where(present_BC1, mask_BCL > 0, is_first_L)
        tokens_BCLF: Any = ops.reshape(tokens, (-1, num_columns, length, width))
        tokens_BCLF = ops.where(
            ops.expand_dims(present_BC1, 3), tokens_BCLF + self.column, self.missing
        )
        weight_BCL1: Any = ops.expand_dims(ops.cast(mask_BCL, tokens_BCLF.dtype), 3)
        sum_BCF: Any = ops.sum(tokens_BCLF * weight_BCL1, axis=2)
        pooled_BCF = sum_BCF / ops.sum(weight_BCL1, axis=2)
        return (
            ops.reshape(pooled_BCF, (-1, num_columns * width)),
            ops.reshape(tokens_BCLF, (-1, num_columns * length, width)),
            ops.reshape(ops.cast(mask_BCL, tokens_BCLF.dtype), (-1, num_columns * length)),
        )


@keras.saving.register_keras_serializable("mm_model")
class TokenEmbedding(layers.Layer):
    """Maps token ids to learned vectors.

    Input: int (R, L).  Output: float (R, L, F).

    Args:
        num_tokens: Number of ids.
        width: F.
    """

    def __init__(self, num_tokens: int, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_tokens, self.width = num_tokens, width

    def build(self, input_shape: Any) -> None:
        """Create the vectors."""
        # Of unit variance, like standardized numbers, also after the mean over a few tokens.
        initializer = keras.initializers.RandomUniform(-(3**0.5), 3**0.5)
        self.vectors = self.add_weight(
            shape=(self.num_tokens, self.width), initializer=initializer, name="vectors"
        )

    def call(self, ids_RL: Any) -> Any:
        """Return the vectors of the ids."""
        return ops.take(ops.cast(self.vectors, self.compute_dtype), ids_RL, axis=0)

    def get_config(self) -> dict:
        """Return the constructor arguments."""
        return {**super().get_config(), "num_tokens": self.num_tokens, "width": self.width}
