"""What the training rows say about each numeric and each categorical column; NumPy only.

Fitted on the training split alone, kept in the manifest, and built into the model.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar

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


class Vocabulary(Spec):
    """The words of one categorical column; code 0 stands for missing, 1 for any other word."""

    MISSING: ClassVar[int] = 0
    UNKNOWN: ClassVar[int] = 1

    column: str
    """Name of the column."""
    words: tuple[str, ...]
    """Words that have a code of their own: the first has 2."""

    @model_validator(mode="after")
    def _no_word_twice(self) -> "Vocabulary":
        if len(set(self.words)) < len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"the vocabulary of {self.column!r} holds a word twice: {twice}")
        return self

    @property
    def num_codes(self) -> int:
        """Codes that there are, those for missing and unknown included."""
        return len(self.words) + 2

    def codes(self, texts: Iterable[str | float | None]) -> np.ndarray:
        """Return the int32 code of each text, None or NaN for missing."""
        code: dict[Any, int] = {word: i for i, word in enumerate(self.words, start=2)}
        return np.fromiter(
            (self.MISSING if _is_missing(text) else code.get(text, self.UNKNOWN) for text in texts),
            np.int32,
        )


def _is_missing(text: Any) -> bool:
    # NaN, which tables in memory hold for missing, is the one value that differs from itself.
    return text is None or text != text


def fit_vocabulary(
    texts: Iterable[str | float | None], column: str, *, min_count: int = 2, max_words: int = 1000
) -> Vocabulary:
    """Return the vocabulary of the training rows' texts, None or NaN for missing.

    Args:
        texts: of the training rows.
        column: name.
        min_count: rarer words get no code: from them the model learns what an unknown word means.
        max_words: of more words the most frequent are kept.
    """
    counts: Counter[Any] = Counter(text for text in texts if not _is_missing(text))
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:max_words]
    return Vocabulary(column=column, words=tuple(sorted(w for w, n in frequent if n >= min_count)))


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
