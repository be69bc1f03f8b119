"""What the page shows of a search, as plain values: ranks, the Pareto front, settings, ranges.

A score counts where it is a finite number: NaN and infinity are what a diverged trial reports.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ray_jobs.pages.page_kit import number_text
from ray_jobs.tune.results.search_state import Mode, Objective, Search, TrialRow

_FENCE = 3.0
"""Quartile distances beyond the quartile where Tukey calls a value far out."""
_LARGEST = 1e300
"""Beyond it, differences may be infinite."""


@dataclass(frozen=True)
class Setting:
    """One searched setting with what the trials had of it: numbers, or words in their order."""

    path: str
    name: str
    """Its path's last parts, as many as tell it from the others."""
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    """Whether its numbers are integers."""
    log: bool = False
    """Whether its numbers are to be read by powers of ten."""
    numbers: tuple[float, ...] = ()
    """The different ones, rising; empty where the values are words."""
    words: tuple[str, ...] = ()

    @property
    def single(self) -> bool:
        """Whether all trials had the same value."""
        return len(self.numbers or self.words) < 2


def finite(value: object) -> float | None:
    """Return a number as a float; None for anything else, NaN and infinity."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < _LARGEST else None


def score(trial: TrialRow, objective: Objective) -> float | None:
    """Return what a trial reached, if that is a finite number."""
    return finite(trial.scores.get(objective.metric))


def ranking(search: Search) -> list[TrialRow]:
    """Return the trials with a score, the best first."""
    first = search.objectives[0]
    scored = [trial for trial in search.trials if score(trial, first) is not None]
    return sorted(scored, key=lambda trial: first.rank(score(trial, first)))


def front(search: Search) -> list[TrialRow]:
    """Return the trials that no other one beats in all objectives, in order of rank.

    To beat is to be at least as good in each and better in one. Trials need a score in each.
    """
    ranks: dict[str, tuple[float, ...]] = {}
    for trial in ranking(search):
        rank = tuple(o.rank(score(trial, o)) for o in search.objectives)
        if math.inf not in rank:
            ranks[trial.name] = rank

    def beaten(own: Sequence[float]) -> bool:
        return any(
            other != own and all(o <= mine for o, mine in zip(other, own, strict=True))
            for other in ranks.values()
        )

    return [t for t in ranking(search) if t.name in ranks and not beaten(ranks[t.name])]


def typical(values: Iterable[float], mode: Mode) -> tuple[float, float]:
    """Return the range of values without those that are far worse than the rest.

    From the best value to Tukey's outer fence on the bad side, three quartile distances beyond the
    quartile, or to the worst value where that is nearer. There must be a value.
    """
    ordered = sorted(values, reverse=mode == "max")
    best, worst = ordered[0], ordered[-1]
    near, far = _quantile(ordered, 0.25), _quantile(ordered, 0.75)
    fence = far + _FENCE * (far - near)
    if far == near:
        return min(best, worst), max(best, worst)
    within = [value for value in ordered if (value <= fence if mode == "min" else value >= fence)]
    return min(best, within[-1]), max(best, within[-1])


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below, part = int(place), place - int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] * (1 - part) + ordered[above] * part


def wall_s(trial: TrialRow) -> float:
    """Return how long a trial took; of one that still runs, what its parts add up to."""
    if trial.ended_s is not None:
        return max(trial.ended_s - trial.began_s, 0.0)
    return sum(finite(seconds) or 0.0 for seconds in trial.seconds.values())


def search_s(search: Search) -> float:
    """Return the slots' time that was not spent in any trial, from first begin to last end."""
    if not search.trials:
        return 0.0
    begin = min(trial.began_s for trial in search.trials)
    end = max(trial.began_s + wall_s(trial) for trial in search.trials)
    return max(search.slots * (end - begin) - sum(map(wall_s, search.trials)), 0.0)


def settings(trials: Sequence[TrialRow]) -> list[Setting]:
    """Return the settings that the trials have, in order of their first use."""
    paths = list(dict.fromkeys(path for trial in trials for path in trial.values))
    names = _short(paths)
    return [
        _setting(path, names[path], [t.values[path] for t in trials if path in t.values])
        for path in paths
    ]


def value_text(value: Any) -> str:
    """Return a setting's value as people write it."""
    number = finite(value)
    if number is not None:
        return number_text(number)
    if value is None:
        return "none"
    if isinstance(value, float) and math.isnan(value):
        return "not a number"
    if isinstance(value, float) and math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    return str(value)


def _setting(path: str, name: str, values: Sequence[Any]) -> Setting:
    numbers = sorted({number for number in map(finite, values) if number is not None})
    if any(finite(value) is None for value in values):
        words = {value_text(value): finite(value) for value in values}
        # Numbers among words stand first and in their order.
        ordered = sorted(words, key=lambda word: (words[word] is None, words[word] or 0.0, word))
        return Setting(path, name, words=tuple(ordered))
    whole = all(isinstance(value, Integral) for value in values)
    return Setting(path, name, numbers[0], numbers[-1], whole, _by_powers(numbers), tuple(numbers))


def _by_powers(numbers: Sequence[float]) -> bool:
    """Whether numbers span more than two decades, or one and are more even by their powers."""
    low, high = numbers[0], numbers[-1]
    if low <= 0 or high <= 10 * low:
        return False
    # Even numbers from 0 on span decades, too, but only by their very lowest.
    if high > 100 * numbers[math.ceil(0.1 * (len(numbers) - 1))]:
        return True
    middle = _quantile(numbers, 0.5)
    plain = (middle - low) / (high - low)
    by_powers = math.log(middle / low) / math.log(high / low)
    return abs(by_powers - 0.5) < abs(plain - 0.5)


def _short(paths: Sequence[str]) -> dict[str, str]:
    parts = {path: path.split(".") for path in paths}
    names = {}
    for path, own in parts.items():
        others = [other for other in paths if other != path]
        names[path] = path
        for count in range(1, len(own)):
            if all(parts[other][-count:] != own[-count:] for other in others):
                names[path] = ".".join(own[-count:])
                break
    return names
