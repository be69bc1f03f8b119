"""A `TensorflowTrainer` whose workers use Keras 3, and whose driver imports no TensorFlow.

Ray's own backend asks for legacy Keras on the workers, and costs driver and controller an import of
TensorFlow (seconds, and half a gigabyte each). What a worker needs is `TF_CONFIG`.
"""

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import Result
from ray.train.backend import Backend, BackendConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.tensorflow.tensorflow_trainer import TensorflowTrainer


class KerasTrainer(TensorflowTrainer):
    """A `TensorflowTrainer` for Keras 3; takes the arguments of Ray's, less `tensorflow_config`."""

    def __init__(self, train_loop_per_worker: Callable[..., Any], **options: Any) -> None:
        """Skip the parent's own, which imports TensorFlow for a backend that is not used here."""
        DataParallelTrainer.__init__(
            self, train_loop_per_worker, backend_config=KerasConfig(), **options
        )

    def fit(self) -> Result:
        """Train, and give the interrupt handler back.

        Ray's own stays behind: it keeps the controller's processes alive for as long as the driver
        lives, and takes Ctrl-C from whoever comes after.
        """
        before = signal.getsignal(signal.SIGINT)
        try:
            return super().fit()
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, before)


@dataclass
class KerasConfig(BackendConfig):
    """Backend of a `TensorflowTrainer` whose workers use Keras 3."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Return the backend, for Ray."""
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


def free_address() -> str:
    """Return an address of this node at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    host = ray.util.get_node_ip_address()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def set_environment(addresses: Sequence[str], rank: int) -> None:
    """Tell this process of the workers of its group; before it imports TensorFlow or Keras.

    Args:
        addresses: of all of them.
        rank: of this one.
    """
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": list(addresses)}, "task": {"type": "worker", "index": rank}}
    )
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
