"""Copies a worker's model and optimizer into a checkpoint, and restores them from one.

Shapes: R replicas of all workers, S values that differ between replicas.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mm_model.compat_keras import batch_norm_statistics
from ray_jobs.cluster.strategy import Replicas
from ray_jobs.train.checkpoints.checkpoint import (
    Arrays,
    BestCheckpoint,
    Checkpoint,
    LoopState,
    array_name,
    assign,
)
from ray_jobs.train.train_step import TrainStep

_LOSS_AND_STATISTICS = "loss_and_statistics"


class Copier:
    """Copies the variables of this worker's first replica, repeatedly."""

    def __init__(self, variables: Sequence[keras.Variable], replicas: Replicas) -> None:
        self._variables: dict[str, Any] = {
            array_name(i, variable): replicas.results(variable.value)[0]
            for i, variable in enumerate(variables)
        }

    def __call__(self, into: Arrays | None = None) -> Arrays:
        """Return a copy of every variable; no training step may run in the meantime.

        Args:
            into: Earlier copy to overwrite and return: allocating memory takes four times as long.
        """
        if into is None:
            variables = self._variables.items()
            into = {name: np.empty(v.shape, v.dtype.as_numpy_dtype) for name, v in variables}
        for name, variable in self._variables.items():
            # The fastest way to read a variable: training waits while thousands are read.
            value = tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)
            np.copyto(into[name], value)
        return into


class Snapshots:
    """Takes checkpoints of a model and its training step, and restores them."""

    def __init__(self, model: keras.Model, train_step: TrainStep, replicas: Replicas) -> None:
        self.model, self.train_step, self.replicas = model, train_step, replicas
        self.statistics = batch_norm_statistics(model)
        """Statistics of batch norms, which each replica updates from its own rows."""
        self.copy_model = Copier(model.variables, replicas)
        self.copy_optimizer = Copier(train_step.variables, replicas)

    def gather(self, loss_sum: np.float32) -> Arrays:
        """Exchange and return the values that differ between replicas within an epoch.

        Args:
            loss_sum: This worker's part of the sum of the epoch's losses so far.
        """
        rows = self.replicas.read(self.statistics)
        losses = [loss_sum] + [np.float32(0)] * (len(rows) - 1)
        own = [np.append(loss, row) for loss, row in zip(losses, rows, strict=True)]
        return {_LOSS_AND_STATISTICS: self.replicas.gather(own)}

    def take(
        self,
        state: LoopState,
        local: Arrays,
        best: dict[int, BestCheckpoint],
        spare: Checkpoint | None = None,
    ) -> Checkpoint:
        """Return a checkpoint; reuse the memory of `spare`, an earlier checkpoint, if given."""
        model = self.copy_model(spare and spare.model)
        optimizer = self.copy_optimizer(spare and spare.optimizer)
        return Checkpoint(state, model, optimizer, local, dict(best))

    def restore(self, checkpoint: Checkpoint) -> np.float32:
        """Restore a checkpoint; return this worker's part of the sum of the epoch's losses."""
        assign(self.model.variables, checkpoint.model, "model weights")
        assign(self.train_step.variables, checkpoint.optimizer, "optimizer weights")
        if not checkpoint.local:
            return np.float32(0)
        rows_RS = checkpoint.local[_LOSS_AND_STATISTICS]
        self.replicas.write(self.statistics, rows_RS[:, 1:])
        if len(rows_RS) == self.replicas.count:
            return self.replicas.local_rows(rows_RS)[:, 0].sum()
        return np.float32(rows_RS[:, 0].sum() / self.replicas.context.num_workers)
