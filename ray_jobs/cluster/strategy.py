"""The replicas of one worker, and the exchange of values with the replicas of other workers.

One worker with one device uses TensorFlow's default strategy, which neither exchanges values nor
wraps variables. All other cases use a `MultiWorkerMirroredStrategy`, which reads `TF_CONFIG`. This
includes one worker with several devices, since a `MirroredStrategy` cannot exchange values inside a
`tf.while_loop`, which `train.steps_per_call` needs.

A method that exchanges values must be called by all workers; if one worker does not call it, the
others hang.

Shapes: R replicas of all workers, S total size of all variables.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

# Options of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


@dataclass(frozen=True)
class WorkerContext:
    """The position of a worker in its group."""

    rank: int = 0
    num_workers: int = 1


def set_devices(num_cpus: float, use_gpu: bool, deterministic: bool = False) -> None:
    """Restrict TensorFlow to this process's resources.

    Call it before TensorFlow initializes its devices. Uses one intra-op thread per CPU and at least
    two inter-op threads, since a collective blocks one. Without `use_gpu`, hides all GPUs, because
    Ray leaves them visible to a process that has none assigned, and keeps freed memory.
    """
    for gpu in tf.config.list_physical_devices("GPU") if use_gpu else ():
        # Otherwise the first process on a GPU would allocate all of its memory.
        tf.config.experimental.set_memory_growth(gpu, True)
    if not use_gpu:
        tf.config.set_visible_devices([], "GPU")
        _keep_freed_memory()
    threads = max(int(num_cpus), 1)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(max(threads, 2))
    if deterministic:
        tf.config.experimental.enable_op_determinism()


def _keep_freed_memory() -> None:
    """Let this process reuse the memory of freed tensors.

    By default, glibc returns large blocks to the system at once, so each step of a model gets its
    tensors from the system again. Their page faults took 10 to 40 % of a step; see
    docs/experiments.md. Threads that already have a heap of their own keep it, unless the process
    was started with `MALLOC_ARENA_MAX=1`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_ARENA_MAX, 1)


def make_strategy(num_workers: int) -> tf.distribute.Strategy:
    """Return the strategy for this worker's devices in a group of `num_workers`."""
    # Listing logical devices would initialize them before the collectives are set up.
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
        count: Number of replicas of all workers.
        local_count: Number of replicas of this worker.

    Raises:
        ValueError: If the replicas cannot be divided equally among the workers.
    """

    def __init__(self, strategy: tf.distribute.Strategy, context: WorkerContext) -> None:
        self.strategy, self.context = strategy, context
        self.count = strategy.num_replicas_in_sync
        self.local_count, remainder = divmod(self.count, context.num_workers)
        if remainder or not self.local_count:
            raise ValueError(
                f"{context.num_workers} workers have {self.count} replicas in total; give each "
                "worker the same number of GPUs, or none"
            )
        # With Autograph, a killed worker would leave generated source files in the temporary
        # folder.
        self._sum = tf.function(
            lambda value: strategy.run(self._sum_on_replica, args=(value,)), autograph=False
        )

    def split(self, array: np.ndarray | tf.Tensor, convert: Callable[[Any], tf.Tensor]) -> Any:
        """Split this worker's rows evenly over its replicas and convert each part to a tensor."""
        if self.local_count == 1:
            return convert(array)
        rows = array.shape[0] // self.local_count
        parts = range(self.local_count)
        return self.values([convert(array[i * rows : (i + 1) * rows]) for i in parts])

    def values(self, per_replica: Sequence[Any]) -> Any:
        """Combine one value per local replica into an argument for `strategy.run`."""
        if self.local_count == 1:
            return per_replica[0]
        first = self.context.rank * self.local_count
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: per_replica[int(context.replica_id_in_sync_group) - first]
        )

    def results(self, value: Any) -> tuple[Any, ...]:
        """Return the value of each local replica, in order."""
        return self.strategy.experimental_local_results(value)

    # -- exchanges, which all workers must call ---------------------------------------------------

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Return the sum of the workers' arrays, which must have the same shape."""
        if self.context.num_workers == 1:
            return array
        first = tf.convert_to_tensor(array)
        zeros = [tf.zeros_like(first)] * (self.local_count - 1)
        return self.results(self._sum(self.values([first, *zeros])))[0].numpy()

    def _sum_on_replica(self, array: tf.Tensor) -> tf.Tensor:
        # A collective runs on the device of its input. An argument of a tf.function has no device,
        # but the result of this operation is on the device of the replica.
        array = tf.identity(array)
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, array)

    def gather(self, per_replica: Sequence[np.ndarray]) -> np.ndarray:
        """Return the rows (R, S) of all replicas, given one row (S,) per local replica."""
        rows = np.zeros((self.count, *per_replica[0].shape), per_replica[0].dtype)
        self.local_rows(rows)[:] = per_replica
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

        If the rows are from a run with a different number of replicas, every replica gets their
        mean.
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
