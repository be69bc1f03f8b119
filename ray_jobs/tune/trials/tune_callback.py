"""Follows a search from Ray Tune's events: its trials, what was spent, and when that is enough.

Its state is part of Tune's own snapshots, so that a search that goes on knows what it had spent.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from ray_jobs.cluster.connection import first_line
from ray_jobs.config.tune_spec import PAUSING, TuneSpec
from ray_jobs.train.telemetry import console
from ray_jobs.tune.results.search_state import Search, State, TrialRow
from ray_jobs.tune.search.scheduler import EPOCHS, HyperBand
from ray_jobs.tune.search.scheduler_state import dumps, restore
from ray_jobs.tune.search.searcher import scores_of
from ray_jobs.tune.trials.trial import BEST_EPOCH, ENDED, ERROR, FINISHED, WRITTEN, Job, seconds_of
from ray_jobs.tune.trials.trial_checkpoints import delete_checkpoints

_STATES: dict[str, State] = {
    Trial.PENDING: "pending",
    Trial.RUNNING: "running",
    Trial.PAUSED: "paused",
}
_HOUR_S = 3600.0


class SearchCallback(Callback):
    """Keeps a `Search` as it stands.

    Args:
        search: to keep.
        job: of its trials.
        tune: settings of the search.
        scheduler: of the search, whose state it keeps, too.
        show: takes the search after each event, and the trial that it is about, if it has ended.
    """

    def __init__(
        self,
        search: Search,
        job: Job,
        tune: TuneSpec,
        scheduler: TrialScheduler,
        show: Callable[[Search, TrialRow | None], None],
    ) -> None:
        self.search, self.job, self.tune, self.show = search, job, tune, show
        self.scheduler = scheduler
        self.algorithm: Any = None
        """The search algorithm, where it has to be told which trials there are."""
        self.rows: dict[str, TrialRow] = {row.name: row for row in search.trials}
        self._ticked: float | None = None
        self._scheduler_state: bytes | None = None
        self._paused: frozenset[str] = frozenset()
        self._trials: list[Trial] = []
        self._seconds_before: dict[str, dict[str, float]] = {}

    # -- Tune's events ----------------------------------------------------------------------------

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Learn of new trials, and count what running ones have spent since the last look."""
        self._trials = trials
        if self._scheduler_state is not None:
            # The first moment at which all trials are there again.
            self._go_on(self._scheduler_state, trials)
            self._scheduler_state = None
        now, self._ticked = time.monotonic(), self._ticked or time.monotonic()
        hours, self._ticked = (now - self._ticked) / _HOUR_S, now
        spent = self.search.spent
        spent["hours"] = spent.get("hours", 0.0) + hours
        for trial in trials:
            row = self._row(trial)
            if row.ended_s is None:
                row.state = _STATES.get(trial.status, row.state)
            if trial.status == Trial.RUNNING:
                placement: Any = trial.placement_group_factory
                held = placement.required_resources
                for key, name in (("cpu_hours", "CPU"), ("gpu_hours", "GPU")):
                    spent[key] = spent.get(key, 0.0) + hours * held.get(name, 0.0)

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Take note of a trial that begins, or goes on."""
        row = self._row(trial)
        row.state = "running"
        if not row.history:
            row.began_s = self._now_s()
        # A process counts its own seconds, from 0 each time that it takes a trial on.
        self._seconds_before[row.name] = dict(row.seconds)
        self.show(self.search, None)

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """Take note of an epoch."""
        self._learn(self._row(trial), result)
        self.show(self.search, None)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Take note of a trial's end, where the trial itself finds it, too."""
        row, result = self._row(trial), trial.last_result
        if ERROR in result:
            row.state, row.error = "failed", first_line(RuntimeError(result[ERROR]))
            row.scores = {}
        else:
            row.state = "finished" if result.get(FINISHED) else "stopped"
        self._end(row, result)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Take note of a trial that lost its processes too often."""
        row, folder = self._row(trial), self.job.trials / trial.trial_id
        lines = str(trial.get_pickled_error() or "its processes were lost").strip().splitlines()
        # What the trial wrote down itself says more than that its process is gone.
        written = folder.read_json(ENDED).get(ERROR) if folder.exists(ENDED) else None
        row.state, row.error, row.scores = "failed", written or lines[-1], {}
        self._end(row, {ERROR: row.error})

    def get_state(self) -> dict[str, Any]:
        """Return what a search that goes on has to know."""
        return {
            "trials": self.search.trials,
            "spent": self.search.spent,
            "scheduler": dumps(self.scheduler, self._trials),
            "paused": [t.trial_id for t in self._trials if t.status == Trial.PAUSED],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from an earlier state."""
        self.search.trials[:] = state["trials"]
        self.search.spent.update(state["spent"])
        self._scheduler_state = state["scheduler"]
        self._paused = frozenset(state["paused"])
        self.rows = {row.name: row for row in self.search.trials}

    def _go_on(self, scheduler_state: bytes, trials: list[Trial]) -> None:
        """Bring together what snapshots of perhaps different moments say."""
        restore(self.scheduler, scheduler_state, trials)
        if isinstance(self.scheduler, HyperBand):
            self.scheduler.waiting = self._paused
        if hasattr(self.algorithm, "agree_with"):
            self.algorithm.agree_with([trial.trial_id for trial in trials])
        known = {trial.trial_id: trial for trial in trials}
        self.search.trials[:] = [row for row in self.search.trials if row.name in known]
        self.rows = {row.name: row for row in self.search.trials}
        for name in {path.split("/")[0] for path in self.job.trials.names() if "/" in path}:
            if name not in known:
                # Of a trial that began after the snapshot; nobody will ask for it.
                self.job.trials.delete(name)
        self.settle(trials)
        for row in self.search.trials:
            if row.state == "running":
                row.state = "pending"

    def settle(self, trials: Sequence[Trial]) -> None:
        """Take note of trials whose end Tune has not told: it ends all without, at a budget's."""
        for trial in trials:
            row = self._row(trial)
            if trial.is_finished() and row.ended_s is None:
                self._learn(row, trial.last_result)
                if trial.status == Trial.ERROR:
                    self.on_trial_error(0, [], trial)
                else:
                    self.on_trial_complete(0, [], trial)

    # -- what is enough ---------------------------------------------------------------------------

    def is_spent(self) -> str | None:
        """Return which part of the budget is spent, if any is."""
        for name, most in self.search.budget.items():
            if name != "trials" and self.search.spent.get(name, 0.0) >= most:
                return name
        return None

    # -- parts ------------------------------------------------------------------------------------

    def _row(self, trial: Trial) -> TrialRow:
        row = self.rows.get(trial.trial_id)
        if row is None:
            row = TrialRow(trial.trial_id, "pending", {}, began_s=self._now_s())
            self.rows[row.name] = row
            self.search.trials.append(row)
        # PBT changes them on the way.
        row.values = dict(trial.config)
        return row

    def _learn(self, row: TrialRow, result: dict[str, Any]) -> None:
        if EPOCHS not in result:
            return
        row.epochs, row.best_epoch = result[EPOCHS], result[BEST_EPOCH]
        row.scores = scores_of(result, self.search.objectives)
        before = {} if result.get(WRITTEN) else self._seconds_before.get(row.name, {})
        own = seconds_of(result)
        row.seconds = {part: before.get(part, 0.0) + seconds for part, seconds in own.items()}
        kept = (console.EPOCH, console.TRAIN_LOSS, *(o.metric for o in self.search.objectives))
        record = {key: result[key] for key in kept if key in result}
        # A trial that lost its process trains some epochs again.
        earlier = [past for past in row.history if past[console.EPOCH] < record[console.EPOCH]]
        row.history = (*earlier, record)

    def _end(self, row: TrialRow, result: dict[str, Any]) -> None:
        row.ended_s = self._now_s()
        self.search.spent["trials"] = sum(r.ended_s is not None for r in self.search.trials)
        if not result.get(WRITTEN):
            (self.job.trials / row.name).write_json(ENDED, _plain(result))
        self._prune()
        self.show(self.search, row)

    def _prune(self) -> None:
        """Delete the checkpoints of trials that have ended and are not among the best."""
        if self.tune.scheduler in PAUSING:
            # Another one may still go on from them; what is left is deleted at the end.
            return
        ended = [row for row in self.search.ranked() if row.ended_s is not None]
        first = self.search.trials[0]
        for row in ended[self.tune.promote :]:
            if row is not first:
                delete_checkpoints(self.job.trials / row.name)

    def _now_s(self) -> float:
        return self.search.spent.get("hours", 0.0) * _HOUR_S


class BudgetStopper(Stopper):
    """Ends the search when its budget is spent.

    When a search goes on, Tune puts a pickled copy into the place of the one that it is given; a
    copy of this one is therefore the newest one itself.
    """

    newest: ClassVar["BudgetStopper | None"] = None

    def __init__(self, follower: SearchCallback) -> None:
        self.follower = follower
        BudgetStopper.newest = self

    def __reduce__(self) -> tuple[Any, ...]:
        return _newest_stopper, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return whether a single trial is to end: the scheduler sees to that."""
        return False

    def stop_all(self) -> bool:
        """Return whether all trials are to end."""
        return self.follower.is_spent() is not None


def _newest_stopper() -> BudgetStopper | None:
    return BudgetStopper.newest


def _plain(result: dict[str, Any]) -> dict[str, Any]:
    """Return what JSON can hold of a result."""
    plain: Sequence[type] = (str, int, float, bool, type(None))
    return {key: value for key, value in result.items() if isinstance(value, tuple(plain))}
