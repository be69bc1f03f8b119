"""Trains one fold after another in a process, and predicts the scored rows of each.

Input: the run folder of a fold, with its spec and manifest. Output: the rest of the run folder, and
rows.parquet with the predictions. A fold that was interrupted continues from its newest checkpoint.
"""

import gc
import sys
import tempfile
import time
from typing import Any

import numpy as np
import pyarrow as pa

from ray_jobs.cluster.connection import first_line
from ray_jobs.config.spec import RunSpec
from ray_jobs.cross_validate.cv_results import THRESHOLD, write_rows
from ray_jobs.data.batch import KEY, LABEL
from ray_jobs.data.manifest import read_manifest
from ray_jobs.data.reader import ShardReader
from ray_jobs.predict.predictor import PROBABILITY
from ray_jobs.predict.trained_run import open_run
from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint_manager import CheckpointManager
from ray_jobs.train.finalize import MODEL
from ray_jobs.train.job import Run, run_folder, shared_feed
from ray_jobs.train.telemetry.history import history_text
from ray_jobs.train.telemetry.history_keys import HISTORY
from ray_jobs.train.worker import is_permanent
from ray_jobs.tune.trials.trial_workers import TrialWorkerGroup

CHECKPOINTS = "checkpoints"
ERROR = "error.txt"
"""File with the permanent error that ended all workers of a fold."""


class FoldWorker:
    """An actor in the placement group of a fold; it starts the fold's other workers."""

    def __init__(self) -> None:
        self.group = TrialWorkerGroup(self._record_error)
        self.folder: Folder | None = None

    def train(self, spec: RunSpec) -> None:
        """Train the model of a fold from its newest checkpoint, and predict the scored rows."""
        folder = self.folder = run_folder(spec)
        folder.delete(ERROR)
        run = Run(spec, read_manifest(folder), folder)
        with shared_feed(run) as feed:
            self._train(run, feed)
        gc.collect()
        _predict_scored_rows(run)

    def _record_error(self, error: Exception) -> None:
        # An error in another process arrives wrapped in a Ray error.
        cause = getattr(error, "cause", None) or error
        if self.folder is not None and is_permanent(cause):
            self.folder.write_text(ERROR, f"{type(cause).__name__}: {first_line(cause)}")

    def _train(self, run: Run, feed: dict[str, Any]) -> None:
        started, train = time.monotonic(), run.spec.train
        checkpoints = CheckpointManager(run.folder, train.keep_checkpoints, _warn)
        self.group.start_trial([run.spec], feed, [checkpoints.newest()], reuse=False)
        while not (state := self.group.train_epoch()).is_finished(train):
            run.folder.write_text(HISTORY, history_text(state.history))
            checkpoints.save(self.group.local.take_checkpoint(state))
        checkpoints.close()
        run.folder.write_text(HISTORY, history_text(state.history))
        self.group.local.finalize(state, run.folder, time.monotonic() - started)
        self.group.end_trial()


def _predict_scored_rows(run: Run) -> None:
    """Write the probability of each scored row, by the saved model."""
    from mm_model import load_model

    with tempfile.TemporaryDirectory() as local:
        model = load_model(run.folder.download(MODEL, f"{local}/model.keras"))
    trained = open_run(run.folder.uri)
    shards = run.manifest.splits["test"].shards
    reader = ShardReader(Folder(run.spec.data.prepared), shards, trained.decoder.columns)
    tables: list[pa.Table] = []
    for shard, info in enumerate(shards):
        for group, num_rows in enumerate(info.row_groups):
            if num_rows:
                (rows,) = reader.read_groups(shard, [group])
                batch = trained.decoder.decode(rows)
                inputs = {name: batch[name] for name in trained.input_shapes}
                probability = np.asarray(model(inputs, training=False))[:, 0].astype(np.float64)
                columns = {PROBABILITY: probability, THRESHOLD: [trained.threshold] * num_rows}
                tables.append(pa.table({n: rows[n] for n in (KEY, LABEL)} | columns))
    write_rows(run.folder, pa.concat_tables(tables))


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
