"""The replicas of one worker, and what they exchange with those of the other workers.

One worker with one device computes without a strategy: nothing has to be exchanged, and nothing is
wrapped. Everything else is a `MultiWorkerMirroredStrategy`, which reads `TF_CONFIG`; also several
devices of one worker, since what a replica exchanges in a loop, a `MirroredStrategy` cannot. A
worker that skips a call that says "exchange" hangs all others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf


@dataclass(frozen=True)
class WorkerContext:
    """A worker's context among the others."""

    rank: int = 0
    num_workers: int = 1


def set_devices(num_cpus: float, use_gpu: bool, deterministic: bool = False) -> None:
    """Let TensorFlow compute with what Ray gave the process; call before TensorFlow starts.

    As many threads as it has CPUs (two at least run operations, since a collective waits in one of
    them), and GPUs only where it has some: Ray does not hide the others.
    """
    for gpu in tf.config.list_physical_devices("GPU") if use_gpu else ():
        # Else the first process on a GPU takes all of its memory.
        tf.config.experimental.set_memory_growth(gpu, True)
    if not use_gpu:
        tf.config.set_visible_devices([], "GPU")
    threads = max(int(num_cpus), 1)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(max(threads, 2))
    if deterministic:
        tf.config.experimental.enable_op_determinism()


def make_strategy(num_workers: int) -> tf.distribute.Strategy:
    """Return the strategy for this worker's devices, one of so many workers."""
    # Not the logical ones, whose listing starts TensorFlow before its collectives are set up.
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

    Args:
        strategy: that they compute under.
        context: of the worker.

    Raises:
        ValueError: if the workers cannot have the same number of replicas.
    """

    def __init__(self, strategy: tf.distribute.Strategy, context: WorkerContext) -> None:
        self.strategy, self.context = strategy, context
        self.count = strategy.num_replicas_in_sync
        """Replicas of all workers."""
        self.local_count, rest = divmod(self.count, context.num_workers)
        """Replicas of this worker."""
        if rest or not self.local_count:
            raise ValueError(
                f"{context.num_workers} workers hold {self.count} replicas; give each of them the "
                "same number of GPUs, or none"
            )
        self._sum = tf.function(lambda value: strategy.run(self._sum_on_each, args=(value,)))

    def shares(self, array: np.ndarray | tf.Tensor, convert: Callable[[Any], tf.Tensor]) -> Any:
        """Return this worker's rows as a tensor, or as one of each replica's equal share."""
        if self.local_count == 1:
            return convert(array)
        rows = array.shape[0] // self.local_count
        return self.values([convert(array[i * rows : (i + 1) * rows]) for i in self._local])

    def values(self, of_each: Sequence[Any]) -> Any:
        """Return one value of each local replica as what `strategy.run` hands out to them."""
        if self.local_count == 1:
            return of_each[0]
        first = self.context.rank * self.local_count
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: of_each[int(context.replica_id_in_sync_group) - first]
        )

    def results(self, value: Any) -> tuple[Any, ...]:
        """Return what each local replica returned, in order."""
        return self.strategy.experimental_local_results(value)

    @property
    def _local(self) -> range:
        return range(self.local_count)

    # -- exchanges, in which every worker must take part ------------------------------------------

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Exchange arrays of one shape and return their sum over all workers."""
        if self.context.num_workers == 1:
            # Its replicas are in this process, which adds up what they have.
            return array
        first = tf.convert_to_tensor(array)
        rest = [tf.zeros_like(first)] * (self.local_count - 1)
        return self.results(self._sum(self.values([first, *rest])))[0].numpy()

    def _sum_on_each(self, array: tf.Tensor) -> tf.Tensor:
        # An argument of a tf.function has no device, and a collective goes by its input's.
        array = tf.identity(array)
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, array)

    def gather(self, of_each: Sequence[np.ndarray]) -> np.ndarray:
        """Exchange one row (S,) of each local replica and return those of all: (replicas, S)."""
        rows = np.zeros((self.count, *of_each[0].shape), of_each[0].dtype)
        self.own(rows)[:] = of_each
        # Every worker fills its own rows and leaves the others 0, so their sum is all rows.
        return self.sum(rows)

    def agree(self, variables: Sequence[Any]) -> None:
        """Exchange the values of float variables; give all replicas their mean over all of them."""
        if self.count == 1 or not variables:
            return
        mean_S = self.sum(np.sum(self.read(variables), axis=0)) / np.float32(self.count)
        self.write(variables, np.broadcast_to(mean_S, (self.count, len(mean_S))))

    # -- variables of which each replica has its own value ----------------------------------------

    def read(self, variables: Sequence[Any]) -> list[np.ndarray]:
        """Return the values of some float variables on each local replica, as one row (S,)."""
        if not variables:
            return [np.zeros(0, np.float32)] * self.local_count
        copies = [self.results(variable.value) for variable in variables]
        return [np.concatenate([np.ravel(c[i].numpy()) for c in copies]) for i in self._local]

    def own(self, rows_RS: np.ndarray) -> np.ndarray:
        """Return the rows of this worker's replicas among those of all."""
        first = self.context.rank * self.local_count
        return rows_RS[first : first + self.local_count]

    def write(self, variables: Sequence[Any], rows_RS: np.ndarray) -> None:
        """Give variables on each local replica the values of its row among those of all replicas.

        A row for other replicas than there are now is of a run with other workers: every replica
        then gets the mean.
        """
        if len(rows_RS) == self.count:
            rows = self.own(rows_RS)
        else:
            rows = [rows_RS.mean(axis=0, dtype=np.float64).astype(rows_RS.dtype)] * self.local_count
        start = 0
        for variable in variables:
            size = int(np.prod(variable.shape))
            for copy, row in zip(self.results(variable.value), rows, strict=True):
                copy.assign(row[start : start + size].reshape(variable.shape))
            start += size
