"""Columns of a table to what a network takes: numbers and codes of categories, learnt or measured.

Shapes: B rows, F features or columns, K piecewise-linear components, C categories.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from mm_model import per_row_random
from mm_model.layers.blocks import penalty, register
from mm_model.statistics import NumericStatistics, Vocabulary
from mm_model.tunable import current_value


@register
class NumericEncoding(layers.Layer):
    """Raw numbers, NaN where missing, to the inputs of a network.

    Every column gives its standardised value (the median where missing). With `bins` it also gives
    its piecewise-linear components (Gorishniy et al. 2022, arXiv 2203.05556, section 3.2): 1 for
    each bin below the value, 0 for each above, the share passed in its own. Unlike there, values
    beyond the training range stay at its ends, and the standardised value is cut at ±10, so that an
    outlier cannot shout. A column with missing values in training also gives a flag for them.

    Input: float (B, F).  Output: float32 (B, K + F + flags).
    """

    LIMIT = 10.0

    def __init__(
        self, statistics: NumericStatistics | dict, bins: int | None = None, **kwargs
    ) -> None:
        # Large numbers that differ by little would be one number in half precision.
        super().__init__(autocast=False, **kwargs)
        statistics = NumericStatistics.model_validate(statistics)
        self.statistics, self.bins = statistics, bins
        num_columns = len(statistics.columns)
        self._mean_F = np.asarray(statistics.mean, np.float32)
        std_F = np.asarray(statistics.std, np.float32)
        self._scale_F = np.where(std_F > 0, 1.0 / np.where(std_F > 0, std_F, 1.0), 0.0)
        self._median_F = np.asarray([statistics.median(i) for i in range(num_columns)], np.float32)
        self._flagged = [i for i in range(num_columns) if statistics.missing[i] > 0]
        edges = [bin_edges(statistics.quantiles[i], bins) for i in range(num_columns)]
        self._column_K = np.repeat(np.arange(num_columns), [max(len(e) - 1, 0) for e in edges])
        self._lower_K = np.concatenate([e[:-1] for e in edges]).astype(np.float32)
        self._width_K = np.concatenate([np.diff(e) for e in edges]).astype(np.float32)

    def call(self, numbers_BF: Any) -> Any:
        """Encode raw numbers."""
        numbers_BF = ops.cast(numbers_BF, "float32")
        missing_BF = ops.isnan(numbers_BF)
        filled_BF: Any = ops.where(missing_BF, self._median_F, numbers_BF)
        standard_BF = (filled_BF - self._mean_F) * self._scale_F.astype(np.float32)
        parts = [ops.clip(standard_BF, -self.LIMIT, self.LIMIT)]
        if len(self._column_K):
            value_BK: Any = ops.take(filled_BF, self._column_K, axis=1)
            parts.append(ops.clip((value_BK - self._lower_K) / self._width_K, 0.0, 1.0))
        if self._flagged:
            parts.append(ops.cast(ops.take(missing_BF, self._flagged, axis=1), "float32"))
        return ops.concatenate(parts, axis=1)

    def compute_output_shape(self, input_shape):
        """Return (B, K + F + flags)."""
        width = len(self._column_K) + len(self._mean_F) + len(self._flagged)
        return (input_shape[0], width)

    def get_config(self) -> dict:
        """Return what the layer is made from: statistics and number of bins."""
        config = {"statistics": self.statistics.model_dump(mode="json"), "bins": self.bins}
        return {**super().get_config(), **config}


def bin_edges(quantiles: tuple[float, ...], bins: int | None) -> np.ndarray:
    """Return the distinct edges of at most `bins` bins of even count; none where there is no bin.

    Edges that differ by less than float32 resolves count as one.
    """
    if not bins or not quantiles:
        return np.empty(0)
    positions = np.linspace(0, len(quantiles) - 1, bins + 1)
    edges = np.unique(np.interp(positions, np.arange(len(quantiles)), quantiles).astype(np.float32))
    return edges.astype(np.float64) if len(edges) > 1 else np.empty(0)


@register
class CategoryEmbedding(layers.Layer):
    """Codes of categorical columns to learnt features, side by side.

    Codes are those of the columns' vocabularies; any number that is no code counts as unknown.
    While training, a random share of the known words is taken for unknown or, as often, for
    missing: both entries learn what a row is like about which the column says nothing, even where
    training has none (as the word dropout of Iyyer et al. 2015, ACL P15-1162).

    Input: int (B, C).  Output: float (B, F), F the sum of the columns' widths.

    Args:
        vocabularies: of the columns, in order; a saved model says by them what its codes mean.
        dropout: share of the known words that is hidden while training.
        l2: penalty on the entries, which are the kernel of a dense layer on one-hot inputs.
        seed: of the draws.
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

    def build(self, input_shape):
        """Create the entries of each column."""
        self.entries = [
            self.add_weight(
                shape=(vocabulary.num_codes, width),
                # About as long as a standardised number, however wide (as in the code of Gorishniy
                # et al. 2021, arXiv 2106.11959); Keras' ±0.05 would be drowned by the numbers.
                initializer=keras.initializers.RandomUniform(-(width**-0.5), width**-0.5),
                regularizer=penalty(self.l2),
                # Not the column's name, which may hold what no variable's name may.
                name=f"entries_{i}",
            )
            for i, (vocabulary, width) in enumerate(
                zip(self.vocabularies, self._widths, strict=True)
            )
        ]

    def call(self, codes_BC: Any, training: bool = False) -> Any:
        """Look the codes up."""
        codes_BC = ops.cast(codes_BC, "int32")
        is_code_BC = ops.logical_and(codes_BC >= 0, codes_BC < self._num_codes_C)
        codes_BC = ops.where(is_code_BC, codes_BC, Vocabulary.UNKNOWN)
        if training and self.dropout:
            codes_BC = self._hide(codes_BC)
        # A product in place of a look-up: the gradient of a look-up is sparse, and would be
        # exchanged between workers in a collective of its own, not packed with the others.
        features = []
        for i, (vocabulary, entries) in enumerate(
            zip(self.vocabularies, self.entries, strict=True)
        ):
            one_hot = ops.one_hot(codes_BC[:, i], vocabulary.num_codes, dtype=self.compute_dtype)
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
        # What is missing or unknown in truth stays so, since that may say something.
        return ops.where(codes_BC > Vocabulary.UNKNOWN, hidden_BC, codes_BC)

    def compute_output_shape(self, input_shape):
        """Return (B, F)."""
        return (input_shape[0], sum(self._widths))

    def get_config(self) -> dict:
        """Return what the layer is made from, the vocabularies among it."""
        vocabularies = [v.model_dump(mode="json") for v in self.vocabularies]
        config = {"vocabularies": vocabularies, "dropout": self.dropout, "l2": self.l2}
        return {**super().get_config(), **config}


def embedding_width(num_codes: int) -> int:
    """Return how many features a column with so many codes gets: fastai's rule of thumb.

    `emb_sz_rule` in `fastai/tabular/model.py` (Howard and Gugger 2020, arXiv 2002.04688).
    """
    return min(600, round(1.6 * num_codes**0.56))
