"""What a checkpoint takes out of a worker's model, and how it is put back.

Shapes: R replicas of all workers, S numbers that each of them has for itself.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ray_jobs.cluster.strategy import Replicas
from ray_jobs.train.checkpoints.checkpoint import (
    Arrays,
    BestCheckpoint,
    Checkpoint,
    LoopState,
    assign,
)
from ray_jobs.train.train_step import TrainStep

_OWN = "loss_and_statistics"


class Copier:
    """Copies variables again and again, while no step is taken.

    Args:
        variables: to copy.
        replicas: of this worker; the first one's values are copied.
    """

    def __init__(self, variables: Sequence[keras.Variable], replicas: Replicas) -> None:
        # Keras numbers unnamed layers by process, so the place in the list is what identifies a
        # variable; its path is for people.
        self._variables: dict[str, Any] = {
            f"{i:05d} {variable.path}": replicas.results(variable.value)[0]
            for i, variable in enumerate(variables)
        }

    def __call__(self, into: Arrays | None = None) -> Arrays:
        """Return a copy of every variable.

        Args:
            into: an earlier one, which is overwritten and returned: memory that is new takes four
                times as long.
        """
        if into is None:
            variables = self._variables.items()
            into = {name: np.empty(v.shape, v.dtype.as_numpy_dtype) for name, v in variables}
        for name, variable in self._variables.items():
            # As raw as it can be: a large model has thousands, and its steps wait for this.
            value = tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)
            np.copyto(into[name], value)
        return into


class Snapshots:
    """Takes snapshots of the model and its step, and goes on from one.

    Args:
        model: that is trained.
        stepper: that trains it.
        replicas: of this worker.
    """

    def __init__(self, model: keras.Model, stepper: TrainStep, replicas: Replicas) -> None:
        self.model, self.stepper, self.replicas = model, stepper, replicas
        moving = ("moving_mean", "moving_variance")
        self.statistics = [v for v in model.variables if v.path.endswith(moving)]
        """Of batch norms, which each replica updates from its own rows."""
        self.copy_model = Copier(model.variables, replicas)
        self.copy_optimizer = Copier(stepper.variables, replicas)

    def gather(self, loss_sum: np.float32) -> Arrays:
        """Return what each replica has for itself in the middle of an epoch; an exchange.

        Args:
            loss_sum: this worker's part of the losses of the epoch's steps so far.
        """
        rows = self.replicas.read(self.statistics)
        losses = [loss_sum] + [np.float32(0)] * (len(rows) - 1)
        own = [np.append(loss, row) for loss, row in zip(losses, rows, strict=True)]
        return {_OWN: self.replicas.gather(own)}

    def take(
        self,
        state: LoopState,
        own: Arrays,
        best: dict[int, BestCheckpoint],
        spare: Checkpoint | None = None,
    ) -> Checkpoint:
        """Return a copy of everything; into the memory of `spare`, an earlier one."""
        model = self.copy_model(spare and spare.model)
        optimizer = self.copy_optimizer(spare and spare.optimizer)
        return Checkpoint(state, model, optimizer, own, dict(best))

    def restore(self, saved: Checkpoint) -> np.float32:
        """Go on from a checkpoint; return this worker's part of the epoch's losses so far."""
        assign(self.model.variables, saved.model, "model weights")
        assign(self.stepper.variables, saved.optimizer, "optimizer weights")
        if not saved.local:
            return np.float32(0)
        rows_RS = saved.local[_OWN]
        self.replicas.write(self.statistics, rows_RS[:, 1:])
        if len(rows_RS) == self.replicas.count:
            return self.replicas.own(rows_RS)[:, 0].sum()
        return np.float32(rows_RS[:, 0].sum() / self.replicas.context.num_workers)
