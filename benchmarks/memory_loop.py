"""The training loop fed from memory, and callbacks that time its steps, for benchmarks."""

import json
import time
from collections.abc import Generator
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.arrays import make_arrays
from ray_jobs.data.reader import Batch
from ray_jobs.train.callbacks import Callbacks, ControlRequest, CopyCheckpoint
from ray_jobs.train.checkpoints.checkpoint import Checkpoint
from ray_jobs.train.loop import Loop, Outcome
from ray_jobs.train.telemetry.console import Event


class MemoryFeed:
    """Yields the same few batches again and again, as arrays that lie ready.

    Args:
        arrays: of all rows, in order; a number of global batches.
        global_batch_size: rows of a step.
        rank: of the worker.
        num_workers: that share a step.
    """

    def __init__(
        self, arrays: Batch, global_batch_size: int, rank: int = 0, num_workers: int = 1
    ) -> None:
        self.arrays, self.size = arrays, global_batch_size
        self.share = global_batch_size // num_workers
        self.first = rank * self.share

    def batches(self, start: int = 0, stop: int | None = None) -> Generator[Batch]:
        """Yield this worker's share of the steps `start` to `stop` (exclusive)."""
        num_rows = len(self.arrays["label"])
        for step in range(start, stop) if stop is not None else count(start):
            first = step * self.size % num_rows + self.first
            yield {name: a[first : first + self.share] for name, a in self.arrays.items()}


class MemoryLoop(Loop):
    """A loop that takes its batches from memory, and all else as it is.

    Args:
        num_batches: global batches that lie in memory.
        ...: of `Loop`.
    """

    def __init__(self, *args: Any, num_batches: int, **options: Any) -> None:
        super().__init__(*args, **options)
        size = self.spec.train.global_batch_size
        pixels = self.spec.data.image_size or self.manifest.image.width
        columns = len(self.manifest.numeric_columns)
        self.arrays = make_arrays(num_batches * size, pixels, columns)

    def _feeds(self) -> tuple[Any, Any]:
        size = self.spec.train.global_batch_size
        feed = MemoryFeed(self.arrays, size, self.context.rank, self.context.num_workers)
        return feed, feed


class TimedLoop(MemoryLoop):
    """A loop from memory that stops after some steps and says when each of them ended.

    Args:
        num_steps: to take, fewer than those of an epoch.
        ends: file for when each of rank 0's steps ended, by the clock and by the process's CPU
            seconds, and for the mean loss.
        ...: of `MemoryLoop`.
    """

    def __init__(self, *args: Any, num_steps: int, ends: str, **options: Any) -> None:
        super().__init__(*args, num_batches=num_steps, **options)
        self.num_steps, self.ends = num_steps, ends

    def run(self, callbacks: Callbacks | None = None, saved: Checkpoint | None = None) -> Outcome:
        """Take the steps."""
        timed = _Timed(callbacks or Callbacks())
        outcome = super().run(timed, saved)
        if self.context.rank == 0:
            mean = float(self.loss_sum) * self.context.num_workers / outcome.state.step
            Path(self.ends).write_text(json.dumps({"ends": timed.ends, "loss": mean}))
        return outcome

    def _poll_control(self, step: int, callbacks: Callbacks, clock: Any) -> ControlRequest:
        # Asked as ever, since asking is a part of the step; all ranks are at the same one.
        super()._poll_control(step, callbacks, clock)
        return ControlRequest(stop=step >= self.num_steps)


class _Timed(Callbacks):
    """Hands everything on to other callbacks, but checkpoints."""

    def __init__(self, inner: Callbacks) -> None:
        self.inner = inner
        self.ends: list[tuple[float, float]] = []

    def post(self, event: Event) -> None:
        self.inner.post(event)

    def before_step(self, step: int, num_steps: int) -> None:
        self.inner.before_step(step, num_steps)

    def after_step(self, step: int) -> None:
        self.inner.after_step(step)
        self.ends.append((time.perf_counter(), time.process_time()))

    def alive(self) -> None:
        self.inner.alive()

    def poll_control(self) -> ControlRequest:
        return self.inner.poll_control()

    def measures(self) -> dict[str, Any]:
        return self.inner.measures()

    def on_epoch(self, record: dict[str, Any], copy: CopyCheckpoint) -> None:
        self.inner.on_epoch(record, copy)

    def on_checkpoint(self, step: int, copy: CopyCheckpoint) -> None:
        pass
