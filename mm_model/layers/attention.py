"""Layers of the attention between the tokens of all modalities.

Shapes: B rows, T tokens, N images per row, E encoded components, C columns, K components of a
column, D features of a token.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from mm_model.tunable import l2_regularizer


@keras.saving.register_keras_serializable("mm_model")
class ColumnTokens(layers.Layer):
    """Turns the encoded numbers and categories of a row into one token per column.

    A token is a linear map of its column's components plus a learned vector that identifies the
    column (the feature tokenizer of Gorishniy et al. 2021, arXiv 2106.11959, section 3.3).

    Input: (B, E).  Output: (B, C, D).

    Args:
        columns: Column of each component, from 0.
        width: Features of a token.
        l2: L2 penalty on the linear maps.
    """

    def __init__(self, columns: Sequence[int], width: int, l2: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.columns, self.width, self.l2 = list(columns), width, l2
        of_column = [np.flatnonzero(np.asarray(columns) == c) for c in range(max(columns) + 1)]
        self._num_components_C = np.asarray([len(indices) for indices in of_column])
        # Columns with fewer components than others get the index of an appended zero.
        self._index_CK = np.full((len(of_column), max(map(len, of_column))), len(columns))
        for column, indices in enumerate(of_column):
            self._index_CK[column, : len(indices)] = indices

    def build(self, input_shape: Any) -> None:
        """Create the linear maps and the vectors."""
        shape_CKD = (*self._index_CK.shape, self.width)
        scale_C11 = (3 / self._num_components_C)[:, None, None] ** 0.5

        uniform = keras.initializers.RandomUniform(-1.0, 1.0)

        def initializer(shape: Any, dtype: Any = None) -> Any:
            # Standardized components give tokens with features of variance 1.
            kernel_CKD: Any = uniform(shape, dtype)
            return kernel_CKD * ops.cast(scale_C11, dtype)

        self.kernel_CKD = self.add_weight(
            shape=shape_CKD,
            initializer=initializer,
            regularizer=l2_regularizer(self.l2),
            name="kernel",
        )
        self.identity_CD = self.add_weight(
            shape=(len(self._index_CK), self.width),
            initializer=keras.initializers.RandomUniform(-1.0, 1.0),
            name="identity",
        )

    def call(self, encoded_BE: Any) -> Any:
        """Return the tokens."""
        encoded_BE = ops.cast(encoded_BE, self.compute_dtype)
        padded = ops.pad(encoded_BE, [[0, 0], [0, 1]])
        components_BCK = ops.take(padded, self._index_CK, axis=1)
        tokens_BCD: Any = ops.einsum("bck,ckd->bcd", components_BCK, self.kernel_CKD)
        return tokens_BCD + self.identity_CD

    def get_config(self) -> dict:
        """Return the constructor arguments."""
        config = {"columns": self.columns, "width": self.width, "l2": self.l2}
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable("mm_model")
class TokenPresence(layers.Layer):
    """Returns 1 for each token that is present.

    Input: tokens (B, T, D), optionally a mask (B, N) of the N parts that have T / N tokens each.
    Output: float (B, T).
    """

    def call(self, tokens_and_mask: Any) -> Any:
        """Return the mask of the tokens."""
        tokens_BTD, *mask = tokens_and_mask
        present_BT: Any = ops.ones_like(tokens_BTD[:, :, 0])
        for mask_BN in mask:
            repeats = tokens_BTD.shape[1] // mask_BN.shape[1]
            present_BN = ops.cast(mask_BN > 0, present_BT.dtype)
            present_BT = ops.repeat(present_BN, repeats, axis=1)
        return present_BT


@keras.saving.register_keras_serializable("mm_model")
class PrependQuery(layers.Layer):
    """Prepends a learned token, which attends to all others and represents the row.

    Input: tokens (B, T, D), presence (B, T).
    Output: tokens (B, 1 + T, D), boolean attention mask (B, 1, 1 + T).
    """

    def build(self, input_shape: Any) -> None:
        """Create the token."""
        self.query = self.add_weight(
            shape=(1, 1, input_shape[0][-1]),
            initializer=keras.initializers.RandomUniform(-1.0, 1.0),
            name="query",
        )

    def call(self, tokens_and_presence: Any) -> Any:
        """Prepend the token."""
        tokens_BTD, present_BT = tokens_and_presence
        query_B1D: Any = ops.zeros_like(tokens_BTD[:, :1]) + self.query
        present_BT: Any = ops.pad(present_BT, [[0, 0], [1, 0]], constant_values=1)
        return ops.concatenate([query_B1D, tokens_BTD], axis=1), present_BT[:, None, :] > 0
