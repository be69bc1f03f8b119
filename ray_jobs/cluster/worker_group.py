"""Starts a group of TensorFlow workers: addresses, environment, devices and strategy.

Ray Train's backend (`tf_backend.py`), the workers of a trial and the check of collectives use this
module. Only the workers import TensorFlow.
"""

import json
import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray_jobs.config.spec import TrainSpec

if TYPE_CHECKING:
    import tensorflow as tf
    from ray.util.placement_group import PlacementGroup


class GroupWorker:
    """One process of a group; a base class for actors.

    Args:
        rank: Index of this process in the group.
        num_workers: Size of the group.
    """

    def __init__(self, rank: int, num_workers: int) -> None:
        self.rank, self.num_workers = rank, num_workers
        self.strategy: tf.distribute.Strategy | None = None

    def address(self) -> str:
        """Return an address at which this process can listen."""
        return free_address()

    def start_tensorflow(
        self, addresses: Sequence[str], train: TrainSpec
    ) -> "tf.distribute.Strategy":
        """Set up TensorFlow and connect to the other workers; all workers must call this."""
        set_environment(addresses, self.rank)
        import_keras()
        from ray_jobs.cluster.strategy import make_strategy, set_devices

        set_devices(train.cpus_per_worker, train.use_gpu, train.deterministic)
        self.strategy = make_strategy(self.num_workers)
        return self.strategy


def start_workers(
    worker_class: type[GroupWorker], placement: "PlacementGroup", first_rank: int = 0
) -> list[Any]:
    """Start and return an actor for each bundle of a placement group, from `first_rank` on."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundles, actor = placement.bundle_specs, ray.remote(worker_class)
    return [
        actor.options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            resources={name: n for name, n in bundle.items() if name not in ("CPU", "GPU")},
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement, first_rank + i),
        ).remote(first_rank + i, len(bundles))
        for i, bundle in enumerate(bundles[first_rank:])
    ]


def free_address() -> str:
    """Return an address of this node with a free port."""
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    host = ray.util.get_node_ip_address()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def set_environment(addresses: Sequence[str], rank: int) -> None:
    """Set the variables that TensorFlow and Keras read when they are imported.

    Args:
        addresses: Addresses of all workers, by rank.
        rank: Index of this process.
    """
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": list(addresses)}, "task": {"type": "worker", "index": rank}}
    )
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def import_keras() -> None:
    """Import TensorFlow and Keras without what only Keras' wrappers and plots use.

    Without scikit-learn and matplotlib, the import takes a quarter less time. Both can still be
    imported afterwards.
    """
    hidden = [name for name in ("matplotlib", "sklearn") if name not in sys.modules]
    modules: dict[str, Any] = sys.modules
    # An import of a module that is None fails, as if it were not installed.
    modules |= dict.fromkeys(hidden)
    try:
        import keras  # noqa: F401
    finally:
        for name in hidden:
            del modules[name]
