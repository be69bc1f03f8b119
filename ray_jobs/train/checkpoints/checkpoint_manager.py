"""Writes the checkpoints of a run in the background, and finds the newest complete one.

    checkpoints/steps/00000120/   after step 120; the latest few
    checkpoints/best/00003/       models of the best epochs, by index

A local folder is renamed into place when it is complete; in an object store, the state is uploaded
last. Therefore, files that a killed writer left behind never count as a checkpoint. Checkpoints
that are damaged later are skipped.
"""

import logging
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ray_jobs.storage.atomic_write import PARTIAL, atomic_write
from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint import (
    STATE,
    Checkpoint,
    DamagedCheckpointError,
    LoopState,
    read_best,
    read_checkpoint,
    write_best,
    write_checkpoint,
)

STEPS = "checkpoints/steps"
BEST = "checkpoints/best"

T = TypeVar("T")

logger = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints of one run. One process writes, any process reads.

    Args:
        run: The run folder.
        keep: How many of the newest checkpoints to keep.
        warn: Receives a message if something could not be written.
    """

    def __init__(
        self, run: Folder, keep: int = 2, warn: Callable[[str], None] = logger.warning
    ) -> None:
        self.run, self.keep, self.warn = run, keep, warn
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._latest: Checkpoint | None = None
        self.written = 0
        """Step of the latest checkpoint that was written or loaded."""
        self._best: set[int] = set()
        """Epochs whose models are known to be complete."""

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint in the background, after waiting for the previous one.

        If writing fails, `warn` is called and training continues; a later failure of the run then
        costs the steps since the previous checkpoint.
        """
        self.wait()
        # Without the best epochs, which are not overwritten and would stay in memory too long.
        self._latest = replace(checkpoint, best={}, local={})
        self._writing = self._writer.submit(self._save, checkpoint)

    def spare(self) -> Checkpoint | None:
        """Return the last checkpoint, if it is written, to reuse its memory; only once."""
        if self._writing is None or not self._writing.done():
            return None
        spare, self._latest = self._latest, None
        return spare

    def wait(self) -> None:
        """Wait for the background write."""
        if self._writing is not None:
            self._writing.result()

    def close(self) -> None:
        """Wait for the background write, stop the thread and free the memory."""
        self.wait()
        self._writer.shutdown()
        self._latest = None

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints in order, including damaged ones."""
        return _steps_with_state(self.run.names(STEPS))

    def load(self, step: int, with_best: bool = True) -> Checkpoint:
        """Return the checkpoint after a step.

        Args:
            step: Number of completed steps.
            with_best: Whether to load the models of the best epochs, too, as the writer must.

        Raises:
            DamagedCheckpointError: If the checkpoint or the model of its best epoch is damaged.
            OSError: If it cannot be read.
        """
        checkpoint = self._read(f"{STEPS}/{step:08d}", read_checkpoint)
        best = checkpoint.state.best_epoch
        stored = _numbers(self.run.names(BEST)) if with_best else []
        # Later epochs are from before the run returned to this checkpoint.
        for epoch in (e for e in stored if e < checkpoint.state.epoch):
            try:
                checkpoint.best[epoch] = self._read(f"{BEST}/{epoch:05d}", read_best)
            except DamagedCheckpointError:
                if epoch == best:
                    raise
        if with_best and best is not None and best not in checkpoint.best:
            raise DamagedCheckpointError(
                f"the checkpoint after step {step} lacks the model of its best epoch {best + 1}"
            )
        self.written, self._best = step, set(checkpoint.best)
        return checkpoint

    def newest(self, with_best: bool = True) -> Checkpoint | None:
        """Return the newest complete checkpoint, if any; skip damaged ones with a warning.

        Raises:
            OSError: If a checkpoint cannot be read; it is not necessarily damaged.
        """
        for step in reversed(self.steps()):
            try:
                return self.load(step, with_best)
            except DamagedCheckpointError as error:
                self.warn(f"skipping a checkpoint: {error}")
        return None

    # -- in the writer's thread -------------------------------------------------------------------

    def _save(self, checkpoint: Checkpoint) -> None:
        step = checkpoint.state.step
        try:
            # First, since a checkpoint is not complete without its best epoch.
            for epoch in checkpoint.best.keys() - self._best:
                best = checkpoint.best[epoch]
                self._write(f"{BEST}/{epoch:05d}", lambda path, best=best: write_best(path, best))
                self._best.add(epoch)
            self._write(f"{STEPS}/{step:08d}", lambda path: write_checkpoint(path, checkpoint))
            self.written = step
        except Exception as error:
            # Remote file systems raise exceptions of many classes.
            self.warn(f"the checkpoint after step {step} could not be written: {error}")
            return
        try:
            self._prune(checkpoint)
        except Exception as error:
            self.warn(f"old checkpoints could not be deleted: {error}")

    def _write(self, name: str, write: Callable[[Path], None]) -> None:
        """Create a folder atomically from the files that `write` puts into a local folder."""
        if self.run.is_local:
            with atomic_write(self.run.locate(name), is_folder=True) as partial:
                write(partial)
            return
        with tempfile.TemporaryDirectory() as path:
            write(Path(path))
            for file in sorted(Path(path).iterdir(), key=lambda file: file.name == STATE):
                self.run.upload(file, f"{name}/{file.name}")

    def _prune(self, checkpoint: Checkpoint) -> None:
        """Delete what is no longer needed after a checkpoint is written."""
        # List each folder once: in an object store, a listing is a network request.
        step_files, best_files = list(self.run.names(STEPS)), list(self.run.names(BEST))
        states = self._states(_steps_with_state(step_files))
        # Later steps are from before the run returned to an earlier checkpoint.
        kept = sorted(step for step in states if step <= checkpoint.state.step)[-self.keep :]
        for step in set(_numbers(step_files)) - set(kept):
            self.run.delete(f"{STEPS}/{step:08d}")
        needed = {*checkpoint.best, *(states[step].best_epoch for step in kept)}
        for epoch in set(_numbers(best_files)) - needed:
            self._best.discard(epoch)
            self.run.delete(f"{BEST}/{epoch:05d}")
        for folder in {name.rpartition("/")[0] for name in (*step_files, *best_files)}:
            if folder.endswith(PARTIAL):
                self.run.delete(folder)

    def _states(self, steps: list[int]) -> dict[int, LoopState]:
        """Return the readable states of checkpoints, by step."""
        states = {}
        for step in steps:
            with suppress(ValueError):
                content = self.run.read_bytes(f"{STEPS}/{step:08d}/{STATE}")
                states[step] = LoopState.model_validate_json(content)
        return states

    def _read(self, name: str, read: Callable[[Path], T]) -> T:
        if self.run.is_local:
            return read(Path(self.run.locate(name)))
        with tempfile.TemporaryDirectory() as path:
            for file in self.run.names(name):
                self.run.download(file, Path(path) / Path(file).name)
            return read(Path(path))


def _numbers(files: Iterable[str]) -> list[int]:
    """Return the numbers in the names of the files' folders, in order."""
    folders = {Path(file).parent.name for file in files}
    return sorted(int(folder) for folder in folders if folder.isdigit())


def _steps_with_state(files: Iterable[str]) -> list[int]:
    """Return the steps whose state, which is written last, is among the files, in order."""
    return _numbers(file for file in files if Path(file).name == STATE)
