"""Runs trials under Ray Tune: an actor trains one trial after another.

Input: the values that the search chose. Output: a result per epoch, checkpoints, and the rest of a
run folder in `trials/ID/`.

Tune reuses the actor, so it imports TensorFlow and creates the strategy once. Every process of a
trial runs in the trial's placement group, which Tune owns, so no process outlives the trial.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from statistics import fmean
from typing import Any

from ray import tune

from ray_jobs.cluster.capacity import worker_resources
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.folds import Fold, FoldRows, select_rows
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint import Checkpoint, LoopState
from ray_jobs.train.job import SPEC, begin_run, run_folder
from ray_jobs.train.telemetry import history_keys
from ray_jobs.train.telemetry.history import history_text
from ray_jobs.train.worker import is_permanent
from ray_jobs.tune.results.search_state import PARTS
from ray_jobs.tune.search.feature_trials import feature_trial_spec, features_key
from ray_jobs.tune.search.scheduler import EPOCHS
from ray_jobs.tune.search.searcher import result_key
from ray_jobs.tune.search.space import Space, Values
from ray_jobs.tune.trials.trial_checkpoints import (
    newest_checkpoint,
    read_checkpoints,
    write_checkpoints,
)
from ray_jobs.tune.trials.trial_workers import TrialWorkerGroup

ENDED = "ended.json"
"""File in a trial's folder with its last result, written when the trial ends for whatever
reason."""
ERROR = "error"
"""Key in the last result of a failed trial; the value is the trial's first error."""
BEST_EPOCH = "best_epoch"
"""Key in results: the index of the best epoch so far."""
FINISHED = "finished"
"""Key in results: whether the trial ran to completion instead of being stopped early."""
WRITTEN = "written"
"""Key in results: present if the result was read from `ended.json` instead of computed."""
FOLDS = "folds"
"""Folder in a trial's folder with the run folders of its folds."""
_SECONDS = "seconds/"


@dataclass(frozen=True)
class SearchContext:
    """Settings and folders that all trials of a search share."""

    space: Space
    trials: Folder
    """The parent of the trials' folders."""
    objectives: Sequence[str]
    num_workers: int
    """Workers of each trial."""
    gpus_per_worker: float | None
    """GPUs, or a fraction of one, instead of `train.gpus_per_worker`."""
    checkpoint_every_s: float
    feeding: Mapping[str, Any]
    """`decode`, `cache` and `index`, as for a training run."""
    features: Mapping[str, Folder] = field(default_factory=dict)
    """Folders of features by `features_key`, if trials train on features."""
    rows: FoldRows | None = None
    """The rows that are divided into folds, if trials are scored by folds."""
    folds: Sequence[Fold] = ()

    def spec_of(self, values: Values, name: str = "trial") -> RunSpec:
        """Return the spec for a trial's run folder."""
        changes = {
            "run.name": name,
            "run.storage_path": self.trials.uri,
            "run.tracking": "none",
            "train.num_workers": self.num_workers,
        }
        spec = self.space.spec_of({**changes, **values})
        if not self.features:
            return spec
        return feature_trial_spec(spec, self.features[features_key(values, self.space)])

    @property
    def num_models(self) -> int:
        """Models of each trial."""
        return len(self.folds) or 1

    def begin_trial(self, spec: RunSpec) -> list[RunSpec]:
        """Write the first files of a trial's folder; return the spec of each of its models."""
        folder, manifest = run_folder(spec), read_manifest(Folder(spec.data.prepared))
        if not folder.exists(SPEC):
            begin_run(spec, manifest, folder)
        if self.rows is None:
            return [spec]
        rows, specs = replace(self.rows, manifest=manifest), list[RunSpec]()
        for fold in self.folds:
            changes = {
                "run.name": fold.name,
                "run.storage_path": (folder / FOLDS).uri,
                "data.cache_bytes": spec.data.cache_bytes // len(self.folds),
            }
            specs.append(spec.overlay(changes))
            if not run_folder(specs[-1]).exists(SPEC):
                selected = select_rows(rows, ~fold.is_scored_N, fold.is_scored_N)
                begin_run(specs[-1], selected, run_folder(specs[-1]))
        return specs

    def resources_of(self, values: Values) -> "tune.PlacementGroupFactory":
        """Return the resources of a trial: a bundle per worker, on as few nodes as possible."""
        try:
            train = self.space.spec_of(values).train
        except ValueError:
            # The trial itself reports invalid values, and fails.
            train = self.space.base.train
        bundle = worker_resources(train, self.gpus_per_worker)
        return tune.PlacementGroupFactory([bundle] * self.num_workers, strategy="PACK")


class Trial(tune.Trainable):
    """Trains one epoch per Tune step."""

    def setup(self, config: dict[str, Any], context: SearchContext) -> None:  # type: ignore[override]
        """Prepare the first trial of this actor."""
        self.context = context
        self.group = TrialWorkerGroup(self._record_failure)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Prepare the next trial; its first step starts it."""
        self.values = dict(new_config)
        self.folder = self.context.trials / self.trial_id
        self.states: list[LoopState] = []
        """The state of each model, once it has trained an epoch."""
        self._running = False
        self._saved: list[Checkpoint] | None = None
        self._saved_at = time.monotonic()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._inference_row_s: float | None = None
        return True

    def step(self) -> dict[str, Any]:
        """Train an epoch and return its result, or the error that ends the trial."""
        # True if the trial had already ended, but the driver was killed before it recorded that.
        if not self._running and self.folder.exists(ENDED):
            return {**self.folder.read_json(ENDED), "done": True, WRITTEN: True}
        try:
            if not self._running:
                self._start()
            return self._train_epoch()
        except Exception as error:
            if not is_permanent(error):
                raise
            self._running = False
            self.group.end_trial()
            return _failure(error)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write a checkpoint in the layout of a run folder."""
        started = time.monotonic()
        if self._running and self.states:
            local = self.group.local
            saved = [local.take_checkpoint(state, i) for i, state in enumerate(self.states)]
        elif self._saved is not None:
            # Nothing has been trained since the checkpoint was loaded; save it as the newest one.
            saved = self._saved
        else:
            return
        write_checkpoints(Folder(checkpoint_dir), saved)
        if not self.context.folds:
            self.folder.write_text(history_keys.HISTORY, history_text(saved[0].state.history))
        self._saved_at = time.monotonic()
        self._seconds["checkpoint"] += self._saved_at - started

    def restore(self, checkpoint_path: Any) -> None:
        """Restore a checkpoint or, if it no longer exists, the newest one of this trial.

        The snapshot of a killed driver can name a checkpoint that the trial has since deleted.
        """
        path = PurePosixPath(getattr(getattr(checkpoint_path, "checkpoint", None), "path", "/"))
        if path.parent.name == self.trial_id and not self.folder.exists(path.name):
            newest = newest_checkpoint(self.folder, self.context.num_models)
            self._saved = newest and newest[1]
            return
        super().restore(checkpoint_path)

    def load_checkpoint(self, checkpoint: str | dict | None) -> None:
        """Read the checkpoint to continue from, which may be another trial's."""
        self._saved = read_checkpoints(Folder(str(checkpoint)), self.context.num_models)

    def cleanup(self) -> None:
        """End the other processes of the trial."""
        self.group.close()

    def _record_failure(self, error: Exception) -> None:
        """Write a permanent error, so that the process that restarts the trial reports it."""
        if is_permanent(error):
            self.folder.write_json(ENDED, _failure(error))

    def _start(self) -> None:
        spec = self._spec = self.context.spec_of(self.values, self.trial_id)
        specs = self.context.begin_trial(spec)
        saved, self._saved = self._saved, None
        self.group.start_trial(specs, self.context.feeding, saved or [None] * len(specs))
        self._running = True

    def _train_epoch(self) -> dict[str, Any]:
        train, states = self._spec.train, self.states
        for model in range(self.context.num_models):
            if not states[model:] or not states[model].is_finished(train):
                states[model : model + 1] = [self.group.train_epoch(model)]
                self._add_seconds(states[model].history[-1])
        finished = all(state.is_finished(train) for state in states)
        record = _mean([state.history[-1] for state in states])
        best = _mean([state.history[int(state.best_epoch or 0)] for state in states])
        objectives = self.context.objectives
        scores = {result_key(metric): self._score(metric, best) for metric in objectives}
        # Schedulers ignore an absent metric but fail on None.
        metrics = {key: value for key, value in (record | scores).items() if value is not None}
        due = time.monotonic() - self._saved_at > self.context.checkpoint_every_s
        return {
            **metrics,
            **{f"{_SECONDS}{part}": seconds for part, seconds in self._seconds.items()},
            EPOCHS: max(state.epoch for state in states),
            BEST_EPOCH: round(fmean(int(state.best_epoch or 0) for state in states)),
            FINISHED: finished,
            "done": finished,
            "should_checkpoint": due,
        }

    def _score(self, metric: str, best: Mapping[str, Any]) -> Any:
        if metric != history_keys.INFERENCE_ROW_S:
            return best[metric]
        if self._inference_row_s is None:
            self._inference_row_s = self.group.local.measure_inference_row_s()
        return self._inference_row_s

    def _add_seconds(self, record: Mapping[str, Any]) -> None:
        build_s, first_step_s = self.group.local.take_start_seconds()
        waited_s, saved_s = record[history_keys.DATA_WAIT_S], record[history_keys.CHECKPOINT_S]
        steps_s = record[history_keys.EPOCH_S] - waited_s - saved_s - first_step_s
        self._seconds["start"] += build_s + first_step_s
        self._seconds["data"] += waited_s
        self._seconds["compute"] += max(steps_s, 0.0)
        self._seconds["validation"] += record[history_keys.VALIDATION_S]
        self._seconds["checkpoint"] += saved_s


def seconds_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds that a trial spent on each of `PARTS`, according to a result."""
    return {part: float(result.get(f"{_SECONDS}{part}", 0.0)) for part in PARTS}


def _failure(error: Exception) -> dict[str, Any]:
    # An error in another process arrives wrapped in a Ray error, whose own text is a traceback.
    error = getattr(error, "cause", None) or error
    return {"done": True, ERROR: f"{type(error).__name__}: {error}"}


def _mean(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means of the numbers in the records of several models; None if any is None."""
    if len(records) == 1:
        return dict(records[0])
    means: dict[str, Any] = {}
    for key in records[0]:
        values: list[Any] = [record.get(key) for record in records]
        means[key] = None if None in values else fmean(values)
    return {**means, history_keys.EPOCH: max(record[history_keys.EPOCH] for record in records)}
