"""Updates the state of a search on Ray Tune's events, and ends the search at its budget.

The state is part of Tune's snapshots, so a resumed search continues to count what it has spent.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.stopper import NoopStopper

from ray_jobs.cluster.connection import first_line
from ray_jobs.config.tune_spec import PAUSING, TuneSpec
from ray_jobs.train.telemetry.history_keys import EPOCH, TRAIN_LOSS
from ray_jobs.tune.results.search_state import Search, State, TrialRow
from ray_jobs.tune.search.scheduler import EPOCHS, HyperBand
from ray_jobs.tune.search.scheduler_state import dump_scheduler, restore_scheduler
from ray_jobs.tune.search.searcher import scores_of
from ray_jobs.tune.trials.trial import (
    BEST_EPOCH,
    ENDED,
    ERROR,
    FINISHED,
    WRITTEN,
    SearchContext,
    seconds_of,
)
from ray_jobs.tune.trials.trial_checkpoints import delete_checkpoints

_HOUR_S = 3600.0


class SearchCallback(Callback):
    """Updates a `Search`.

    Args:
        search: The state to update.
        context: Settings and folders that its trials share.
        tune: The `tune` section.
        scheduler: The scheduler, whose state is saved with that of the search.
        algorithm: The search algorithm; receives the existing trials after a resume.
        show: Receives the search after each event and, if a trial has just ended, its row.
    """

    def __init__(
        self,
        search: Search,
        context: SearchContext,
        tune: TuneSpec,
        scheduler: TrialScheduler,
        algorithm: Any,
        show: Callable[[Search, TrialRow | None], None],
    ) -> None:
        self.search, self.context, self.tune, self.show = search, context, tune, show
        self.scheduler, self.algorithm = scheduler, algorithm
        self._rows: dict[str, TrialRow] = {row.name: row for row in search.trials}
        self._last_step: float | None = None
        self._restored_state: dict[str, Any] | None = None
        self._trials: list[Trial] = []
        self._seconds_before: dict[str, dict[str, float]] = {}

    # -- Tune's events ----------------------------------------------------------------------------

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Add new trials, and count what running trials have spent since the last call."""
        self._trials = trials
        if self._restored_state is not None:
            # Tune has restored all trials before this event.
            self._resume(self._restored_state, trials)
            self._restored_state = None
        now, spent = time.monotonic(), self.search.spent
        hours = (now - (self._last_step or now)) / _HOUR_S
        self._last_step = now
        spent["hours"] = spent.get("hours", 0.0) + hours
        for trial in trials:
            row = self._row(trial)
            if row.ended_s is None and not trial.is_finished():
                row.state = cast(State, trial.status.lower())
            if trial.status == Trial.RUNNING:
                placement: Any = trial.placement_group_factory
                held = placement.required_resources
                for key, name in (("cpu_hours", "CPU"), ("gpu_hours", "GPU")):
                    spent[key] = spent.get(key, 0.0) + hours * held.get(name, 0.0)

    def on_trial_start(self, iteration: int, trials: Any, trial: Trial, **_: Any) -> None:
        """Record that a trial starts or continues."""
        row = self._row(trial)
        row.state = "running"
        if not row.history:
            row.began_s = self._now_s()
        # A process counts its seconds from 0 whenever it starts or continues a trial.
        self._seconds_before[row.name] = dict(row.seconds)
        self.show(self.search, None)

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        """Record an epoch."""
        self._update(self._row(trial), result)
        self.show(self.search, None)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Trial, **_: Any) -> None:
        """Record that a trial finished, was stopped, or reported an error of its own."""
        row, result = self._row(trial), trial.last_result
        if ERROR in result:
            row.state, row.error = "failed", first_line(RuntimeError(result[ERROR]))
            row.scores = {}
        else:
            row.state = "finished" if result.get(FINISHED) else "stopped"
        self._end(row, result)

    def on_trial_error(self, iteration: int, trials: Any, trial: Trial, **_: Any) -> None:
        """Record that a trial lost its processes too often."""
        row, folder = self._row(trial), self.context.trials / trial.trial_id
        lines = str(trial.get_pickled_error() or "its processes were lost").strip().splitlines()
        # The error that the trial wrote is more specific than the loss of its process.
        written = folder.read_json(ENDED).get(ERROR) if folder.exists(ENDED) else None
        row.state, row.error, row.scores = "failed", written or lines[-1], {}
        self._end(row, {ERROR: row.error})

    # -- state across restarts --------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return the state that a resumed search needs."""
        return {
            "trials": self.search.trials,
            "spent": self.search.spent,
            "scheduler": dump_scheduler(self.scheduler, self._trials),
            "paused": [t.trial_id for t in self._trials if t.status == Trial.PAUSED],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the state of the interrupted search."""
        self.search.trials[:] = state["trials"]
        self.search.spent.update(state["spent"])
        self._rows = {row.name: row for row in self.search.trials}
        self._restored_state = state

    def _resume(self, state: dict[str, Any], trials: list[Trial]) -> None:
        """Reconcile snapshots that may have been taken at different times."""
        restore_scheduler(self.scheduler, state["scheduler"], trials)
        if isinstance(self.scheduler, HyperBand):
            self.scheduler.paused = frozenset(state["paused"])
        names = {trial.trial_id for trial in trials}
        if hasattr(self.algorithm, "reconcile"):
            self.algorithm.reconcile(trials)
        self.search.trials[:] = [row for row in self.search.trials if row.name in names]
        self._rows = {row.name: row for row in self.search.trials}
        for name in {path.split("/")[0] for path in self.context.trials.names() if "/" in path}:
            if name not in names:
                # The trial started after the snapshot, so nothing refers to it.
                self.context.trials.delete(name)
        self.record_ended(trials)

    def record_ended(self, trials: Sequence[Trial]) -> None:
        """Record trials that Tune ended without an event, as it does when the budget is spent."""
        for trial in trials:
            row = self._row(trial)
            if trial.is_finished() and row.ended_s is None:
                self._update(row, trial.last_result)
                if trial.status == Trial.ERROR:
                    self.on_trial_error(0, [], trial)
                else:
                    self.on_trial_complete(0, [], trial)

    # -- budget -----------------------------------------------------------------------------------

    def spent_part(self) -> str | None:
        """Return the part of the budget that is spent, such as `hours`, if any is."""
        for name, limit in self.search.budget.items():
            if name != "trials" and self.search.spent.get(name, 0.0) >= limit:
                return name
        return None

    def _row(self, trial: Trial) -> TrialRow:
        row = self._rows.get(trial.trial_id)
        if row is None:
            row = TrialRow(trial.trial_id, "pending", {}, began_s=self._now_s())
            self._rows[row.name] = row
            self.search.trials.append(row)
        # PBT changes the values of a trial.
        row.values = dict(trial.config)
        return row

    def _update(self, row: TrialRow, result: dict[str, Any]) -> None:
        if EPOCHS not in result:
            return
        row.epochs, row.best_epoch = result[EPOCHS], result[BEST_EPOCH]
        row.scores = scores_of(result, self.search.objectives)
        before = {} if result.get(WRITTEN) else self._seconds_before.get(row.name, {})
        seconds = seconds_of(result)
        row.seconds = {part: before.get(part, 0.0) + own_s for part, own_s in seconds.items()}
        keys = (EPOCH, TRAIN_LOSS, *self.search.objectives)
        record = {key: result[key] for key in keys if key in result}
        # A trial that lost its process trains some epochs again.
        earlier = [past for past in row.history if past[EPOCH] < record[EPOCH]]
        row.history = (*earlier, record)

    def _end(self, row: TrialRow, result: dict[str, Any]) -> None:
        row.ended_s = self._now_s()
        self.search.spent["trials"] = sum(r.ended_s is not None for r in self.search.trials)
        if not result.get(WRITTEN):
            plain = {k: v for k, v in result.items() if isinstance(v, str | int | float | None)}
            (self.context.trials / row.name).write_json(ENDED, plain)
        self._delete_checkpoints()
        self.show(self.search, row)

    def _delete_checkpoints(self) -> None:
        """Delete the checkpoints of ended trials, except for the best ones and the first trial."""
        if self.tune.scheduler in PAUSING:
            # Other trials may still clone them; all are deleted at the end of the search.
            return
        ended = [row for row in self.search.ranked() if row.ended_s is not None]
        for row in ended[self.tune.promote :]:
            if row is not self.search.trials[0]:
                delete_checkpoints(self.context.trials / row.name)

    def _now_s(self) -> float:
        return self.search.spent.get("hours", 0.0) * _HOUR_S


class BudgetStopper(NoopStopper):
    """Ends the search when its budget is spent.

    A resumed search replaces the stopper with a pickled copy of the earlier one, so unpickling
    returns the newest stopper of this process instead.
    """

    newest: ClassVar["BudgetStopper | None"] = None

    def __init__(self, callback: SearchCallback) -> None:
        self.callback = callback
        BudgetStopper.newest = self

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (BudgetStopper, "newest")

    def stop_all(self) -> bool:  # type: ignore[override]
        """Return whether all trials must end."""
        return self.callback.spent_part() is not None
