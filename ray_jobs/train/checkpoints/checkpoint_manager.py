"""Where the checkpoints of a run lie: written in the background, the newest whole one read back.

    checkpoints/steps/00000120/   after step 120: the latest few
    checkpoints/best/00003/       models of the best epochs, by their index

A folder gets its name when all of it is on the disk, or in an object store its state last; so what
a killed writer leaves behind is never taken for a checkpoint. One that was damaged later is passed
over for the one before.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

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
_PARTIAL = ".partial"

T = TypeVar("T")

logger = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints of one run; one process writes, any may read.

    Args:
        run: folder of the run.
        keep: latest checkpoints that are kept.
        warn: told what could not be written, and why.
    """

    def __init__(
        self, run: Folder, keep: int = 2, warn: Callable[[str], None] | None = None
    ) -> None:
        self.run, self.keep = run, keep
        self.warn = warn or logger.warning
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._latest: Checkpoint | None = None
        self.written = 0
        """Step of the latest checkpoint that is written, or was gone on from."""
        self._best: set[int] = set()
        """Epochs whose models are known to be there, whole."""

    def save(self, saved: Checkpoint) -> None:
        """Write a checkpoint in the background, once the one before is written.

        A checkpoint that cannot be written costs the run nothing but the steps since the one before
        in case it fails: training goes on, `warn` is told, and the next one is tried as usual.
        """
        self.wait()
        # Best epochs are not for overwriting, and would be kept longer than they are needed.
        self._latest = replace(saved, best={}, local={})
        self._writing = self._writer.submit(self._save, saved)

    def spare(self) -> Checkpoint | None:
        """Give away what was saved last, if it is written by now, for another copy to overwrite.

        To have it at hand the store keeps model and optimizer of the last checkpoint in memory.
        """
        if self._writing is None or not self._writing.done():
            return None
        spare, self._latest = self._latest, None
        return spare

    def wait(self) -> None:
        """Wait until what was saved is written, or could not be."""
        if self._writing is not None:
            self._writing.result()

    def close(self) -> None:
        """Wait, end the thread, and let go of what was saved last."""
        self.wait()
        self._writer.shutdown()
        self._latest = None

    def steps(self) -> list[int]:
        """Return the steps of which there is a checkpoint, perhaps damaged since, in order."""
        return _whole_steps(self.run.names(STEPS))

    def load(self, step: int, with_best: bool = True) -> Checkpoint:
        """Return the checkpoint after a step.

        Args:
            step: of it.
            with_best: whether with the models of the best epochs, which only whoever writes needs.

        Raises:
            DamagedCheckpointError: if it, or the model of its best epoch, is not whole.
            OSError: if it cannot be read.
        """
        saved = self._read(f"{STEPS}/{step:08d}", read_checkpoint)
        best = saved.state.best_epoch
        # Those of later epochs are of a future that this checkpoint knows nothing of.
        there = _numbers(self.run.names(BEST)) if with_best else []
        for epoch in (e for e in there if e < saved.state.epoch):
            try:
                saved.best[epoch] = self._read(f"{BEST}/{epoch:05d}", read_best)
            except DamagedCheckpointError:
                if epoch == best:
                    raise
        if with_best and best is not None and best not in saved.best:
            raise DamagedCheckpointError(
                f"the checkpoint after step {step} lacks its best epoch {best + 1}"
            )
        self.written, self._best = step, set(saved.best)
        return saved

    def newest(self, with_best: bool = True) -> Checkpoint | None:
        """Return the newest checkpoint that is whole, if there is any.

        Raises:
            OSError: if one cannot be read, which says nothing about whether it is whole.
        """
        for step in reversed(self.steps()):
            try:
                return self.load(step, with_best)
            except DamagedCheckpointError as error:
                self.warn(f"{error}; it is passed over")
        return None

    # -- in the writer's thread -------------------------------------------------------------------

    def _save(self, saved: Checkpoint) -> None:
        step = saved.state.step
        try:
            # First, since a checkpoint without its best epoch is none.
            for epoch in saved.best.keys() - self._best:
                best = saved.best[epoch]
                self._write(f"{BEST}/{epoch:05d}", lambda path, best=best: write_best(path, best))
                self._best.add(epoch)
            self._write(f"{STEPS}/{step:08d}", lambda path: write_checkpoint(path, saved))
            self.written = step
        except Exception as error:
            # Of any class: a disk's, or a remote file system's.
            self.warn(f"the checkpoint after step {step} could not be written: {error}")
            return
        try:
            self._prune(saved)
        except Exception as error:
            self.warn(f"checkpoints that are not needed could not be deleted: {error}")

    def _write(self, name: str, write: Callable[[Path], None]) -> None:
        """Make a folder, there whole or not at all, of what `write` puts into a local one."""
        if not self.run.is_local:
            with tempfile.TemporaryDirectory() as path:
                write(Path(path))
                for file in sorted(Path(path).iterdir(), key=lambda file: file.name == STATE):
                    self.run.upload(file, f"{name}/{file.name}")
            return
        target = Path(self.run.locate(name))
        partial = target.with_name(f"{target.name}{_PARTIAL}")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write(partial)
            # Left by a run that went on from an earlier one, this one being damaged.
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
        except OSError:
            # At once: what is left of it may be what fills the disk.
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _prune(self, saved: Checkpoint) -> None:
        """Delete what is no longer needed, now that a checkpoint is written."""
        # Listed once: of an object store every list is a question over the network.
        of_steps, of_best = list(self.run.names(STEPS)), list(self.run.names(BEST))
        states = self._states(_whole_steps(of_steps))
        past = sorted(step for step in states if step <= saved.state.step)[-self.keep :]
        # Later ones are of a future that this run came back from.
        for step in set(_numbers(of_steps)) - set(past):
            self.run.delete(f"{STEPS}/{step:08d}")
        needed = {*saved.best, *(states[step].best_epoch for step in past)}
        for epoch in set(_numbers(of_best)) - needed:
            self._best.discard(epoch)
            self.run.delete(f"{BEST}/{epoch:05d}")
        for folder in {name.rpartition("/")[0] for name in (*of_steps, *of_best)}:
            if folder.endswith(_PARTIAL):
                self.run.delete(folder)

    def _states(self, steps: list[int]) -> dict[int, LoopState]:
        """Return the states of checkpoints that have one that can be read, by step."""
        found = {}
        for step in steps:
            with suppress(ValueError):
                content = self.run.read_bytes(f"{STEPS}/{step:08d}/{STATE}")
                found[step] = LoopState.model_validate_json(content)
        return found

    def _read(self, name: str, read: Callable[[Path], T]) -> T:
        if self.run.is_local:
            return read(Path(self.run.locate(name)))
        with tempfile.TemporaryDirectory() as path:
            for file in self.run.names(name):
                self.run.download(file, Path(path) / Path(file).name)
            return read(Path(path))


def _numbers(files: Iterable[str]) -> list[int]:
    """Return the numbers that the folders of files are named by, in order."""
    folders = {Path(file).parent.name for file in files}
    return sorted(int(folder) for folder in folders if folder.isdigit())


def _whole_steps(files: Iterable[str]) -> list[int]:
    """Return the steps whose state, which is written last, is among files, in order."""
    return _numbers(file for file in files if Path(file).name == STATE)
