"""Learned embeddings of categorical columns.

Shapes: B rows, C categorical columns, F features.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from mm_model import per_row_random
from mm_model.statistics import Vocabulary
from mm_model.tunable import current_value, l2_regularizer


@keras.saving.register_keras_serializable("mm_model")
class CategoryEmbedding(layers.Layer):
    """Maps the codes of categorical columns to learned features, side by side.

    Codes outside the column's vocabulary are treated as unknown. Training replaces a random
    fraction of the known words by unknown or, equally often, by missing. Both embeddings thus learn
    what to predict when the column gives no information, even if the training data contain no such
    rows (as in the word dropout of Iyyer et al. 2015, ACL P15-1162).

    Input: int (B, C).  Output: float (B, F), where F is the sum of the columns' widths.

    Args:
        vocabularies: Vocabularies of the columns, in order; saved with the model.
        dropout: Fraction of the known words to replace in training.
        l2: L2 penalty on the embeddings.
        seed: Seed for the random replacement.
    """

    def __init__(
        self,
        vocabularies: Sequence[Vocabulary | dict],
        dropout: float = 0.0,
        l2: float = 0.0,
        seed: int | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.vocabularies = tuple(Vocabulary.model_validate(v) for v in vocabularies)
        self.dropout, self.l2 = dropout, l2
        self.seed_generator = keras.random.SeedGenerator(seed)
        self._num_codes_C = np.asarray([v.num_codes for v in self.vocabularies], np.int32)
        self._widths = [embedding_width(v.num_codes) for v in self.vocabularies]

    @property
    def columns(self) -> list[int]:
        """Column of each feature of the output."""
        return [column for column, width in enumerate(self._widths) for _ in range(width)]

    def build(self, input_shape):
        """Create the embeddings of each column."""
        self.entries = [
            self.add_weight(
                shape=(vocabulary.num_codes, width),
                # Gives embeddings of any width about the length of a standardized number (as in the
                # code of Gorishniy et al. 2021, arXiv 2106.11959); with Keras' ±0.05, the numbers
                # would dominate.
                initializer=keras.initializers.RandomUniform(-(width**-0.5), width**-0.5),
                regularizer=l2_regularizer(self.l2),
                # Not the column's name, which may contain characters that are invalid here.
                name=f"entries_{i}",
            )
            for i, (vocabulary, width) in enumerate(
                zip(self.vocabularies, self._widths, strict=True)
            )
        ]

    def call(self, codes_BC: Any, training: bool = False) -> Any:
        """Return the embeddings of the codes."""
        codes_BC = ops.cast(codes_BC, "int32")
        is_code_BC = ops.logical_and(codes_BC >= 0, codes_BC < self._num_codes_C)
        codes_BC = ops.where(is_code_BC, codes_BC, Vocabulary.UNKNOWN)
        if training and self.dropout:
            codes_BC = self._hide(codes_BC)
        # A matrix product, because the sparse gradient of a lookup would need a separate collective
        # between workers.
        features = []
        for i, entries in enumerate(self.entries):
            one_hot = ops.one_hot(codes_BC[:, i], entries.shape[0], dtype=self.compute_dtype)
            features.append(ops.matmul(one_hot, entries))
        return ops.concatenate(features, axis=1)

    def _hide(self, codes_BC: Any) -> Any:
        shape: Any = ops.shape(codes_BC)
        draw_BC = per_row_random.uniform(shape, self.seed_generator)
        hidden_BC = ops.where(
            draw_BC < current_value(self.dropout) / 2,
            Vocabulary.UNKNOWN,
            ops.where(draw_BC < current_value(self.dropout), Vocabulary.MISSING, codes_BC),
        )
        # Words that are actually missing or unknown keep their code, which may be informative.
        return ops.where(codes_BC > Vocabulary.UNKNOWN, hidden_BC, codes_BC)

    def get_config(self) -> dict:
        """Return the constructor arguments, except the seed."""
        vocabularies = [v.model_dump(mode="json") for v in self.vocabularies]
        config = {"vocabularies": vocabularies, "dropout": self.dropout, "l2": self.l2}
        return {**super().get_config(), **config}


def embedding_width(num_codes: int) -> int:
    """Return the embedding width of a column by fastai's rule of thumb.

    The rule is `emb_sz_rule` in `fastai/tabular/model.py` (Howard and Gugger 2020, arXiv
    2002.04688).
    """
    return min(600, round(1.6 * num_codes**0.56))
