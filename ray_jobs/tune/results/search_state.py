"""Holds the state of a search and ranks its trials.

Imports neither Ray nor TensorFlow.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ray_jobs.train.telemetry.history_keys import sort_key

State = Literal["pending", "running", "paused", "finished", "stopped", "failed"]
"""`finished`: trained all its epochs; `stopped`: ended early by the scheduler or the budget."""

PARTS = ("start", "data", "compute", "validation", "checkpoint")
"""Parts of a trial's time: imports, build and first step; waiting for rows; steps; validation;
saving."""

_MAX_FINITE = 1e300
"""Differences of larger numbers can overflow."""
_FENCE = 3.0
"""Distance of Tukey's outer fence from the quartile, in interquartile ranges."""


def finite(value: object) -> float | None:
    """Return a finite number as a float; None for any other value."""
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < _MAX_FINITE else None


def typical_range(metric: str, values: Sequence[float]) -> tuple[float, float]:
    """Return the range of the values of a metric, without outliers that are far worse.

    The range extends from the best value to Tukey's outer fence on the worse side, three
    interquartile ranges beyond the quartile. Without values, it is (0, 0).
    """
    if not values:
        return 0.0, 0.0
    ordered = sorted(values, key=lambda value: sort_key(metric, value))
    quartiles = [float(q) for q in np.quantile(ordered, [0.25, 0.75])]
    near, far = sorted(quartiles, key=lambda value: sort_key(metric, value))
    fence = sort_key(metric, far + _FENCE * (far - near)) if far != near else math.inf
    worst = [value for value in ordered if sort_key(metric, value) <= fence][-1]
    return min(ordered[0], worst), max(ordered[0], worst)


@dataclass
class TrialRow:
    """The state of one trial."""

    name: str
    """Name of its folder in `trials/`."""
    state: State
    values: dict[str, Any]
    """Values from the search space by setting path, without inactive settings."""
    scores: dict[str, float] = field(default_factory=dict)
    """Values of the objectives at the best epoch so far; empty before the first epoch."""
    epochs: int = 0
    """Number of trained epochs."""
    best_epoch: int | None = None
    """Index of the best epoch so far."""
    history: Sequence[dict[str, Any]] = ()
    """One record per epoch, with keys from `ray_jobs.train.telemetry.history_keys`."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds spent on each of `PARTS` so far; empty before the first epoch."""
    began_s: float = 0.0
    """Start, in seconds after the start of the search."""
    ended_s: float | None = None
    """End, in seconds after the start of the search."""
    error: str | None = None
    """First error of a failed trial, in one line."""
    scores_in_full: dict[str, float] = field(default_factory=dict)
    """Like `scores`, from the full training run that follows a trial on features."""

    def score(self, metric: str) -> float | None:
        """Return the value of an objective; None if it is missing or not finite."""
        return finite(self.scores.get(metric))

    @property
    def wall_s(self) -> float:
        """Duration of the trial; for a running trial, the sum of its parts."""
        if self.ended_s is not None:
            return max(self.ended_s - self.began_s, 0.0)
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Comparison:
    """The best and the untuned model on the test rows; no model was chosen on these rows."""

    metric: str
    """Name of a metric in `metrics.json` that is better when higher, such as `roc_auc`."""
    untuned: float
    best: float
    low: float
    """Lower end of the 95 % bootstrap interval of best − untuned, over the same rows."""
    high: float
    """Upper end of the interval."""
    num_rows: int
    same: bool = False
    """Whether the untuned model is the best model."""


@dataclass
class Search:
    """The state of a search, with its trials in order of suggestion."""

    name: str
    objectives: Sequence[str]
    """Metrics from `ray_jobs.train.telemetry.history_keys`; the first one ranks the trials."""
    trials: list[TrialRow]
    spent: dict[str, float] = field(default_factory=dict)
    """Spent `hours`, `cpu_hours`, `gpu_hours` and `trials`, over all restarts."""
    budget: dict[str, float] = field(default_factory=dict)
    """Limits with the same keys; a missing key means no limit."""
    slots: int = 1
    """Number of trials that can run at the same time."""
    comparison: Comparison | None = None

    def count_states(self) -> dict[str, int]:
        """Return the number of trials by state, with the final states first."""
        counts = {"finished": 0, "stopped": 0, "failed": 0}
        for trial in self.trials:
            counts[trial.state] = counts.get(trial.state, 0) + 1
        return counts

    def ranked(self) -> list[TrialRow]:
        """Return all trials, best first; trials without a finite score come last."""
        return sorted(self.trials, key=self._rank)

    def scored(self) -> list[TrialRow]:
        """Return the trials with a finite score, best first."""
        return [trial for trial in self.ranked() if math.isfinite(self._rank(trial))]

    def pareto_front(self) -> list[TrialRow]:
        """Return the trials that no other trial dominates, in order of rank.

        A trial dominates another if it is at least as good in each objective and better in one.
        Only trials with a finite score in each objective are considered.
        """
        complete = [
            (trial, [sort_key(metric, trial.score(metric)) for metric in self.objectives])
            for trial in self.ranked()
            if None not in map(trial.score, self.objectives)
        ]
        return [
            trial
            for trial, own in complete
            if not any(other != own and all(map(operator.le, other, own)) for _, other in complete)
        ]

    def idle_s(self) -> float:
        """Return the seconds of slots without a trial, from the first start to the last end."""
        if not self.trials:
            return 0.0
        start = min(trial.began_s for trial in self.trials)
        end = max(trial.began_s + trial.wall_s for trial in self.trials)
        return max(self.slots * (end - start) - sum(trial.wall_s for trial in self.trials), 0.0)

    def _rank(self, trial: TrialRow) -> float:
        return sort_key(self.objectives[0], trial.score(self.objectives[0]))
