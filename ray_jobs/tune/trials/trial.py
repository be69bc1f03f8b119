"""One trial after another in one actor: Ray Tune's side of a training.

Enters: the values that the search chose.  Leaves: a result an epoch, checkpoints, and in
`trials/ID/` what makes it a run folder.

Tune reuses the actor, so that imports and the strategy are paid for once; and it owns the trial's
placement group, in which every process of the trial lives, so that nothing outlives the trial.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ray import tune

from ray_jobs.config.spec import RunSpec
from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint_manager import CheckpointManager
from ray_jobs.train.telemetry import console
from ray_jobs.train.telemetry.console import HISTORY
from ray_jobs.train.telemetry.history import history_text
from ray_jobs.train.worker import is_permanent
from ray_jobs.tune.results.search_state import PARTS, Objective
from ray_jobs.tune.search.feature_trials import features_key, on_features
from ray_jobs.tune.search.scheduler import EPOCHS
from ray_jobs.tune.search.searcher import result_key
from ray_jobs.tune.search.space import Space, Values
from ray_jobs.tune.trials.trial_checkpoints import newest_saved
from ray_jobs.tune.trials.trial_workers import (
    BrokenGroupError,
    EpochResult,
    TrialGroup,
    member_resources,
)

ENDED = "ended.json"
"""File of a trial's folder: its last result, once it has ended in any way."""
ERROR = "error"
"""Key of the last result of a trial that failed: what its first error said."""
BEST_EPOCH = "best_epoch"
"""Key of results: index of the best epoch so far."""
FINISHED = "finished"
"""Key of results: whether the trial came to its own end."""
WRITTEN = "written"
"""Key of a result that was read from `ended.json`, and not trained for."""
_SECONDS = "seconds/"


@dataclass(frozen=True)
class Job:
    """What all trials of a search share.

    Args:
        space: what they are made of.
        trials: folder of the trials' folders.
        objectives: of the search.
        num_workers: processes of each, where the values do not say.
        gpus_per_worker: GPUs of each process, in place of whole ones.
        checkpoint_every_s: seconds between two checkpoints.
        feeding: `decode`, `cache` and `index`, as of a run.
        features: where trials see features in place of images, the features by what they follow
            from, as `features_key` says.
    """

    space: Space
    trials: Folder
    objectives: tuple[Objective, ...]
    num_workers: int
    gpus_per_worker: float | None
    checkpoint_every_s: float
    feeding: Mapping[str, Any] = field(default_factory=dict)
    features: Mapping[str, Folder] = field(default_factory=dict)

    def spec_of(self, values: Values, name: str = "trial") -> RunSpec:
        """Return the spec of a trial's run folder."""
        changes = {
            "run.name": name,
            "run.storage_path": self.trials.uri,
            "run.tracking": "none",
            "train.num_workers": self.num_workers,
        }
        spec = self.space.spec_of({**changes, **values})
        if not self.features:
            return spec
        return on_features(spec, self.features[features_key(values, self.space)])

    def resources_of(self, values: Values) -> "tune.PlacementGroupFactory":
        """Return what a trial holds: a bundle for each process, on as few nodes as can be."""
        try:
            train = self.space.spec_of(values).train
        except ValueError:
            # Values that do not go together: the trial says so, and fails.
            train = self.space.base.train
        bundle = member_resources(train, self.gpus_per_worker)
        return tune.PlacementGroupFactory([bundle] * self.num_workers, strategy="PACK")


class Trial(tune.Trainable):
    """Trains an epoch a step."""

    def setup(self, config: dict[str, Any], job: Job) -> None:  # type: ignore[override]
        """Begin the first trial of this actor."""
        self.job = job
        self.group = TrialGroup(lambda error: self._write_down(error))
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial."""
        self._begin(new_config)
        return True

    def _begin(self, values: Values) -> None:
        self.values = dict(values)
        self.folder = self.job.trials / self.trial_id
        self.done: EpochResult | None = None
        self._running = False
        self._saved: Any = None
        self._saved_at = time.monotonic()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._inference_row_s: float | None = None

    def step(self) -> dict[str, Any]:
        """Train an epoch, and return its result; an error of the trial's own is one, too."""
        # Its end was written down, and the search's driver did not live to note it.
        if not self._running and self.folder.exists(ENDED):
            return {**self.folder.read_json(ENDED), "done": True, WRITTEN: True}
        try:
            if not self._running:
                self._start()
            return self._epoch()
        except BrokenGroupError as error:
            if isinstance(error.__cause__, Exception):
                self._write_down(error.__cause__)
            os._exit(1)
        except Exception as error:
            if not is_permanent(error):
                raise
            self._running = False
            self.group.end()
            return _failure(error)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write a checkpoint as a run folder holds it."""
        started = time.monotonic()
        if self._running and self.done is not None:
            saved = self.group.saved(self.done.state)
        elif self._saved is not None:
            # Nothing was trained since it was read, and it is to stay the newest.
            saved = self._saved
        else:
            return
        store = CheckpointManager(Folder(checkpoint_dir), warn=_fail)
        store.save(saved)
        store.close()
        self.folder.write_text(HISTORY, history_text(saved.state.history))
        self._saved_at = time.monotonic()
        self._seconds["checkpoint"] += self._saved_at - started

    def restore(self, checkpoint_path: Any) -> None:
        """Go on from a checkpoint; from the trial's newest, where that one is no more.

        A killed driver's snapshot may be older than what its trials have deleted since.
        """
        path = PurePosixPath(getattr(getattr(checkpoint_path, "checkpoint", None), "path", "/"))
        if path.parent.name == self.trial_id and not self.folder.exists(path.name):
            self._saved = newest_saved(self.folder)
            return
        super().restore(checkpoint_path)

    def load_checkpoint(self, checkpoint: str | dict | None) -> None:
        """Read the checkpoint that the trial goes on from, perhaps another trial's."""
        self._saved = CheckpointManager(Folder(str(checkpoint)), warn=_fail).newest()

    def cleanup(self) -> None:
        """End the trial's other processes."""
        self.group.close()

    def _write_down(self, error: Exception) -> None:
        """Leave an error to the process that takes the trial on, if it would come again there."""
        if is_permanent(error):
            self.folder.write_json(ENDED, _failure(error))

    def _start(self) -> None:
        from ray_jobs.data.manifest import read_manifest
        from ray_jobs.train.job import SPEC, begin_run

        spec = self.job.spec_of(self.values, self.trial_id)
        if not self.folder.exists(SPEC):
            begin_run(spec, read_manifest(Folder(spec.data.prepared)), self.folder)
        saved, self._saved = self._saved, None
        self.group.begin(spec, self.job.feeding, saved)
        self._running = True

    def _epoch(self) -> dict[str, Any]:
        done = self.done = self.group.epoch()
        record, history = done.record, done.state.history
        best = history[int(done.state.best_epoch or 0)]
        self._add_seconds(done)
        scores = {result_key(o.metric): self._score(o.metric, best) for o in self.job.objectives}
        # Schedulers pass over a metric that is not there, and stumble over one that is None.
        known = {key: value for key, value in (record | scores).items() if value is not None}
        return {
            **known,
            **{f"{_SECONDS}{part}": seconds for part, seconds in self._seconds.items()},
            EPOCHS: done.state.epoch,
            BEST_EPOCH: done.state.best_epoch,
            FINISHED: done.finished,
            "done": done.finished,
            "should_checkpoint": time.monotonic() - self._saved_at > self.job.checkpoint_every_s,
        }

    def _score(self, metric: str, best: Mapping[str, Any]) -> Any:
        if metric != console.INFERENCE_ROW_S:
            return best[metric]
        if self._inference_row_s is None:
            self._inference_row_s = self.group.first.inference_row_s()
        return self._inference_row_s

    def _add_seconds(self, done: EpochResult) -> None:
        record = done.record
        waited, saved = record[console.DATA_WAIT_S], record[console.CHECKPOINT_S]
        steps_s = record[console.EPOCH_S] - waited - saved - done.first_step_s
        self._seconds["start"] += done.build_s + done.first_step_s
        self._seconds["data"] += waited
        self._seconds["compute"] += max(steps_s, 0.0)
        self._seconds["validation"] += record[console.VALIDATION_S]
        self._seconds["checkpoint"] += saved


def seconds_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Return what a trial spent on each of `PARTS`, by its last result."""
    return {part: float(result.get(f"{_SECONDS}{part}", 0.0)) for part in PARTS}


def _failure(error: Exception) -> dict[str, Any]:
    # Another process's comes wrapped, with that one's traceback.
    error = getattr(error, "cause", None) or error
    return {"done": True, ERROR: f"{type(error).__name__}: {error}"}


def _fail(text: str) -> None:
    raise OSError(text)
