"""A `TensorflowTrainer` whose workers use Keras 3 and whose driver imports no TensorFlow.

Ray's own backend requests legacy Keras on the workers and imports TensorFlow in the driver and the
controller, which costs each of them seconds and half a gigabyte. A worker needs only `TF_CONFIG`.
"""

import signal
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.train import Result
from ray.train.backend import Backend, BackendConfig

from ray_jobs.cluster import compat_ray
from ray_jobs.cluster.worker_group import free_address, set_environment

_TensorflowTrainer = compat_ray.tensorflow_trainer()


class KerasTrainer(_TensorflowTrainer):
    """A `TensorflowTrainer` for Keras 3, with the same arguments except `tensorflow_config`."""

    def __init__(self, train_loop_per_worker: Callable[..., Any], **options: Any) -> None:
        """Skip the parent's `__init__`, which imports TensorFlow for Ray's own backend."""
        super(_TensorflowTrainer, self).__init__(
            train_loop_per_worker, backend_config=KerasConfig(), **options
        )

    def fit(self) -> Result:
        """Train, then restore the interrupt handler.

        Ray leaves its own handler installed, which keeps the controller's processes alive and
        catches a later Ctrl-C.
        """
        handler = signal.getsignal(signal.SIGINT)
        try:
            return super().fit()
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, handler)


class KerasConfig(BackendConfig):
    """Selects the backend for Keras 3."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend, which Ray instantiates."""
        return _KerasBackend


class _KerasBackend(Backend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        addresses = worker_group.execute(free_address)
        ray.get(
            [
                worker_group.execute_single_async(rank, set_environment, addresses, rank)
                for rank in range(len(worker_group))
            ]
        )
