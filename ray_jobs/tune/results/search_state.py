"""What a search knows of its trials: what the leaderboard, the page and the budget are made of.

Imports neither Ray nor TensorFlow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["pending", "running", "paused", "finished", "stopped", "failed"]
"""`finished` came to its own end; `stopped` was ended by the scheduler or the budget."""
Mode = Literal["min", "max"]

PARTS = ("start", "data", "compute", "validation", "checkpoint")
"""Where a trial's time goes: imports, build and first step; waiting for rows; steps; validation;
saving."""


@dataclass(frozen=True)
class Objective:
    """A number that the search makes small or large."""

    metric: str
    """Key of the records of an epoch, as in `ray_jobs.train.telemetry.console`."""
    mode: Mode

    def rank(self, value: float | None) -> float:
        """Return a number that is lower the better a value is; infinity without a finite one."""
        if value is None or not math.isfinite(value):
            return math.inf
        return value if self.mode == "min" else -value


@dataclass
class TrialRow:
    """One trial as it stands."""

    name: str
    """Of its folder below `trials/`."""
    state: State
    values: dict[str, Any]
    """What the search space gave it, by field path; without conditional ones that do not count."""
    scores: dict[str, float] = field(default_factory=dict)
    """By the objectives' metrics, at its best epoch so far; empty before the first."""
    epochs: int = 0
    """Epochs that it has trained."""
    best_epoch: int | None = None
    """Index of its best epoch so far."""
    history: Sequence[dict[str, Any]] = ()
    """A record an epoch; keys of `ray_jobs.train.telemetry.console`."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Spent on each of `PARTS`, so far."""
    began_s: float = 0.0
    """When it began, in seconds after the search did."""
    ended_s: float | None = None
    """When it ended, likewise."""
    error: str | None = None
    """First error of a trial that failed, in a line."""
    scores_in_full: dict[str, float] = field(default_factory=dict)
    """As `scores`, of the training in full that a trial on features went on to."""


@dataclass(frozen=True)
class Comparison:
    """The best model and the untuned one on the test rows, which had no part in the choice."""

    metric: str
    """Name as in `metrics.json`, such as `roc_auc`."""
    untuned: float
    best: float
    low: float
    """Lower end of the 95 % bootstrap interval of best − untuned, over the same rows."""
    high: float
    """Upper end of it."""
    num_rows: int
    same: bool = False
    """Whether the untuned model is the best one itself."""


@dataclass
class Search:
    """A search as it stands; its trials in the order in which they were suggested."""

    name: str
    objectives: Sequence[Objective]
    """The first one ranks the leaderboard."""
    trials: list[TrialRow]
    spent: dict[str, float] = field(default_factory=dict)
    """`hours`, `cpu_hours`, `gpu_hours` and `trials`, over all restarts."""
    budget: dict[str, float] = field(default_factory=dict)
    """What may be spent of them; those without a limit are left out."""
    slots: int = 1
    """Trials that could run at once."""
    comparison: Comparison | None = None

    def ranked(self) -> list[TrialRow]:
        """Return the trials, the best first; those without a score last, in their order."""
        first = self.objectives[0]
        return sorted(self.trials, key=lambda t: first.rank(t.scores.get(first.metric)))
