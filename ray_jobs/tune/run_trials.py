"""Runs the trials of a search under Ray Tune, from its begin or from where it stopped.

Enters: the space and the search folder.  Leaves: the trials' folders, and the search as it stands.

It is `tune.run`, and not a `Tuner`, because that one restores its settings from a pickle: another
budget, or other resources of the trials, would be ignored by a search that goes on.
"""

import logging
import os
import random
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from ray import tune
from ray.tune import CheckpointConfig
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.search import ConcurrencyLimiter, SearchAlgorithm, SearchGenerator
from ray.tune.search.basic_variant import BasicVariantGenerator

from ray_jobs.cluster.trial_slots import trial_slots
from ray_jobs.config.errors import Interrupted, JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.config.tune_spec import EXPLOITING, PAUSING
from ray_jobs.storage.folder import Folder
from ray_jobs.tune.results.leaderboard import LiveLeaderboard
from ray_jobs.tune.results.search_state import Search
from ray_jobs.tune.search.scheduler import make_scheduler, perturbation_epochs
from ray_jobs.tune.search.searcher import make_searcher
from ray_jobs.tune.search.space import Space
from ray_jobs.tune.trials.atomic_filesystem import filesystem_of
from ray_jobs.tune.trials.trial import Job, Trial
from ray_jobs.tune.trials.trial_workers import member_resources
from ray_jobs.tune.trials.tune_callback import BudgetStopper, SearchCallback

TRIALS = "trials"

_KEPT = 2
"""Checkpoints of a trial: the newest, and that which a killed driver's snapshot still names."""
_ENVIRONMENT = {
    # Our own records and the leaderboard say the same in fewer files.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A trial that failed says so in its last result, which holds no metric.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # A killed driver should not lose what it has heard of its trials.
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Its newer way of printing cannot be silenced.
    "RAY_AIR_NEW_OUTPUT": "0",
}
_STOPPED = "stopped; the same command again goes on with the search"


def run_trials(
    spec: RunSpec,
    space: Space,
    folder: Folder,
    search: Search,
    feed: Mapping[str, Any],
    features: Mapping[str, Folder] | None = None,
) -> None:
    """Run the trials of a search until it is done; `search` then says how they stand.

    Args:
        spec: of the search.
        space: of it.
        folder: of it.
        search: to keep up to date.
        feed: `decode`, `cache` and `index` of the rows.
        features: for trials on features, as of a `Job`.

    Raises:
        JobError: if the cluster can never hold a trial, or no trial has a score.
        Interrupted: if the user stopped it.
    """
    settings = spec.tune
    job = Job(
        space=space,
        trials=folder / TRIALS,
        objectives=tuple(search.objectives),
        num_workers=settings.workers_per_trial or spec.train.workers_range[0],
        gpus_per_worker=settings.gpus_per_worker,
        checkpoint_every_s=settings.checkpoint_every_s,
        feeding=feed,
        features=features or {},
    )
    bundle = member_resources(spec.train, settings.gpus_per_worker)
    wanted = settings.max_concurrent_trials
    search.slots = trial_slots(bundle, job.num_workers, wanted)
    if wanted and settings.scheduler not in PAUSING:
        search.slots = min(search.slots, wanted)
    most_epochs = _most_epochs(space)
    kept = _KEPT
    if settings.scheduler in EXPLOITING:
        # A clone goes on from what its donor saved at its last look, one an epoch at the most.
        kept += perturbation_epochs(spec, most_epochs) + 1
    goes_on = _has_state(job.trials)
    random.seed(settings.seed)
    np.random.seed(settings.seed)
    scheduler = make_scheduler(spec, most_epochs, search.objectives[0])
    with (
        LiveLeaderboard(_title(spec, folder, search.slots)) as screen,
        _environment(search.slots),
        _no_keys_handed_on(),
        _harmless_unsaid(),
    ):
        if goes_on:
            screen.note("going on with the search that is there")
        follower = SearchCallback(search, job, settings, scheduler, screen.show)
        algorithm, num_trials = _search_algorithm(spec, space, search)
        follower.algorithm = algorithm
        trainable: Any = tune.with_parameters(Trial, job=job)
        with _terminated_as_interrupted():
            analysis = tune.run(
                tune.with_resources(trainable, job.resources_of),
                name=TRIALS,
                storage_path=folder.uri,
                storage_filesystem=filesystem_of(folder),
                num_samples=num_trials,
                # Values that PBT's own generator replaces; the others bring theirs.
                config=dict(space.first[0]) if settings.scheduler in EXPLOITING else {},
                search_alg=algorithm,
                scheduler=scheduler,
                stop=BudgetStopper(follower),
                callbacks=[follower],
                checkpoint_config=CheckpointConfig(num_to_keep=kept, checkpoint_at_end=True),
                max_failures=settings.max_failures,
                reuse_actors=True,
                trial_dirname_creator=_trial_id,
                raise_on_failed_trial=False,
                resume=goes_on,
                verbose=0,
            )
        follower.settle(analysis.trials or ())
        if spent := follower.is_spent():
            screen.note(f"the budget's {spent} are spent; trials that ran were stopped")
    if not all(trial.is_finished() for trial in analysis.trials or ()):
        raise Interrupted(_STOPPED)
    if not any(row.scores for row in search.trials):
        errors = [f"the first error: {row.error}" for row in search.trials if row.error]
        why = errors[0] if errors else "none came to the end of its first epoch"
        raise JobError(f"no trial has a score; {why}")


def _search_algorithm(spec: RunSpec, space: Space, search: Search) -> tuple[SearchAlgorithm, int]:
    """Return what suggests trials, and how many."""
    settings, num_trials = spec.tune, spec.tune.budget.trials
    searcher = make_searcher(space, settings, list(search.objectives))
    if settings.scheduler in EXPLOITING:
        # Ray's PBT takes no searcher: the whole population is chosen at once.
        names = map(str, range(num_trials))
        points = [searcher.suggest(name) for name in names]
        population = [point for point in points if isinstance(point, dict)]
        return BasicVariantGenerator(points_to_evaluate=population), len(population)
    if settings.scheduler in PAUSING:
        # Those that wait for each other all have to be there.
        return _Generator(searcher, num_trials), num_trials
    return _Generator(searcher, num_trials, search.slots), num_trials


class _Generator(SearchGenerator):
    """Suggests so many trials, also where a search goes on that had another budget."""

    def __init__(self, searcher: Any, num_trials: int, at_once: int | None = None) -> None:
        limited = searcher if at_once is None else ConcurrencyLimiter(searcher, at_once)
        super().__init__(limited)
        self._num_trials, self._at_once = num_trials, at_once

    def agree_with(self, trials: Sequence[str]) -> None:
        """Learn which trials there are, which a snapshot of another moment may not say.

        Args:
            trials: their names.
        """
        self._counter = len(trials)
        if isinstance(self.searcher, ConcurrencyLimiter) and self._at_once is not None:
            self.searcher.live_trials &= set(trials)
            self.searcher.max_concurrent = self._at_once

    def set_state(self, state: dict[str, Any]) -> None:
        # A grid says again that it is at its end; a budget that was spent may be larger now.
        super().set_state({**state, "total_samples": self._num_trials, "finished": False})


def _has_state(trials: Folder) -> bool:
    """Whether Tune has written a state that can be gone on from."""
    names = [name for name in trials.names() if "/" not in name]
    return any(name.startswith("experiment_state") for name in names)


def _most_epochs(space: Space) -> int:
    """Return the most epochs that any trial can have."""
    values = space.distributions.get("train.epochs")
    if values is None:
        return space.base.train.epochs
    return max(space.base.train.epochs, *(int(value) for value in values.values()))


def _title(spec: RunSpec, folder: Folder, slots: int) -> str:
    from rich.markup import escape

    settings = spec.tune
    workers = settings.workers_per_trial or spec.train.workers_range[0]
    several = f" of {workers} workers" if workers > 1 else ""
    return (
        f"[bold]{escape(str(spec.run.name))}[/bold]: {settings.budget.trials} trials{several} over "
        f"{len(settings.space)} settings by {settings.searcher} and {settings.scheduler}, "
        f"{slots} at once → {escape(str(folder))}"
    )


def _trial_id(trial: TuneTrial) -> str:
    return trial.trial_id


@contextmanager
def _no_keys_handed_on() -> Iterator[None]:
    """Keep Ray Tune from giving AWS keys to trials by a runtime environment, which Ray logs.

    Trials have those of the nodes, or of the job, as a training has.
    """
    from ray.tune.execution import class_cache

    handed_on = class_cache.ENV_VARS_TO_PROPAGATE
    keys = {name for name in handed_on if name.startswith("AWS_")}
    handed_on -= keys
    try:
        yield
    finally:
        handed_on |= keys


@contextmanager
def _environment(slots: int) -> Iterator[None]:
    """Set what Ray Tune reads from the environment, and only while it does."""
    # As many as can run are asked of the cluster at once, so that an autoscaler knows of them.
    wanted = {**_ENVIRONMENT, "TUNE_MAX_PENDING_TRIALS_PG": str(slots)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _harmless_unsaid() -> Iterator[None]:
    """Keep a complaint of Tune's off the terminal that the next second settles.

    It copies its snapshot while it writes the next one, and may miss a file that gets its name.
    """

    def matters(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], FileNotFoundError))

    log = logging.getLogger("ray.tune.execution.experiment_state")
    log.addFilter(matters)
    try:
        yield
    finally:
        log.removeFilter(matters)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, which `ray job stop` sends, do what Ctrl-C does: Tune then saves its state."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupt = signal.getsignal(signal.SIGINT)
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)
