"""Runs the trials of a search under Ray Tune, or resumes them.

Input: the search space and the search folder. Output: the trials' folders, and the updated search.

Uses `tune.run`: a `Tuner` would restore its settings from a pickle and ignore a changed budget or
changed resources when a search resumes.
"""

import logging
import os
import random
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import numpy as np
from ray import tune
from ray.tune import Callback, CheckpointConfig
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.search import ConcurrencyLimiter, SearchAlgorithm, SearchGenerator
from ray.tune.search.basic_variant import BasicVariantGenerator

from ray_jobs.cluster.capacity import trial_slots, worker_resources
from ray_jobs.cluster.capacity_request import CapacityRequest
from ray_jobs.cluster.compat_ray import SNAPSHOT_LOGGER, propagated_env_vars
from ray_jobs.config.errors import Interrupted, JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.config.text import count_text
from ray_jobs.config.tune_spec import EXPLOITING, PAUSING
from ray_jobs.data.folds import Fold, FoldRows
from ray_jobs.storage.folder import Folder
from ray_jobs.train.supervisor import noting_interrupts
from ray_jobs.tune.results.leaderboard import LiveLeaderboard
from ray_jobs.tune.results.search_state import Search
from ray_jobs.tune.search.scheduler import make_scheduler, perturbation_epochs
from ray_jobs.tune.search.searcher import make_searcher
from ray_jobs.tune.search.space import Space
from ray_jobs.tune.trials.atomic_filesystem import filesystem_of
from ray_jobs.tune.trials.trial import SearchContext, Trial
from ray_jobs.tune.trials.tune_callback import BudgetStopper, SearchCallback

TRIALS = "trials"

_NUM_CHECKPOINTS = 2
"""Checkpoints per trial: the newest, and the one that a killed driver's snapshot may still name."""
_ENVIRONMENT = {
    # The trials' own records and the leaderboard contain the same data in fewer files.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The last result of a failed trial has no metric.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # A killed driver loses at most a second of results.
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # See `_interrupts_end_tune`.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Ray's new output cannot be silenced.
    "RAY_AIR_NEW_OUTPUT": "0",
}


def run_trials(
    spec: RunSpec,
    space: Space,
    folder: Folder,
    search: Search,
    feeding: Mapping[str, Any],
    features: Mapping[str, Folder] | None = None,
    rows: FoldRows | None = None,
    folds: Sequence[Fold] = (),
) -> None:
    """Run the trials of a search until it is done.

    Args:
        spec: The spec of the search.
        space: Its search space.
        folder: The search folder.
        search: The state of the search; updated while trials run.
        feeding: `decode`, `cache` and `index`, as for a training run.
        features: Folders of features by `features_key`, if trials train on features.
        rows: The rows that are divided into folds, if trials are scored by folds.
        folds: The folds.

    Raises:
        JobError: If the cluster is too small for a trial, or no trial has a score.
        Interrupted: If the user stopped the search.
    """
    settings = spec.tune
    context = SearchContext(
        space=space,
        trials=folder / TRIALS,
        objectives=search.objectives,
        num_workers=settings.workers_per_trial or spec.train.workers_range[0],
        gpus_per_worker=settings.gpus_per_worker,
        checkpoint_every_s=settings.checkpoint_every_s,
        feeding=feeding,
        features=features or {},
        rows=rows,
        folds=folds,
    )
    bundle = worker_resources(spec.train, settings.gpus_per_worker)
    max_concurrent = settings.max_concurrent_trials
    search.slots = trial_slots(bundle, context.num_workers, max_concurrent)
    if max_concurrent and settings.scheduler not in PAUSING:
        search.slots = min(search.slots, max_concurrent)
    searched = space.distributions.get("train.epochs")
    max_epochs = max([space.base.train.epochs, *map(int, searched.values() if searched else ())])
    num_checkpoints = _NUM_CHECKPOINTS
    if settings.scheduler in EXPLOITING:
        # A clone continues from its donor's checkpoint at the last perturbation. The donor has
        # saved at most one per epoch since then.
        num_checkpoints += perturbation_epochs(spec, max_epochs) + 1
    resume = any(name.startswith("experiment_state") for name in context.trials.names())
    random.seed(settings.seed)
    np.random.seed(settings.seed)
    scheduler = make_scheduler(spec, max_epochs, search.objectives[0])
    with LiveLeaderboard(_title(spec, folder, context.num_workers, search.slots)) as leaderboard:
        if resume:
            leaderboard.note("resuming the interrupted search")
        algorithm, num_trials = _make_algorithm(spec, space, search)
        callback = SearchCallback(search, context, settings, scheduler, algorithm, leaderboard.show)
        trainable: Any = tune.with_parameters(Trial, context=context)
        with (
            _tune_configured(search.slots),
            _interrupts_end_tune() as interrupted,
            CapacityRequest() as request,
        ):
            workers = [bundle] * context.num_workers
            requesting = _RequestCallback(
                request, workers, search.slots, num_trials, algorithm, interrupted
            )
            analysis = tune.run(
                tune.with_resources(trainable, context.resources_of),
                name=TRIALS,
                storage_path=folder.uri,
                storage_filesystem=filesystem_of(folder),
                num_samples=num_trials,
                # PBT's own generator replaces these values; other searchers provide all of them.
                config=dict(space.first[0]) if settings.scheduler in EXPLOITING else {},
                search_alg=algorithm,
                scheduler=scheduler,
                stop=BudgetStopper(callback),
                callbacks=[callback, requesting],
                checkpoint_config=CheckpointConfig(
                    num_to_keep=num_checkpoints, checkpoint_at_end=True
                ),
                max_failures=settings.max_failures,
                reuse_actors=True,
                trial_dirname_creator=attrgetter("trial_id"),
                raise_on_failed_trial=False,
                resume=resume,
                verbose=0,
            )
        if interrupted.is_set():
            raise Interrupted("stopped; run the same command again to resume the search")
        callback.record_ended(analysis.trials or ())
        if part := callback.spent_part():
            leaderboard.note(f"tune.budget.{part} is spent; running trials were stopped")
    if not any(row.scores for row in search.trials):
        errors = [f"the first error: {row.error}" for row in search.trials if row.error]
        reason = errors[0] if errors else "none completed its first epoch"
        raise JobError(f"no trial has a score; {reason}")


def _make_algorithm(spec: RunSpec, space: Space, search: Search) -> tuple[SearchAlgorithm, int]:
    """Return the search algorithm and the number of trials."""
    settings, num_trials = spec.tune, spec.tune.budget.trials
    searcher = make_searcher(space, settings, search.objectives)
    if settings.scheduler in EXPLOITING:
        # Ray's PBT does not support searchers, so the whole population is chosen in advance.
        points = [searcher.suggest(str(number)) for number in range(num_trials)]
        population = [point for point in points if isinstance(point, dict)]
        return BasicVariantGenerator(points_to_evaluate=population), len(population)
    if settings.scheduler in PAUSING:
        # Trials wait for each other, so all of them must start.
        return _TrialGenerator(searcher, num_trials), num_trials
    return _TrialGenerator(searcher, num_trials, search.slots), num_trials


class _RequestCallback(Callback):
    """Requests the resources of as many trials as can still run at the same time.

    Without the request, an autoscaler would count the nodes of these trials as meeting the request
    of another job.

    Args:
        request: The request to update.
        workers: Resources of each worker of a trial.
        slots: Maximum number of trials that run at the same time.
        num_trials: Number of trials of the search.
        algorithm: The search algorithm, which may suggest fewer trials.
        interrupted: Whether a signal has interrupted the search.
    """

    def __init__(
        self,
        request: CapacityRequest,
        workers: Sequence[Mapping[str, float]],
        slots: int,
        num_trials: int,
        algorithm: SearchAlgorithm,
        interrupted: threading.Event,
    ) -> None:
        self.request, self.workers = request, workers
        self.slots, self.num_trials = slots, num_trials
        self.algorithm, self.interrupted = algorithm, interrupted

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        if self.interrupted.is_set():
            # The signal came before Tune handled it.
            signal.raise_signal(signal.SIGUSR1)
        to_come = 0 if self.algorithm.is_finished() else self.num_trials - len(trials)
        remaining = to_come + sum(not trial.is_finished() for trial in trials)
        self.request.update([*self.workers] * min(self.slots, remaining))


class _TrialGenerator(SearchGenerator):
    """Suggests a fixed number of trials; the number may change when a search resumes."""

    def __init__(self, searcher: Any, num_trials: int, max_concurrent: int | None = None) -> None:
        limited = max_concurrent is not None
        super().__init__(ConcurrencyLimiter(searcher, max_concurrent) if limited else searcher)
        self._suggesting = searcher
        self._num_trials, self._max_concurrent = num_trials, max_concurrent

    def reconcile(self, trials: Sequence[TuneTrial]) -> None:
        """Adapt a restored state to the trials that exist; it may be from another moment."""
        self.set_state({**self.get_state(), "counter": len(trials)})
        if isinstance(self.searcher, ConcurrencyLimiter) and self._max_concurrent is not None:
            self.searcher.live_trials = {trial.trial_id for trial in trials}
            self.searcher.max_concurrent = self._max_concurrent
        self._suggesting.reconcile({trial.trial_id: trial.config for trial in trials})
        for trial in trials:
            if trial.is_finished():
                failed = trial.status == TuneTrial.ERROR
                self.on_trial_complete(trial.trial_id, trial.last_result, failed)

    def set_state(self, state: dict[str, Any]) -> None:
        # The budget may be larger now; a grid reports again when it is exhausted.
        super().set_state({**state, "total_samples": self._num_trials, "finished": False})


def _title(spec: RunSpec, folder: Folder, num_workers: int, slots: int) -> str:
    from rich.markup import escape

    settings = spec.tune
    per_trial = f" of {num_workers} workers" if num_workers > 1 else ""
    return (
        f"[bold]{escape(str(spec.run.name))}[/bold]: "
        f"{count_text(settings.budget.trials, 'trial')}{per_trial} over "
        f"{count_text(len(settings.space), 'setting')}, {settings.searcher} and "
        f"{settings.scheduler}, {slots} at a time → {escape(str(folder))}"
    )


@contextmanager
def _tune_configured(slots: int) -> Iterator[None]:
    """Configure Ray Tune through environment variables, and restore them afterwards."""
    # Requests resources for all slots at once, so that an autoscaler can provide them.
    wanted = {**_ENVIRONMENT, "TUNE_MAX_PENDING_TRIALS_PG": str(slots)}
    before = {name: os.environ.get(name) for name in wanted}
    propagated = propagated_env_vars()
    aws_keys = {name for name in propagated if name.startswith("AWS_")}
    logger = logging.getLogger(SNAPSHOT_LOGGER)
    os.environ.update(wanted)
    # Ray would log the keys. Trials use those of their node or job, like a training run.
    propagated -= aws_keys
    logger.addFilter(_is_relevant)
    try:
        yield
    finally:
        logger.removeFilter(_is_relevant)
        propagated |= aws_keys
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _is_relevant(record: logging.LogRecord) -> bool:
    # Tune copies its snapshot while it writes the next one, so a file may be missing briefly.
    return not (record.exc_info and isinstance(record.exc_info[1], FileNotFoundError))


@contextmanager
def _interrupts_end_tune() -> Iterator[threading.Event]:
    """Make Tune save its state and end at Ctrl-C or SIGTERM, and record that it did.

    Tune's own handler of SIGINT leaves no record of the interrupt; its handler of SIGUSR1 does the
    same.
    """
    with noting_interrupts(lambda: signal.raise_signal(signal.SIGUSR1)) as interrupted:
        if threading.current_thread() is not threading.main_thread():
            yield interrupted
            return
        # Tune replaces this handler by its own, which ends Tune.
        before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        try:
            yield interrupted
        finally:
            signal.signal(signal.SIGUSR1, before)
