"""Runs the training loop on rows in memory and times its steps."""

import json
import time
from collections.abc import Generator
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.arrays import make_arrays
from ray_jobs.data.batch import TEXT, TEXT_MASK
from ray_jobs.data.decoder import Batch
from ray_jobs.data.text_input import text_reader
from ray_jobs.train.callbacks import Callbacks, ControlRequest
from ray_jobs.train.checkpoints.checkpoint import Checkpoint, LoopState
from ray_jobs.train.loop import Loop


class MemoryFeed:
    """Repeats the same few batches, which are in memory.

    Args:
        arrays: Rows of several global batches.
        global_batch_size: Rows per step.
        rank: Rank of the worker.
        num_workers: Number of workers.
    """

    def __init__(
        self, arrays: Batch, global_batch_size: int, rank: int = 0, num_workers: int = 1
    ) -> None:
        self.arrays, self.size = arrays, global_batch_size
        self.share = global_batch_size // num_workers
        self.first = rank * self.share

    def batches(self, start: int = 0, stop: int | None = None) -> Generator[Batch]:
        """Yield this worker's rows of the steps from `start` to `stop` (exclusive)."""
        num_rows = len(self.arrays["label"])
        for step in range(start, stop) if stop is not None else count(start):
            first = step * self.size % num_rows + self.first
            yield {name: a[first : first + self.share] for name, a in self.arrays.items()}


class MemoryLoop(Loop):
    """A training loop that takes its batches from memory.

    Args:
        *args: Arguments of `Loop`.
        num_batches: Number of global batches in memory.
        **options: Arguments of `Loop`.
    """

    def __init__(self, *args: Any, num_batches: int, **options: Any) -> None:
        super().__init__(*args, **options)
        size = self.spec.train.global_batch_size
        pixels = self.spec.data.image_size or self.manifest.image.width
        columns = len(self.manifest.numeric_columns)
        self.arrays = make_arrays(num_batches * size, pixels, columns)
        if (reader := text_reader(self.spec, self.manifest)) is not None:
            shape = (num_batches * size, *reader.shape)
            ids = np.random.default_rng(0).integers(1, reader.tokenizer.num_tokens, shape)
            self.arrays |= {TEXT: ids.astype(np.int32), TEXT_MASK: np.ones(shape, np.float32)}

    def _feeds(self) -> tuple[Any, Any]:
        size = self.spec.train.global_batch_size
        feed = MemoryFeed(self.arrays, size, self.context.rank, self.context.num_workers)
        return feed, feed


class TimedLoop(MemoryLoop):
    """A loop on rows in memory that stops after some steps and records their times.

    Args:
        *args: Arguments of `Loop`.
        num_steps: Number of steps to take; less than an epoch.
        ends: File for the mean loss and the end of each step of rank 0, in seconds of wall and CPU
            time.
        **options: Arguments of `Loop`.
    """

    def __init__(self, *args: Any, num_steps: int, ends: str, **options: Any) -> None:
        super().__init__(*args, num_batches=num_steps, **options)
        self.num_steps, self.ends = num_steps, ends

    def run(
        self, callbacks: Callbacks | None = None, checkpoint: Checkpoint | None = None
    ) -> LoopState:
        """Take the steps."""
        callbacks, ends = callbacks or Callbacks(), []
        after_step = callbacks.after_step

        def record_end(step: int) -> None:
            after_step(step)
            ends.append((time.perf_counter(), time.process_time()))

        with (
            patch.object(callbacks, "after_step", record_end),
            patch.object(callbacks, "on_checkpoint"),
        ):
            state = super().run(callbacks, checkpoint)
        if self.context.rank == 0:
            mean = float(self.loss_sum) * self.context.num_workers / state.step
            Path(self.ends).write_text(json.dumps({"ends": ends, "loss": mean}))
        return state

    def _poll_control(self, step: int, callbacks: Callbacks, clock: Any) -> ControlRequest:
        # Poll anyway, because polling is part of a step. All ranks stop at the same step.
        super()._poll_control(step, callbacks, clock)
        return ControlRequest(stop=step >= self.num_steps)
