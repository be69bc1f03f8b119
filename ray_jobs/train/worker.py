"""What a Ray worker of the training does around the loop: start, checkpoints, reports, its end.

Runs in the worker's process, which imports TensorFlow here and not before. Rank 0 alone writes to
the run folder.
"""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from ray_jobs.cluster.watchdog import Watchdog
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.callbacks import Callbacks, ControlRequest, CopyCheckpoint
from ray_jobs.train.checkpoints.checkpoint import Checkpoint
from ray_jobs.train.checkpoints.checkpoint_manager import CheckpointManager
from ray_jobs.train.coordinator import StopRequest, report_failure
from ray_jobs.train.telemetry import console
from ray_jobs.train.telemetry.console import Event
from ray_jobs.train.telemetry.history import Tracker
from ray_jobs.train.telemetry.profiler import Profiler
from ray_jobs.train.telemetry.system_metrics import Sampler, measure

if TYPE_CHECKING:
    from ray_jobs.data.loader import FeedOptions
    from ray_jobs.data.manifest import Manifest
    from ray_jobs.train.loop import Loop

_PREEMPTION_EVERY = 5
"""Questions of the loop between two looks for a node that is about to go; each is a barrier."""
_NOT_TRIED_AGAIN = (
    JobError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)
"""Errors that come again as often as one tries: in the data, the settings or the program."""
_OF_THE_PROGRAM = ("InvalidArgumentError", "ResourceExhaustedError", "UnimplementedError")
"""Those of TensorFlow, by their names, since it is imported later."""
_OF_THE_OTHERS = ("AbortedError", "CancelledError", "DeadlineExceededError", "UnavailableError")
"""Those of TensorFlow that a collective ends in whose cause lies on another worker."""


def train_on_worker(config: dict[str, Any]) -> None:
    """Train on one Ray worker.

    Args:
        config: `spec`, of this attempt; `run`, the folder's URI; `coordinator` for progress;
            `decode`, `cache` and `index` of the feed; `began`, when the attempt started; and
            `ray_s`, how long the connection to Ray took before.
    """
    import ray.train

    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    with _failures_told(config["coordinator"], rank), ThreadPoolExecutor(1) as beside:
        # Reading the checkpoint takes seconds that the imports and the build take, too.
        worker = _Worker(config, rank, beside)
        with worker.part(console.STARTUP_IMPORTS_S):
            from ray_jobs.cluster.strategy import WorkerContext, set_devices
            from ray_jobs.train.loop import Loop
        train = worker.spec.train
        set_devices(train.cpus_per_worker, train.use_gpu, train.deterministic)
        with worker.part(console.STARTUP_BUILD_S):
            manifest = read_manifest(worker.run)
            feeding = worker.feeding(manifest)
            loop = Loop(worker.spec, manifest, WorkerContext(rank, num_workers), feeding=feeding)
        worker.train(loop)


class _Worker(Callbacks):
    """One worker's share of an attempt."""

    def __init__(self, config: dict[str, Any], rank: int, beside: ThreadPoolExecutor) -> None:
        self.config, self.rank, self.first = config, rank, rank == 0
        self.spec = RunSpec.model_validate(config["spec"])
        self.coordinator, self.run = config["coordinator"], Folder(config["run"])
        train = self.spec.train
        self.watchdog = Watchdog(train.hang_timeout_s, self._tell_hang)
        self.store = CheckpointManager(self.run, train.keep_checkpoints, self._note)
        self._newest = beside.submit(self.store.newest, with_best=self.first)
        # By the clocks of two machines, whose difference is in it.
        self.startup = {
            console.STARTUP_RAY_S: config["ray_s"],
            console.STARTUP_WORKERS_S: time.time() - config["began"],
        }
        """Seconds that each part of the start took."""
        self.step: int | None = None
        """Steps done, once one is."""
        self._stop = StopRequest(self.coordinator)
        self._questions = 0
        self._saved_for_preemption = False

    # -- start ------------------------------------------------------------------------------------

    @contextmanager
    def part(self, key: str) -> Iterator[None]:
        """Measure a part of the start."""
        started = time.monotonic()
        yield
        self.startup[key] = time.monotonic() - started

    def feeding(self, manifest: "Manifest") -> "FeedOptions":
        """Return how rows are fed."""
        from ray_jobs.data.cache import open_cache
        from ray_jobs.data.loader import FeedOptions

        config, spec = self.config, self.spec
        self.cache = open_cache(config["cache"], manifest, spec.data.image_size, config["index"])
        return FeedOptions(
            data=spec.data,
            decode=config["decode"],
            threads=max(math.ceil(spec.train.cpus_per_worker), 1),
            cache=self.cache,
        )

    def _agreed_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint that rank 0 found to be the newest whole one."""
        from ray.train.collective import broadcast_from_rank_zero

        newest = self._newest.result()
        del self._newest  # As large as three models.
        found = None if newest is None else newest.state.step
        step = broadcast_from_rank_zero(found)
        if step is None:
            return None
        if newest is None or found != step:
            # Not as this rank has it: its view of a shared disk may be an old one.
            newest = self.store.load(step, with_best=False)
        self._note(f"going on after step {step}, in epoch {newest.state.epoch + 1}")
        return newest

    # -- training ---------------------------------------------------------------------------------

    def train(self, loop: "Loop") -> None:
        """Train from the newest checkpoint on, and finish the run."""
        # In a list, from which the loop takes it: three times the weights need not stay in memory.
        with self.part(console.STARTUP_CHECKPOINT_S):
            saved = [self._agreed_checkpoint()]
        self.watchdog.alive()
        self.began = time.monotonic()
        profile = self.spec.run.profile_steps if self.first else None
        self.sampler = Sampler(self.spec.train.use_gpu) if self.first else None
        self.tracker = Tracker(self.run, self.spec, self._note) if self.first else None
        with (
            closing(self.watchdog),
            closing(self.sampler) if self.sampler is not None else nullcontext(),
            Profiler(self.run, profile, self._note) as self.profiler,
            self.tracker or nullcontext(),
        ):
            outcome = loop.run(self, saved.pop())
            if self.cache is not None:
                self.cache.close()
            self.store.close()
            if not outcome.finished:
                self._note(_stopped_text(outcome.state.step, self.store.written))
            elif self.tracker is not None and outcome.best is not None:
                from ray_jobs.train.finalize import finish

                self.watchdog.close()
                # What the last epoch, or that of an attempt before this one, could not write.
                self.tracker.write(outcome.state.history)
                self._note("writing the best model, calibrated")
                seconds = time.monotonic() - self.began
                summary = finish(loop, outcome.state, outcome.best, self.run, seconds)
                self.tracker.finish(summary)

    def post(self, event: Event) -> None:
        """Send a progress event, which one rank does for all."""
        if self.first:
            self.coordinator.post.remote(event)

    def _note(self, text: str) -> None:
        self.post({"kind": "note", "text": text})

    def before_step(self, step: int, num_steps: int) -> None:
        """Wait for a checkpoint that is still being written, where a failure would cost more."""
        every = self.spec.train.checkpoint_every_steps
        if self.first and every is not None and step + num_steps > self.store.written + every:
            self.store.wait()
        self.profiler.before(step + 1, num_steps)

    def after_step(self, step: int) -> None:
        """Give signs of life."""
        self.watchdog.alive()
        self.profiler.after(step)
        if self.step is None:
            self.startup[console.STARTUP_FIRST_STEP_S] = time.monotonic() - self.began
            self.post({"kind": "startup", "parts": self.startup})
        self.step = step

    def alive(self) -> None:
        """Give a sign of life."""
        self.watchdog.alive()

    def poll_control(self) -> ControlRequest:
        """Return what the driver asks for, or a node that is about to be taken away."""
        import ray.train

        self._questions += 1
        save = False
        if self._questions % _PREEMPTION_EVERY == 0 and not self._saved_for_preemption:
            save = self._saved_for_preemption = ray.train.get_preemption_info() is not None
        return ControlRequest(save=save, stop=self.first and self._stop())

    def on_checkpoint(self, step: int, copy: CopyCheckpoint) -> None:
        """Write a checkpoint in the background."""
        if self.first:
            self.store.save(copy(self.store.spare()))
            self.post({"kind": "checkpoint", "step": step})

    def measures(self) -> dict[str, Any]:
        """Return what rank 0 used, which stands for all; with the first epoch its start, too."""
        if self.sampler is None:
            return {}
        startup, self.startup = self.startup, {}
        return {**measure(), **self.sampler.take(), **startup}

    def on_epoch(self, record: dict[str, Any], copy: CopyCheckpoint) -> None:
        """Write checkpoint and history, and report to Ray."""
        import ray.train

        if self.tracker is not None:
            saved = copy(self.store.spare())
            self.store.save(saved)
            self.tracker.write(saved.state.history)
        # Every rank reports, since a report waits for all of them.
        ray.train.report(record)
        self.watchdog.alive()

    # -- failures ---------------------------------------------------------------------------------

    def _tell_hang(self, silent_s: float) -> None:
        """Say why this process is about to be ended."""
        where = "in its start" if self.step is None else f"after step {self.step}"
        text = (
            f"nothing happened for {silent_s:.0f} s {where} (train.hang_timeout_s): this worker or "
            "one that it waits for hangs"
        )
        report_failure(
            self.coordinator, {"rank": self.rank, "text": text, "again": True, "of": "hang"}
        )


def _stopped_text(step: int, saved_step: int) -> str:
    if saved_step == step:
        return f"stopped after step {step}, which is saved"
    newest = f"the newest is that after step {saved_step}" if saved_step else "there is none"
    return f"stopped after step {step}, whose checkpoint could not be written; {newest}"


@contextmanager
def _failures_told(coordinator: Any, rank: int) -> Iterator[None]:
    """Tell the driver of an exception, with more words than Ray has."""
    try:
        yield
    except Exception as error:
        text, again = f"{type(error).__name__}: {error}", not is_permanent(error)
        of = "echo" if _is_echo(error) else "own"
        report_failure(coordinator, {"rank": rank, "text": text, "again": again, "of": of})
        raise


def is_permanent(error: Exception) -> bool:
    """Whether an error lies in data, settings or program, and would come as often as one tries."""
    return isinstance(error, _NOT_TRIED_AGAIN) or type(error).__name__ in _OF_THE_PROGRAM


def _is_echo(error: Exception) -> bool:
    """Whether an error is that of a collective or a call whose other side has failed."""
    from ray.exceptions import RayActorError

    of_tensorflow = type(error).__module__.startswith("tensorflow")
    lost = type(error).__name__ in _OF_THE_OTHERS or "ollective" in str(error)
    return isinstance(error, RayActorError) or (of_tensorflow and lost)
