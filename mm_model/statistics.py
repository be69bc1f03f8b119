"""Statistics and vocabularies of columns, with NumPy only.

They are fitted on the training split only, stored in the manifest, and built into the model.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from pydantic import model_validator

from mm_model.spec import Spec

NUM_QUANTILES = 1024


class NumericStatistics(Spec):
    """Statistics of the numeric columns; each tuple has one entry per column, in order."""

    columns: tuple[str, ...]
    """Names of the columns."""
    mean: tuple[float, ...]
    """Mean of the present values; 0 for an empty column."""
    std: tuple[float, ...]
    """Population standard deviation of the present values; 0 for an empty column."""
    missing: tuple[int, ...]
    """Number of missing values."""
    quantiles: tuple[tuple[float, ...], ...]
    """1,024 evenly spaced quantiles, including minimum and maximum; none for an empty column."""
    num_rows: int
    """Number of rows."""

    @model_validator(mode="after")
    def _one_entry_per_column(self) -> "NumericStatistics":
        for name in ("mean", "std", "missing", "quantiles"):
            if len(getattr(self, name)) != len(self.columns):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, but there are "
                    f"{len(self.columns)} columns"
                )
        return self

    def median(self, column: int) -> float:
        """Return the median of a column, which replaces its missing values; 0 if it is empty."""
        quantiles = self.quantiles[column]
        return float(np.median(quantiles)) if quantiles else 0.0


class Vocabulary(Spec):
    """The words of one categorical column; code 0 means missing, 1 means any unknown word."""

    MISSING: ClassVar[int] = 0
    UNKNOWN: ClassVar[int] = 1

    column: str
    """Name of the column."""
    words: tuple[str, ...]
    """Words in the order of their codes, which start at 2."""

    @model_validator(mode="after")
    def _distinct_words(self) -> "Vocabulary":
        if len(set(self.words)) < len(self.words):
            (word, count), *_ = Counter(self.words).most_common(1)
            raise ValueError(f"the vocabulary of {self.column!r} contains {word!r} {count} times")
        return self

    @property
    def num_codes(self) -> int:
        """Number of codes, including missing and unknown."""
        return len(self.words) + 2

    def codes(self, texts: Iterable[str | float | None]) -> np.ndarray:
        """Return the int32 code of each text; None and NaN mean missing."""
        code: dict[Any, int] = {word: i for i, word in enumerate(self.words, start=2)}
        return np.fromiter(
            (self.MISSING if _is_missing(text) else code.get(text, self.UNKNOWN) for text in texts),
            np.int32,
        )


def _is_missing(text: Any) -> bool:
    # Tables in memory contain NaN for missing; NaN is the only value that differs from itself.
    return text is None or text != text


def fit_vocabulary(
    texts: Iterable[str | float | None], column: str, *, min_count: int = 2, max_words: int = 1000
) -> Vocabulary:
    """Return the vocabulary of a column.

    Args:
        texts: Texts of the training rows; None and NaN mean missing.
        column: Name of the column.
        min_count: Minimum count of a word; rarer ones teach the model to handle unknown words.
        max_words: Maximum number of words; the most frequent ones are kept.
    """
    counts: Counter[Any] = Counter(text for text in texts if not _is_missing(text))
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:max_words]
    return Vocabulary(column=column, words=tuple(sorted(w for w, n in frequent if n >= min_count)))


def fit_numeric_statistics(
    values_RF: np.ndarray, columns: tuple[str, ...] | list[str] | None = None
) -> NumericStatistics:
    """Return the statistics of numeric columns.

    Args:
        values_RF: Numbers (rows, columns); NaN means missing.
        columns: Names of the columns; by default, `numeric_0`, `numeric_1`, ….

    Raises:
        ValueError: If the array is not two-dimensional, has no rows or contains infinities.
    """
    values_RF = np.asarray(values_RF, dtype=np.float64)
    if values_RF.ndim != 2 or len(values_RF) == 0:
        raise ValueError(
            f"the shape of the numbers must be (rows, columns), not {values_RF.shape}, with at "
            "least one row"
        )
    if np.isinf(values_RF).any():
        raise ValueError("the numbers contain infinities; replace them by NaN or drop these rows")
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
