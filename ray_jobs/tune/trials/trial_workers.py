"""Runs the worker processes of a trial, which train one trial after another.

A process imports TensorFlow and creates the strategy once; each trial adds only the time to build
its model and graph. The first worker runs in the trial's own process, the others in actors in the
trial's placement group, so all of them end with the trial.
"""

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import ray

from ray_jobs.cluster.hang_watchdog import Watchdog
from ray_jobs.cluster.worker_group import GroupWorker, start_workers
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.batch import INPUT_TYPES
from ray_jobs.data.loader import feed_options
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.callbacks import Callbacks
from ray_jobs.train.job import run_folder

if TYPE_CHECKING:
    from ray_jobs.train.checkpoints.checkpoint import Checkpoint, LoopState

_ERROR_TIMEOUT_S = 10.0
"""An error that all workers share reaches each of them within this time."""
_INFERENCE_CALLS = 5
_MAX_LOOPS = 8
_MAX_PARAMETERS = 10_000_000
"""Maximum total of the parameters of the models whose graphs are kept for reuse."""


class TrialWorker(GroupWorker):
    """One process of a trial.

    Args:
        rank: Index of this process.
        num_workers: Number of processes of the trial.
    """

    def __init__(self, rank: int, num_workers: int) -> None:
        super().__init__(rank, num_workers)
        self._loops: list[Any] = []
        """Loops of recent trials, the latest last, whose graphs later trials can reuse."""
        self._active: list[tuple[Any, Any]] = []
        """Loop and epochs of each model of the current trial."""
        self.callbacks = _TrialCallbacks()
        self._build_s = self._hang_timeout_s = 0.0

    def start_trial(
        self,
        specs: Sequence[RunSpec],
        feeding: Mapping[str, Any],
        reuse: bool,
        addresses: Sequence[str],
        saved: Sequence["Checkpoint | None"],
    ) -> None:
        """Build the models of a trial; the first trial also starts TensorFlow.

        Args:
            specs: The spec of each model, whose run folder has its manifest.
            feeding: `decode`, `cache` and `index`, as for a training run.
            reuse: Whether trials of the same data reuse graphs; such a trial cannot be finalized.
            addresses: Addresses of all workers.
            saved: For each model, the checkpoint to continue from, or None.
        """
        self.end_trial()
        started = time.monotonic()
        if self.strategy is None:
            # All trials share one: TensorFlow would mix up the collectives of two strategies.
            self.start_tensorflow(addresses, specs[0].train)
        self.callbacks = _TrialCallbacks()
        for spec, checkpoint in zip(specs, saved, strict=True):
            loop = self._loop_of(spec, feeding, reuse)
            self._active.append((loop, loop.epochs(self.callbacks, checkpoint)))
        self._build_s = time.monotonic() - started
        self._hang_timeout_s = specs[0].train.hang_timeout_s

    def _loop_of(self, spec: RunSpec, feeding: Mapping[str, Any], reuse: bool) -> Any:
        """Return a loop for a model: an earlier one with the same data and graph, or a new one."""
        from ray_jobs.cluster.strategy import WorkerContext
        from ray_jobs.train.loop import Loop

        manifest = read_manifest(run_folder(spec))
        active = [loop for loop, _ in self._active]
        free = [loop for loop in self._loops if loop not in active and loop.manifest == manifest]
        loop = next((loop for loop in free if loop.reuse_for(spec)), None)
        if loop is None:
            self._evict_loops()
            options = feed_options(spec, manifest, feeding)
            context = WorkerContext(self.rank, self.num_workers)
            loop = Loop(spec, manifest, context, self.strategy, options, tunable=reuse)
        if reuse:
            self._loops = [other for other in self._loops if other is not loop] + [loop]
        return loop

    def train_epoch(self, model: int = 0) -> "LoopState":
        """Train an epoch of a model, given its index."""
        with closing(Watchdog(self._hang_timeout_s, _report_hang)) as watchdog:
            self.callbacks.watchdog = watchdog
            return next(self._active[model][1])

    def take_start_seconds(self) -> tuple[float, float]:
        """Return the seconds to build the model and to take the first step; 0 in later calls."""
        seconds = self._build_s, self.callbacks.first_step_s or 0.0
        self._build_s = self.callbacks.first_step_s = 0.0
        return seconds

    def take_checkpoint(self, state: "LoopState", model: int = 0) -> "Checkpoint":
        """Return a checkpoint of the last epoch of a model, given its index."""
        loop, _ = self._active[model]
        return loop.snapshots.take(state, {}, loop.best)

    def finalize(self, state: "LoopState", folder: Folder, train_s: float) -> None:
        """Write the final model of a finished trial to its run folder."""
        from ray_jobs.train.finalize import finalize

        finalize(self._active[0][0], state, folder, train_s)

    def measure_inference_row_s(self) -> float:
        """Return the seconds of inference per row, in batches of the size of a training step."""
        loop, _ = self._active[0]
        inputs = loop.model.network.input
        rows = loop.spec.train.global_batch_size // self.num_workers
        batch = {n: np.zeros((rows, *t.shape[1:]), INPUT_TYPES[n]) for n, t in inputs.items()}
        seconds = []
        for _ in range(_INFERENCE_CALLS + 1):
            started = time.monotonic()
            loop.evaluate_step(batch).numpy()
            seconds.append(time.monotonic() - started)
        # The first call traces the graph.
        return median(seconds[1:]) / rows

    def end_trial(self) -> None:
        """End the trial; keep its graphs for later trials."""
        for _, epochs in self._active:
            epochs.close()
        self._active = []

    def _evict_loops(self) -> None:
        """Delete the oldest loops while there are too many, or their models are too large.

        The latest loops are those of the current trial, which are kept.
        """
        while len(self._loops) > len(self._active) and (
            len(self._loops) >= _MAX_LOOPS
            or sum(loop.model.count_params() for loop in self._loops) > _MAX_PARAMETERS
        ):
            del self._loops[0]
            gc.collect()


class TrialWorkerGroup:
    """Controls all workers of a trial from the first one, which runs in this process.

    Args:
        on_abort: Receives the error of a worker before this process exits because of it.
    """

    def __init__(self, on_abort: Callable[[Exception], None]) -> None:
        self.on_abort = on_abort
        placement: Any = ray.util.get_current_placement_group()
        num_workers = len(placement.bundle_specs) if placement else 1
        self.local = TrialWorker(0, num_workers)
        self.remote = start_workers(TrialWorker, placement, first_rank=1) if placement else []
        self.addresses: list[str] = []

    def start_trial(
        self,
        specs: Sequence[RunSpec],
        feeding: Mapping[str, Any],
        saved: Sequence["Checkpoint | None"],
        reuse: bool = True,
    ) -> None:
        """Build the models of a trial on every worker; see `TrialWorker.start_trial`."""
        if not self.addresses:
            others = ray.get([worker.address.remote() for worker in self.remote])
            self.addresses = [self.local.address(), *others]
        # Only the local worker writes checkpoints, so only it needs the best epochs' models.
        stripped: Any = [c and replace(c, best={}) for c in saved]
        if self.remote and any(saved):
            stripped = ray.put(stripped)
        arguments = specs, feeding, reuse, self.addresses
        with self._together([w.start_trial.remote(*arguments, stripped) for w in self.remote]):
            self.local.start_trial(*arguments, saved)

    def train_epoch(self, model: int = 0) -> "LoopState":
        """Train an epoch of a model on every worker, and return the state of the local one."""
        with self._together([worker.train_epoch.remote(model) for worker in self.remote]):
            return self.local.train_epoch(model)

    def end_trial(self) -> None:
        """End the trial on every worker."""
        with self._together([worker.end_trial.remote() for worker in self.remote]):
            self.local.end_trial()

    def close(self) -> None:
        """End the other processes."""
        for worker in self.remote:
            ray.kill(worker)
        self.remote = []

    @contextmanager
    def _together(self, calls: Sequence[Any]) -> Iterator[None]:
        """Run the body while the other workers run `calls`, and raise the error of any of them.

        If one worker fails alone, the others wait for it forever in a collective that cannot be
        interrupted. This process then exits, and Tune restarts the trial from its checkpoint.
        """
        if not calls:
            yield
            return
        done = threading.Event()
        raised: list[Exception] = []

        def watch() -> None:
            try:
                ray.get(list(calls))
            except Exception as error:
                raised.append(error)
                if not done.wait(_ERROR_TIMEOUT_S):
                    self._abort(error)

        watcher = threading.Thread(target=watch, name="remote-workers", daemon=True)
        watcher.start()
        try:
            yield
        except Exception as error:
            done.set()
            watcher.join(_ERROR_TIMEOUT_S)
            if watcher.is_alive():
                self._abort(error)
            raise
        done.set()
        watcher.join()
        if raised:
            raise raised[0]

    def _abort(self, error: Exception) -> NoReturn:
        print(f"a worker of this trial failed: {error}", file=sys.stderr, flush=True)
        try:
            self.on_abort(error)
        finally:
            os._exit(1)


class _TrialCallbacks(Callbacks):
    """Feeds the watchdog and measures the first step."""

    def __init__(self) -> None:
        self.watchdog: Watchdog | None = None
        self._started: float | None = None
        self.first_step_s: float | None = None

    def alive(self) -> None:
        if self.watchdog is not None:
            self.watchdog.alive()

    def before_step(self, step: int, num_steps: int) -> None:
        if self._started is None:
            self._started = time.monotonic()

    def after_step(self, step: int) -> None:
        self.alive()
        if self.first_step_s is None and self._started is not None:
            self.first_step_s = time.monotonic() - self._started


def _report_hang(silent_s: float) -> None:
    text = (
        f"this worker of a trial made no progress for {silent_s:.0f} s and is restarted; if its "
        "first step takes longer, increase train.hang_timeout_s"
    )
    print(text, file=sys.stderr, flush=True)
