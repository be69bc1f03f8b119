"""Describes the searched settings of a search: short names, ranges and values as text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from ray_jobs.config.text import number_text
from ray_jobs.tune.results.search_state import TrialRow, finite


@dataclass(frozen=True)
class Setting:
    """A searched setting and its values in the trials: all numbers, or all words."""

    path: str
    name: str
    """The fewest last parts of the path that make it unique."""
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    """Whether its numbers are integers."""
    log: bool = False
    """Whether its numbers belong on a logarithmic scale."""
    numbers: tuple[float, ...] = ()
    """Distinct numbers, ascending; empty for words."""
    words: tuple[str, ...] = ()

    @property
    def single(self) -> bool:
        """Whether all trials have the same value."""
        return len(self.numbers or self.words) < 2


def searched_settings(trials: Sequence[TrialRow]) -> list[Setting]:
    """Return the settings of the trials, in order of their first use."""
    paths = list(dict.fromkeys(path for trial in trials for path in trial.values))
    names = _short_names(paths)
    return [
        _setting(path, names[path], [t.values[path] for t in trials if path in t.values])
        for path in paths
    ]


def value_text(value: Any) -> str:
    """Return the value of a setting as readable text."""
    number = finite(value)
    if number is not None:
        return number_text(number)
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _setting(path: str, name: str, values: Sequence[Any]) -> Setting:
    numbers = sorted({number for number in map(finite, values) if number is not None})
    if any(finite(value) is None for value in values):
        words = {value_text(value): finite(value) for value in values}
        # Numbers among the words come first, in ascending order.
        ordered = sorted(words, key=lambda word: (words[word] is None, words[word] or 0.0, word))
        return Setting(path, name, words=tuple(ordered))
    whole = all(isinstance(value, Integral) for value in values)
    return Setting(path, name, numbers[0], numbers[-1], whole, _is_log(numbers), tuple(numbers))


def _is_log(numbers: Sequence[float]) -> bool:
    """Return whether numbers are spread more evenly on a logarithmic than on a linear scale."""
    low, high = numbers[0], numbers[-1]
    if low <= 0 or high <= 10 * low:
        return False
    # Evenly spaced numbers from near 0 also span decades, but only because of the lowest few.
    if high > 100 * numbers[math.ceil(0.1 * (len(numbers) - 1))]:
        return True
    median = float(np.median(numbers))
    linear = (median - low) / (high - low)
    logarithmic = math.log(median / low) / math.log(high / low)
    return abs(logarithmic - 0.5) < abs(linear - 0.5)


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """Return for each path the fewest last parts that no other path ends in."""
    parts = {path: path.split(".") for path in paths}

    def is_unique(path: str, count: int) -> bool:
        own = parts[path][-count:]
        return all(p[-count:] != own for other, p in parts.items() if other != path)

    return {
        path: next((".".join(p[-n:]) for n in range(1, len(p)) if is_unique(path, n)), path)
        for path, p in parts.items()
    }
