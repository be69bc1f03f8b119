"""Runs the training loop in a Ray worker, with checkpoints, reports and the final model.

TensorFlow is imported here, in the worker's process. Only rank 0 writes to the run folder.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray_jobs.cluster.connection import first_line
from ray_jobs.cluster.hang_watchdog import Watchdog
from ray_jobs.cluster.worker_group import import_keras
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.callbacks import Callbacks, ControlRequest, CopyCheckpoint
from ray_jobs.train.checkpoints.checkpoint import Checkpoint
from ray_jobs.train.checkpoints.checkpoint_manager import CheckpointManager
from ray_jobs.train.coordinator import StopRequest, WorkerFailure, answer
from ray_jobs.train.telemetry import history_keys
from ray_jobs.train.telemetry.console import Event
from ray_jobs.train.telemetry.history import Tracker
from ray_jobs.train.telemetry.profiler import Profiler
from ray_jobs.train.telemetry.system_metrics import UsageSampler, measure_memory

if TYPE_CHECKING:
    from ray_jobs.train.loop import Loop

_POLLS_PER_PREEMPTION_CHECK = 5
"""A check is a barrier, so only every fifth poll of the loop checks for a preemption."""
_PERMANENT = (
    JobError, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError,
    NotImplementedError, TypeError, ValueError,
)  # fmt: skip
"""Errors in the data, the settings or the code, which would recur on a retry."""
_TF_PERMANENT = ("InvalidArgumentError", "ResourceExhaustedError", "UnimplementedError")
"""Permanent errors of TensorFlow, by class name because TensorFlow is not imported yet."""
_TF_SECONDARY = ("AbortedError", "CancelledError", "DeadlineExceededError", "UnavailableError")
"""Errors of a collective whose cause is on another worker."""


def train_on_worker(config: dict[str, Any]) -> None:
    """Train on one Ray worker.

    Args:
        config: `spec`; `run`, the URI of the run folder; `coordinator`; `decode`, `cache` and
            `index` of the feed; `data`, the `RunData` of the attempt; `attempt_start`, a timestamp;
            and `ray_s`, the seconds that it took to connect to Ray.
    """
    import ray.train

    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    with _reporting_failures(config["coordinator"], rank), ThreadPoolExecutor(3) as background:
        # The worker reads the newest checkpoint and its first rows in the background while this
        # thread imports TensorFlow and builds the model.
        worker = _Worker(config, rank, background)
        ahead = background.submit(config["data"].start_reading, background)
        with worker.startup_part(history_keys.STARTUP_IMPORTS_S):
            import_keras()
            from ray_jobs.cluster.strategy import WorkerContext, set_devices
            from ray_jobs.data.loader import feed_options
            from ray_jobs.train.loop import Loop
        train = worker.spec.train
        set_devices(train.cpus_per_worker, train.use_gpu, train.deterministic)
        with worker.startup_part(history_keys.STARTUP_BUILD_S):
            manifest = read_manifest(worker.run)
            options = replace(feed_options(worker.spec, manifest, config), ahead=ahead.result())
            context = WorkerContext(rank, num_workers)
            loop = Loop(worker.spec, manifest, context, feed_options=options)
        worker.train(loop)


class _Worker(Callbacks):
    """One worker's part of an attempt, which is one run of Ray Train (see `supervisor`)."""

    def __init__(self, config: dict[str, Any], rank: int, background: ThreadPoolExecutor) -> None:
        self.rank, self.is_rank_zero = rank, rank == 0
        self.spec = RunSpec.model_validate(config["spec"])
        self.coordinator, self.run = config["coordinator"], Folder(config["run"])
        train = self.spec.train
        self.watchdog = Watchdog(train.hang_timeout_s, self._report_hang)
        self.checkpoints = CheckpointManager(self.run, train.keep_checkpoints, self._note)
        self._newest = background.submit(self.checkpoints.newest, with_best=self.is_rank_zero)
        # STARTUP_WORKERS_S includes the clock difference between the driver's machine and this one.
        self.startup = {
            history_keys.STARTUP_RAY_S: config["ray_s"],
            history_keys.STARTUP_WORKERS_S: time.time() - config["attempt_start"],
        }
        """Seconds of each part of the start-up."""
        self.step: int | None = None
        """Completed steps; None before the first one."""
        self._stop = StopRequest(self.coordinator)
        self._polls = 0
        self._saved_for_preemption = False

    # -- start-up ---------------------------------------------------------------------------------

    @contextmanager
    def startup_part(self, key: str) -> Iterator[None]:
        """Measure a part of the start-up."""
        started = time.monotonic()
        yield
        self.startup[key] = time.monotonic() - started

    def _shared_checkpoint(self) -> Checkpoint | None:
        """Return the newest complete checkpoint that rank 0 found."""
        from ray.train.collective import broadcast_from_rank_zero

        newest = self._newest.result()
        # Otherwise the future would keep the checkpoint in memory, three times the model's size.
        del self._newest
        own_step = None if newest is None else newest.state.step
        step = broadcast_from_rank_zero(own_step)
        if step is None:
            return None
        if newest is None or own_step != step:
            # This rank may see an outdated state of a shared disk.
            newest = self.checkpoints.load(step, with_best=False)
        self._note(f"resuming after step {step}, in epoch {newest.state.epoch + 1}")
        return newest

    # -- training ---------------------------------------------------------------------------------

    def train(self, loop: "Loop") -> None:
        """Resume from the newest checkpoint, train, and finalize the run."""
        # The checkpoint is in a list, which `pop` below empties: `loop.run` then holds the only
        # reference to it and can free it.
        with self.startup_part(history_keys.STARTUP_CHECKPOINT_S):
            checkpoint = [self._shared_checkpoint()]
        self.watchdog.alive()
        self.train_start = time.monotonic()
        profile = self.spec.run.profile_steps if self.is_rank_zero else None
        self.usage = UsageSampler(self.spec.train.use_gpu) if self.is_rank_zero else None
        self.tracker = Tracker(self.run, self.spec, self._note) if self.is_rank_zero else None
        with (
            closing(self.watchdog),
            closing(self.usage) if self.usage is not None else nullcontext(),
            closing(Profiler(self.run, profile, self._note)) as self.profiler,
            self.tracker or nullcontext(),
        ):
            state = loop.run(self, checkpoint.pop())
            if (cache := loop.feed_options.cache) is not None:
                cache.close()
            self.checkpoints.close()
            if not state.is_finished(self.spec.train):
                self._note(_stopped_text(state.step, self.checkpoints.written))
            elif self.tracker is not None:
                from ray_jobs.train.finalize import finalize

                self.watchdog.close()
                # Also writes the records of epochs whose earlier write failed.
                self.tracker.write(state.history)
                self._note("calibrating and writing the best model")
                seconds = time.monotonic() - self.train_start
                summary = finalize(loop, state, self.run, seconds)
                self.tracker.finish(summary)

    def post(self, event: Event) -> None:
        """Send a progress event (rank 0 only)."""
        if self.is_rank_zero:
            self.coordinator.post.remote(event)

    def _note(self, text: str) -> None:
        self.post({"kind": "note", "text": text})

    def before_step(self, step: int, num_steps: int) -> None:
        """Wait until the current checkpoint is written if a failure would cost too many steps."""
        every, end = self.spec.train.checkpoint_every_steps, step + num_steps
        if self.is_rank_zero and every is not None and end > self.checkpoints.written + every:
            self.checkpoints.wait()
        self.profiler.before(step + 1, num_steps)

    def after_step(self, step: int) -> None:
        """Reset the watchdog; after the first step, report the start-up."""
        self.watchdog.alive()
        self.profiler.after(step)
        if self.step is None:
            first_step_s = time.monotonic() - self.train_start
            self.startup[history_keys.STARTUP_FIRST_STEP_S] = first_step_s
            self.post({"kind": "startup", "parts": self.startup})
        self.step = step

    def alive(self) -> None:
        """Reset the watchdog."""
        self.watchdog.alive()

    def poll_control(self) -> ControlRequest:
        """Return the driver's request to stop, or a request to save before a preemption."""
        import ray.train

        self._polls += 1
        save = False
        if self._polls % _POLLS_PER_PREEMPTION_CHECK == 0 and not self._saved_for_preemption:
            save = self._saved_for_preemption = ray.train.get_preemption_info() is not None
            if save:
                text = "a node will be preempted; saving a checkpoint"
                self.post({"kind": "preemption", "text": text})
        return ControlRequest(save=save, stop=self.is_rank_zero and self._stop())

    def on_checkpoint(self, step: int, copy: CopyCheckpoint) -> None:
        """Write a checkpoint in the background (rank 0 only)."""
        if self.is_rank_zero:
            self.checkpoints.save(copy(self.checkpoints.spare()))
            self.post({"kind": "checkpoint", "step": step})

    def measures(self) -> dict[str, Any]:
        """Return the resource usage of rank 0 and, for the first epoch, its start-up times."""
        if self.usage is None:
            return {}
        startup, self.startup = self.startup, {}
        return {**measure_memory(), **self.usage.take(), **startup}

    def on_epoch(self, record: dict[str, Any], copy: CopyCheckpoint) -> None:
        """On rank 0, write the checkpoint and the history; on every rank, report to Ray."""
        import ray.train

        if self.tracker is not None:
            checkpoint = copy(self.checkpoints.spare())
            self.checkpoints.save(checkpoint)
            self.tracker.write(checkpoint.state.history)
        # A report waits for all ranks.
        ray.train.report(record)
        self.watchdog.alive()

    # -- failures ---------------------------------------------------------------------------------

    def _report_hang(self, silent_s: float) -> None:
        """Report the hang to the driver before the watchdog ends this process."""
        where = "during start-up" if self.step is None else f"after step {self.step}"
        text = (
            f"no progress for {silent_s:.0f} s {where} "
            f"(train.hang_timeout_s={self.spec.train.hang_timeout_s:g}): this worker, or a worker "
            "that it is waiting for, is hung; increase train.hang_timeout_s if steps can take this "
            "long"
        )
        failure = WorkerFailure(self.rank, text, kind="hang")
        answer(self.coordinator.report_failure.remote(failure))


def _stopped_text(step: int, saved_step: int) -> str:
    if saved_step == step:
        return f"stopped after step {step}; its checkpoint is saved"
    newest = "there is no earlier checkpoint"
    if saved_step:
        newest = f"the newest checkpoint is from step {saved_step}"
    return f"stopped after step {step}, but its checkpoint could not be written; {newest}"


@contextmanager
def _reporting_failures(coordinator: Any, rank: int) -> Iterator[None]:
    """Report an exception to the driver, in more detail than Ray does."""
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if (cause := getattr(error, "cause", None)) is not None:
            # An error in a task of Ray Data, which appends advice.
            text = f"{type(cause).__name__}: {first_line(cause)}"
        kind = "secondary" if _is_secondary(error) else "error"
        failure = WorkerFailure(rank, text, kind, is_permanent(error))
        answer(coordinator.report_failure.remote(failure))
        raise


def is_permanent(error: Exception) -> bool:
    """Whether an error is in the data, the settings or the code and would recur on a retry."""
    return isinstance(error, _PERMANENT) or type(error).__name__ in _TF_PERMANENT


def _is_secondary(error: Exception) -> bool:
    """Whether an error of a collective or a remote call was caused by another process."""
    from ray.exceptions import RayActorError

    in_collective = type(error).__name__ in _TF_SECONDARY or "ollective" in str(error)
    from_tensorflow = type(error).__module__.startswith("tensorflow")
    return isinstance(error, RayActorError) or (from_tensorflow and in_collective)
