"""The replicas of one worker, and the exchange of values with the replicas of other workers.

One worker with one device uses TensorFlow's default strategy, which exchanges and wraps nothing.
Everything else uses a `MultiWorkerMirroredStrategy`, which reads `TF_CONFIG`; so do several devices
of one worker, since a `MirroredStrategy` cannot exchange values in a loop. All workers must call a
method that exchanges values; if one does not, the others hang.

Shapes: R replicas of all workers, S the size of all variables together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf


@dataclass(frozen=True)
class WorkerContext:
    """The position of a worker in its group."""

    rank: int = 0
    num_workers: int = 1


def set_devices(num_cpus: float, use_gpu: bool, deterministic: bool = False) -> None:
    """Restrict TensorFlow to this process's resources; call it before TensorFlow starts.

    TensorFlow gets a thread per CPU, and at least two to run operations, since a collective blocks
    one of them. Without `use_gpu` all GPUs are hidden; Ray hides only those of other processes.
    """
    for gpu in tf.config.list_physical_devices("GPU") if use_gpu else ():
        # Otherwise the first process on a GPU takes all of its memory.
        tf.config.experimental.set_memory_growth(gpu, True)
    if not use_gpu:
        tf.config.set_visible_devices([], "GPU")
    threads = max(int(num_cpus), 1)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(max(threads, 2))
    if deterministic:
        tf.config.experimental.enable_op_determinism()


def make_strategy(num_workers: int) -> tf.distribute.Strategy:
    """Return the strategy for this worker's devices in a group of `num_workers`."""
    # Listing logical devices would start TensorFlow before its collectives are set up.
    gpus = tf.config.get_visible_devices("GPU")
    if num_workers == 1 and len(gpus) < 2:
        return tf.distribute.get_strategy()
    kinds = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=kinds.NCCL if gpus else kinds.RING
    )
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


class Replicas:
    """The replicas of one worker.

    Attributes:
        count: Replicas of all workers.
        local_count: Replicas of this worker.

    Raises:
        ValueError: If the workers cannot have the same number of replicas.
    """

    def __init__(self, strategy: tf.distribute.Strategy, context: WorkerContext) -> None:
        self.strategy, self.context = strategy, context
        self.count = strategy.num_replicas_in_sync
        self.local_count, rest = divmod(self.count, context.num_workers)
        if rest or not self.local_count:
            raise ValueError(
                f"{context.num_workers} workers have {self.count} replicas in total; give each "
                "worker the same number of GPUs, or none"
            )
        # Autograph would leave its generated source in the temporary folder of a killed worker.
        self._sum = tf.function(
            lambda value: strategy.run(self._sum_on_each, args=(value,)), autograph=False
        )

    def split(self, array: np.ndarray | tf.Tensor, convert: Callable[[Any], tf.Tensor]) -> Any:
        """Split this worker's rows evenly over its replicas and convert each part to a tensor."""
        if self.local_count == 1:
            return convert(array)
        rows = array.shape[0] // self.local_count
        parts = range(self.local_count)
        return self.values([convert(array[i * rows : (i + 1) * rows]) for i in parts])

    def values(self, of_each: Sequence[Any]) -> Any:
        """Return one value per local replica as an argument of `strategy.run`."""
        if self.local_count == 1:
            return of_each[0]
        first = self.context.rank * self.local_count
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: of_each[int(context.replica_id_in_sync_group) - first]
        )

    def results(self, value: Any) -> tuple[Any, ...]:
        """Return the value of each local replica, in order."""
        return self.strategy.experimental_local_results(value)

    # -- exchanges, which all workers must call ---------------------------------------------------

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Return the sum of one array per worker, all of the same shape."""
        if self.context.num_workers == 1:
            return array
        first = tf.convert_to_tensor(array)
        rest = [tf.zeros_like(first)] * (self.local_count - 1)
        return self.results(self._sum(self.values([first, *rest])))[0].numpy()

    def _sum_on_each(self, array: tf.Tensor) -> tf.Tensor:
        # An argument of a tf.function has no device, and a collective runs on its input's device.
        array = tf.identity(array)
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, array)

    def gather(self, of_each: Sequence[np.ndarray]) -> np.ndarray:
        """Return the rows (R, S) of all replicas, given one row (S,) per local replica."""
        rows = np.zeros((self.count, *of_each[0].shape), of_each[0].dtype)
        self.local_rows(rows)[:] = of_each
        # The rows of other workers are 0, so the sum over all workers contains every row.
        return self.sum(rows)

    def average(self, variables: Sequence[Any]) -> None:
        """Set float variables on all replicas to their mean over all replicas."""
        if self.count == 1 or not variables:
            return
        mean_S = self.sum(np.sum(self.read(variables), axis=0)) / np.float32(self.count)
        self.write(variables, np.broadcast_to(mean_S, (self.count, len(mean_S))))

    # -- variables with a value per replica -------------------------------------------------------

    def read(self, variables: Sequence[Any]) -> list[np.ndarray]:
        """Return the values of float variables as one row (S,) per local replica."""
        if not variables:
            return [np.zeros(0, np.float32)] * self.local_count
        copies = [self.results(variable.value) for variable in variables]
        return [
            np.concatenate([np.ravel(copy[i].numpy()) for copy in copies])
            for i in range(self.local_count)
        ]

    def local_rows(self, rows_RS: np.ndarray) -> np.ndarray:
        """Return the rows of this worker's replicas."""
        first = self.context.rank * self.local_count
        return rows_RS[first : first + self.local_count]

    def write(self, variables: Sequence[Any], rows_RS: np.ndarray) -> None:
        """Set variables on each local replica to the values of its row.

        If the rows are from a run with another number of replicas, every replica gets their mean.
        """
        if len(rows_RS) == self.count:
            rows = self.local_rows(rows_RS)
        else:
            rows = [rows_RS.mean(axis=0, dtype=np.float64).astype(rows_RS.dtype)] * self.local_count
        start = 0
        for variable in variables:
            size = int(np.prod(variable.shape))
            for copy, row in zip(self.results(variable.value), rows, strict=True):
                copy.assign(row[start : start + size].reshape(variable.shape))
            start += size
