"""Writes the history of a run: JSON and Parquet files, TensorBoard logs and an MLflow run.

Input: one record per epoch, on rank 0. Output: `history.jsonl`, `history.parquet` and
`tensorboard/` in the run folder, and, if `run.tracking` is `mlflow`, an MLflow run.

A run that resumes after a failure repeats some epochs. Files are therefore rewritten from the
whole history, so that nothing of an interrupted attempt remains.
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

from ray_jobs.config.spec import RunSpec
from ray_jobs.storage.folder import Folder
from ray_jobs.train.telemetry.history_keys import EPOCH, HISTORY, HISTORY_TABLE
from ray_jobs.train.telemetry.mlflow_logger import MlflowRun, require_mlflow

TENSORBOARD = "tensorboard"

Record = Mapping[str, Any]
"""The numbers of an epoch by the keys of `history_keys`; None for an undefined metric."""

_log = logging.getLogger(__name__)


def require_tracking(spec: RunSpec) -> RunSpec:
    """Check that a run can be tracked, before any worker starts.

    Returns:
        The spec with `run.tracking_uri` resolved, because workers run in another directory without
        the driver's environment. MLflow itself reads credentials from the workers' environment.

    Raises:
        JobError: If a package is missing, or MLflow's store or server does not answer.
    """
    if spec.run.tracking == "none":
        return spec
    return spec.overlay({"run.tracking_uri": require_mlflow(spec)})


class Tracker:
    """Writes the records of a run to all destinations, on rank 0 only.

    As a context manager, it opens the MLflow run at once, and marks it as failed if the block
    raises. The driver uses it without `with`, only to report the end of a run whose workers are
    gone. Tracking errors never end a run; they are passed to `warn`.
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
            self._mlflow.write(())
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.fail(f"{type(error).__name__}: {error}")
        self.close()

    def write(self, history: Sequence[Record]) -> None:
        """Write the new epochs, given all records of the run so far."""
        if self._num_written < len(history):
            self._write_files(history)
        if self._mlflow is not None:
            self._mlflow.write(history)

    def _write_files(self, history: Sequence[Record]) -> None:
        try:
            self.folder.write_text(HISTORY, history_text(history))
            self.folder.write_parquet(HISTORY_TABLE, _table(history))
            self._board = self._board or TensorBoard(self.folder)
            self._board.write(history)
            self._num_written = len(history)
        except Exception as error:
            # Disks, TensorFlow and remote file systems can raise errors of any class. The next
            # epoch writes the missing records, and a new TensorBoard log.
            self.close()
            self._warn(f"could not write the history: {error}")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Report that the run finished and that its model and summary are in the run folder."""
        if self._mlflow is not None:
            self._mlflow.finish(summary)

    def fail(self, error: str) -> None:
        """Report that the run failed."""
        if self._mlflow is not None:
            self._mlflow.end("FAILED", error)

    def stop(self) -> None:
        """Report that the user stopped the run."""
        if self._mlflow is not None:
            self._mlflow.end("KILLED")

    def close(self) -> None:
        """Close the TensorBoard log."""
        if self._board is not None:
            # Every epoch was already flushed, and errors were reported then.
            with suppress(Exception):
                self._board.close()
            self._board = None


class TensorBoard:
    """Writes the numbers of each epoch for TensorBoard; replaces the log of earlier attempts.

    If the run folder is remote, the log is uploaded after each epoch.
    """

    def __init__(self, folder: Folder) -> None:
        import tensorflow as tf

        self.folder = folder
        # The traces of the profiler are kept.
        for name in list(folder.names(TENSORBOARD)):
            if Path(name).name.startswith("events.out"):
                folder.delete(name)
        # Created last, so that an error above leaves no temporary folder.
        self._copy = None if folder.is_local else tempfile.mkdtemp(prefix="tensorboard-")
        self._writer = tf.summary.create_file_writer(
            self._copy or folder.locate(TENSORBOARD), filename_suffix=".epochs"
        )
        self._added = 0

    def write(self, history: Sequence[Record]) -> None:
        """Write the new epochs of a history."""
        import tensorflow as tf

        for record in history[self._added :]:
            with self._writer.as_default(step=record[EPOCH]):
                for key, value in record.items():
                    if isinstance(value, float):
                        tf.summary.scalar(key, value)
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


def history_text(history: Sequence[Record]) -> str:
    """Return records as JSON lines, with null for numbers that are not finite."""
    finite = [
        {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        for record in history
    ]
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in finite)


def _table(history: Sequence[Record]) -> pa.Table:
    """Return records as a Parquet table with a column per key, and null for missing numbers."""
    columns: dict[str, pa.Array] = {}
    for key in dict.fromkeys(key for record in history for key in record):
        column = pa.array([record.get(key) for record in history])
        # A metric that is always undefined still gets a numeric type.
        columns[key] = column.cast(pa.float64()) if pa.types.is_null(column.type) else column
    return pa.table(columns)
