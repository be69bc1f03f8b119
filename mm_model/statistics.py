"""What the training rows say about each numeric column; NumPy only.

Fitted on the training split alone, kept in the manifest, and built into the model.
"""

import numpy as np
from pydantic import model_validator

from mm_model.spec import Spec

NUM_QUANTILES = 1024


class NumericStatistics(Spec):
    """Statistics of the numeric columns, each a list in the columns' order."""

    columns: tuple[str, ...]
    """Names of the columns."""
    mean: tuple[float, ...]
    """Mean of the values that are there; 0 where a column has none."""
    std: tuple[float, ...]
    """Population standard deviation of the values that are there; 0 where a column has none."""
    missing: tuple[int, ...]
    """Rows without a value."""
    quantiles: tuple[tuple[float, ...], ...]
    """1,024 evenly spaced quantiles, minimum and maximum included; empty where a column is."""
    num_rows: int
    """Rows that were looked at."""

    @model_validator(mode="after")
    def _one_entry_per_column(self) -> "NumericStatistics":
        for name in ("mean", "std", "missing", "quantiles"):
            if len(getattr(self, name)) != len(self.columns):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for {len(self.columns)} columns"
                )
        return self

    def median(self, column: int) -> float:
        """Return the median of a column, which stands in for its missing values; 0 if empty."""
        quantiles = self.quantiles[column]
        return float(np.median(quantiles)) if quantiles else 0.0


def fit_numeric_statistics(
    values_RF: np.ndarray, columns: tuple[str, ...] | list[str] | None = None
) -> NumericStatistics:
    """Return the statistics of an array of numbers.

    Args:
        values_RF: rows × columns, NaN for missing.
        columns: names of the columns; `numeric_0`, `numeric_1`, … if not given.

    Raises:
        ValueError: if the array is not two-dimensional, has no rows or holds infinities.
    """
    values_RF = np.asarray(values_RF, dtype=np.float64)
    if values_RF.ndim != 2 or len(values_RF) == 0:
        raise ValueError(f"expected a rows × columns array, got shape {values_RF.shape}")
    if np.isinf(values_RF).any():
        raise ValueError("the numbers hold infinities; replace them by NaN or drop those rows")
    names = tuple(columns) if columns else tuple(f"numeric_{i}" for i in range(values_RF.shape[1]))
    positions = np.linspace(0.0, 1.0, NUM_QUANTILES)
    present = [column[~np.isnan(column)] for column in values_RF.T]
    return NumericStatistics(
        columns=names,
        mean=tuple(float(v.mean()) if len(v) else 0.0 for v in present),
        std=tuple(float(v.std()) if len(v) else 0.0 for v in present),
        missing=tuple(len(values_RF) - len(v) for v in present),
        quantiles=tuple(
            tuple(np.quantile(v, positions).tolist()) if len(v) else () for v in present
        ),
        num_rows=len(values_RF),
    )
