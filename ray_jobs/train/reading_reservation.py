"""Reserves CPUs for the tasks that read the data of an attempt.

The tasks run in a placement group that is requested once the workers are placed. It is reserved as
a whole: otherwise, the tasks of one worker could hold the CPUs that those of another need, while
both workers wait for each other. Until it fits, it is a demand that an autoscaler meets.
"""

from collections.abc import Sequence
from typing import Any

import ray

from ray_jobs.cluster.capacity import bundles_that_fit, reading_cpus, worker_resources
from ray_jobs.cluster.compat_ray import free_resources
from ray_jobs.cluster.node_inventory import possible_nodes, resources_by_node
from ray_jobs.config.spec import TrainSpec
from ray_jobs.data.ray_reading import MAX_CPUS, Decode, ReservedCpus

_NODE_ID = "ray.io/node-id"
"""Label that Ray gives each node."""


def cpus_with_new_nodes(train: TrainSpec, num_workers: int) -> float:
    """Return how many CPUs an autoscaler could provide for the decoding tasks of each worker.

    Returns 0 if the limits of the autoscaler are unknown; must run on the head node.
    """
    nodes, bundle = [dict(node) for node in possible_nodes()], worker_resources(train)
    for _ in range(num_workers):
        node = next((node for node in nodes if bundles_that_fit(node, bundle)), None)
        if node is None:
            return 0.0
        for name, amount in bundle.items():
            node[name] -= amount
    return reading_cpus(nodes, num_workers, MAX_CPUS["workers"]) or 0.0


def reserve_cpus(
    train: TrainSpec, decode: Decode, worker_nodes: Sequence[str], expected: float, coordinator: Any
) -> ReservedCpus | None:
    """Reserve CPUs for the tasks of an attempt whose workers are placed, or return those reserved.

    Ray Train calls this for each dataset.

    Args:
        train: The `train` section.
        decode: Where images are decoded.
        worker_nodes: The node ID of each worker.
        expected: CPUs per worker that decoding tasks get after an autoscaler has added nodes.
        coordinator: The run's coordinator, which releases the CPUs after the attempt.

    Returns:
        The reserved CPUs; None if the cluster has none left, and tasks that only read do without.
    """
    free, total, num_workers = free_resources(), resources_by_node(), len(worker_nodes)
    cpus = reading_cpus(list(free.values()), num_workers, MAX_CPUS[decode])
    if decode == "workers":
        # Decoding needs CPUs, so the tasks wait for them even if there are none yet.
        cpus = max(cpus or 1.0, expected)
    bundles, selectors = [], []
    if cpus is not None:
        bundles = [{"CPU": cpus / 2}] * 2 * num_workers
        with_gpu = [node for node in free if total.get(node, {}).get("GPU")]
        others = [resources for node, resources in free.items() if node not in with_gpu]
        if with_gpu and (reading_cpus(others, num_workers, MAX_CPUS[decode]) or 0) >= cpus:
            selectors = [{_NODE_ID: f"!in({','.join(with_gpu)})"}] * len(bundles)
    workers = [(node, worker_resources(train)) for node in worker_nodes]
    placement: Any = ray.get(coordinator.hold.remote(workers, bundles, selectors))
    return None if placement is None else ReservedCpus(placement, placement.bundle_specs[0]["CPU"])
