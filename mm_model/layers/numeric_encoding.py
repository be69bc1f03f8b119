"""Encodes raw numbers as network inputs.

Shapes: B rows, F columns, K piecewise-linear components.
"""

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from mm_model.statistics import NumericStatistics


@keras.saving.register_keras_serializable("mm_model")
class NumericEncoding(layers.Layer):
    """Encodes raw numbers (NaN if missing) as network inputs.

    Returns the standardized value of each column; missing values are replaced by the column's
    median. With `bins`, also returns the piecewise-linear components of each value (Gorishniy et
    al. 2022, arXiv 2203.05556, section 3.2): 1 for each bin below the value, 0 for each bin above
    it, and, for the bin that contains it, the value's relative position in the bin. Unlike in the
    paper, the components of a value outside the training range stay between 0 and 1. Standardized
    values are clipped to ±10. Both limits reduce the effect of outliers. Columns with missing
    values in training also get a missing-value flag.

    Input: float (B, F).  Output: float32 (B, F + K + flags).
    """

    LIMIT = 10.0

    def __init__(
        self, statistics: NumericStatistics | dict, bins: int | None = None, **kwargs
    ) -> None:
        # Half precision cannot distinguish large numbers that differ only slightly.
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

    @property
    def columns(self) -> list[int]:
        """Column of each feature of the output."""
        return [*range(len(self._mean_F)), *self._column_K.tolist(), *self._flagged]

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

    def get_config(self) -> dict:
        """Return the constructor arguments."""
        config = {"statistics": self.statistics.model_dump(mode="json"), "bins": self.bins}
        return {**super().get_config(), **config}


def bin_edges(quantiles: tuple[float, ...], bins: int | None) -> np.ndarray:
    """Return the edges of at most `bins` bins with equal numbers of training rows.

    Merges edges that are equal in float32. Returns an empty array if no bin is left.
    """
    if not bins or not quantiles:
        return np.empty(0)
    positions = np.linspace(0, len(quantiles) - 1, bins + 1)
    edges = np.unique(np.interp(positions, np.arange(len(quantiles)), quantiles).astype(np.float32))
    return edges.astype(np.float64) if len(edges) > 1 else np.empty(0)
