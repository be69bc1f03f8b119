"""What follows a run outside the terminal: history files, TensorBoard, MLflow.

Enters: a record an epoch, on rank 0.  Leaves: `history.jsonl`, `history.parquet` and `tensorboard/`
in the run folder, and a run in MLflow where `run.tracking` says so.

A run that goes on after a failure trains some epochs again. Files are therefore made from the whole
history each time, so that nothing stays of what an interrupted attempt wrote further.
"""

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.config.spec import RunSpec
from ray_jobs.storage.folder import Folder
from ray_jobs.train.telemetry import console
from ray_jobs.train.telemetry.console import HISTORY, HISTORY_TABLE
from ray_jobs.train.telemetry.mlflow_logger import MlflowRun, require_mlflow

TENSORBOARD = "tensorboard"

Record = Mapping[str, Any]
"""The keys of `console` with what an epoch had for them: numbers, or None."""

_log = logging.getLogger(__name__)


def require_tracking(spec: RunSpec) -> RunSpec:
    """Check that a run can be tracked as its spec says, before any worker is started.

    Returns:
        The spec with the place of tracking in it, which workers do not find out by themselves: they
        run in another directory, without the driver's environment. A server's user name and
        password or token stay where MLflow looks for them, in the environment of the workers.

    Raises:
        JobError: if a package is missing, or MLflow's store or server does not answer.
    """
    if spec.run.tracking == "none":
        return spec
    return spec.overlay({"run.tracking_uri": require_mlflow(spec)})


class Tracker:
    """Fans the records of a run out; on rank 0 alone.

    As a context manager it opens MLflow's run at once, and marks it as failed if the block ends in
    an error. Without `with`, `fail` and `finish` tell MLflow the end of a run whose workers did not
    live to tell.

    Args:
        folder: of the run.
        spec: of the run.
        warn: takes a text for the user when tracking is in trouble, which never ends the run; by
            default logged.
    """

    def __init__(
        self, folder: Folder, spec: RunSpec, warn: Callable[[str], None] = _log.warning
    ) -> None:
        self.folder, self._warn = folder, warn
        self._board: TensorBoard | None = None
        self._num_written = 0
        self._mlflow = MlflowRun(folder, spec, warn) if spec.run.tracking == "mlflow" else None

    def __enter__(self) -> Self:
        if self._mlflow is not None:
            self._mlflow.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.fail(f"{type(error).__name__}: {error}")
        self.close()

    def write(self, history: Sequence[Record]) -> None:
        """Write the epochs that are not written yet.

        Args:
            history: all records of the run so far, in order.
        """
        if self._num_written < len(history):
            self._write_files(history)
        if self._mlflow is not None:
            self._mlflow.write(history)

    def _write_files(self, history: Sequence[Record]) -> None:
        try:
            self.folder.write_text(HISTORY, history_text(history))
            self.folder.write_bytes(HISTORY_TABLE, _parquet(history))
            self._board = self._board or TensorBoard(self.folder)
            self._board.write(history)
            self._num_written = len(history)
        except Exception as error:
            # Of any class: a disk's, TensorFlow's, a remote file system's. The next epoch writes
            # what is missing, and TensorBoard's log anew.
            self.close()
            self._warn(f"the history could not be written: {error}")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Tell that the run is finished, when model and summary are in the run folder."""
        if self._mlflow is not None:
            self._mlflow.finish(summary)

    def fail(self, text: str) -> None:
        """Tell that the run failed, and why."""
        if self._mlflow is not None:
            self._mlflow.fail(text)

    def stop(self) -> None:
        """Tell that its user stopped the run."""
        if self._mlflow is not None:
            self._mlflow.stop()

    def close(self) -> None:
        """Close what is open."""
        if self._board is not None:
            # Every epoch was flushed; a full disk has been warned of then.
            with suppress(Exception):
                self._board.close()
            self._board = None


class TensorBoard:
    """The numbers of each epoch, for TensorBoard, below the run folder.

    Args:
        folder: of the run; a remote one gets a copy after each epoch. What is there of an earlier
            attempt is deleted.
    """

    def __init__(self, folder: Folder) -> None:
        import tensorflow as tf

        self.folder = folder
        # Traces of the profiler are no numbers of epochs, and stay.
        for name in list(folder.names(TENSORBOARD)):
            if Path(name).name.startswith("events.out"):
                folder.delete(name)
        # Last, since nobody would delete it for a log that could not be made.
        self._copy = None if folder.is_local else tempfile.mkdtemp(prefix="tensorboard-")
        self._writer = tf.summary.create_file_writer(
            self._copy or folder.locate(TENSORBOARD), filename_suffix=".epochs"
        )
        self._added = 0

    def write(self, history: Sequence[Record]) -> None:
        """Write the epochs of a history that are not written yet."""
        for record in history[self._added :]:
            self._add(record)
        self._added = len(history)
        self._writer.flush()
        if self._copy:
            self.folder.upload(self._copy, TENSORBOARD)

    def close(self) -> None:
        """Close the log."""
        try:
            self._writer.close()
        finally:
            if self._copy:
                shutil.rmtree(self._copy, ignore_errors=True)

    def _add(self, record: Record) -> None:
        import tensorflow as tf

        with self._writer.as_default(step=record[console.EPOCH]):
            for key, value in record.items():
                if isinstance(value, float):
                    tf.summary.scalar(key, value)


def history_text(history: Sequence[Record]) -> str:
    """Return what history.jsonl holds of some records."""
    return "".join(map(_line, history))


def _line(record: Record) -> str:
    """Return a line of JSON, which has no infinity: null where a number is not finite."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def _parquet(history: Sequence[Record]) -> bytes:
    """Return a table of records: a column a key, null where a record has no number for it."""
    columns: dict[str, pa.Array] = {}
    for key in dict.fromkeys(key for record in history for key in record):
        column = pa.array([record.get(key) for record in history])
        # A metric that no epoch has is a column of numbers all the same.
        columns[key] = column.cast(pa.float64()) if pa.types.is_null(column.type) else column
    stream = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue().to_pybytes()
