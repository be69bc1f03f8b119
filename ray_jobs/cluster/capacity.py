"""Computes how many workers and trials a cluster can run at the same time.

Resources are counted per node, since no worker spans two nodes, and in Ray's units, so that three
workers of 0.4 CPUs fit in 1.2 CPUs.
"""

import threading
import time
from collections.abc import Mapping

from ray_jobs.cluster.connection import owns_ray
from ray_jobs.cluster.node_inventory import (
    Nodes,
    current_nodes,
    describe_nodes,
    describe_resources,
    free_nodes,
    possible_nodes,
)
from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import InferenceSpec
from ray_jobs.config.spec import TrainSpec

_UNITS = 10_000
"""Ray counts resources in fixed-point units of 0.0001."""
_RELEASE_TIMEOUT_S = 10.0
"""Maximum wait; Ray reports the resources of an ended attempt as free after a short delay."""
_POLL_S = 0.5
_CPU_FRACTIONS = 0.5, 0.25, 0.1, 0.05, 0.02


def worker_resources(train: TrainSpec, gpus_per_worker: float | None = None) -> dict[str, float]:
    """Return the Ray resources of one worker.

    Args:
        train: The `train` section.
        gpus_per_worker: GPUs, or a fraction of one, instead of `train.gpus_per_worker`.
    """
    num_gpus = train.gpus_per_worker if gpus_per_worker is None else gpus_per_worker
    gpus = {"GPU": float(num_gpus)} if train.use_gpu else {}
    return {"CPU": train.cpus_per_worker, **gpus, **train.resources_per_worker}


def cpu_settings(spec: TrainSpec | InferenceSpec) -> str:
    """Return, for messages, the settings that determine the CPUs of a job's workers."""
    prefix, num_workers = "", spec.num_workers
    if isinstance(spec, TrainSpec):
        prefix, num_workers = "train.", spec.workers_range[0]
    cpus = f"{prefix}cpus_per_worker={spec.cpus_per_worker:g}"
    return f"{prefix}num_workers={num_workers} and {cpus}"


def bundles_that_fit(node: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """Return how many bundles of resources fit on a node."""
    return min(
        round(node.get(name, 0) * _UNITS) // max(round(amount * _UNITS), 1)
        for name, amount in bundle.items()
        if amount
    )


# -- workers of a training run --------------------------------------------------------------------


def allowed_worker_counts(train: TrainSpec) -> list[int]:
    """Return the worker counts that a training run may have, in ascending order."""
    low, high = train.workers_range
    return [n for n in train.allowed_workers() if low <= n <= high]


def workers_that_fit(nodes: Nodes, train: TrainSpec) -> int:
    """Return how many workers fit with one CPU left for the tasks that read the data."""
    bundle = worker_resources(train)
    # This CPU is left on the node where it costs the fewest workers.
    lost = [
        bundles_that_fit(node, bundle) - bundles_that_fit({**node, "CPU": node["CPU"] - 1}, bundle)
        for node in nodes
        if node.get("CPU", 0) >= 1
    ]
    return sum(bundles_that_fit(node, bundle) for node in nodes) - min(lost) if lost else 0


def workers_to_start(
    train: TrainSpec, max_workers: int, interrupted: threading.Event, wait_s: float = 0.0
) -> int:
    """Return the largest allowed worker count that fits.

    If no allowed count fits, returns the smallest one; Ray then waits for an autoscaler to add
    nodes. Waits up to 10 s for an ended attempt to release its resources.

    Args:
        train: The `train` section.
        max_workers: Upper limit.
        interrupted: Ends the wait early.
        wait_s: Seconds to wait for new nodes, until as many workers as possible fit.
    """
    allowed = [n for n in allowed_worker_counts(train) if n <= max_workers]
    if len(allowed) == 1:
        return allowed[0]
    started = time.monotonic()
    while (available := workers_that_fit(free_nodes(), train)) < allowed[-1]:
        is_released = available >= min(workers_that_fit(current_nodes(), train), allowed[-1])
        timeout_s = wait_s if is_released else max(wait_s, _RELEASE_TIMEOUT_S)
        if time.monotonic() - started > timeout_s or interrupted.wait(_POLL_S):
            break
    return max([n for n in allowed if n <= available], default=allowed[0])


def can_grow(train: TrainSpec, num_workers: int, held: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether more than the `num_workers` that are running would fit after a restart.

    Args:
        train: The `train` section.
        num_workers: Number of running workers.
        held: Resources by node ID that the run holds now.
    """
    larger = [n for n in allowed_worker_counts(train) if n > num_workers]
    return bool(larger) and workers_that_fit(free_nodes(held), train) >= larger[0]


# -- CPUs for reading -----------------------------------------------------------------------------


def reading_cpus(nodes: Nodes, num_workers: int, max_cpus: int) -> float | None:
    """Return how many CPUs fit for the reading tasks of each worker; None if none do.

    They fit as two bundles: one for each split that the worker reads.

    Args:
        nodes: Free resources of the nodes.
        num_workers: Number of workers.
        max_cpus: Maximum number of CPUs per worker.
    """
    for cpus in (*range(max_cpus, 0, -1), *_CPU_FRACTIONS):
        bundle = {"CPU": cpus / 2}
        if sum(bundles_that_fit(node, bundle) for node in nodes) >= 2 * num_workers:
            return float(cpus)
    return None


# -- trials of a search ---------------------------------------------------------------------------


def trials_that_fit(nodes: Nodes, bundle: Mapping[str, float], num_workers: int) -> int:
    """Return how many trials of `num_workers` workers fit; a trial may span several nodes."""
    return sum(bundles_that_fit(node, bundle) for node in nodes) // num_workers


def trial_slots(
    bundle: Mapping[str, float], num_workers: int, max_concurrent: int | None = None
) -> int:
    """Return how many trials can run at the same time, now or after the autoscaler adds nodes.

    Args:
        bundle: Ray resources of each worker of a trial.
        num_workers: Workers per trial.
        max_concurrent: `tune.max_concurrent_trials`; returned if no trial fits on the current
            nodes and the limits of the autoscaler are unknown.

    Raises:
        JobError: If not even one trial can run.
    """
    nodes, possible = current_nodes(), possible_nodes()
    if slots := max(trials_that_fit(n, bundle, num_workers) for n in (nodes, possible)):
        return slots
    has = describe_nodes(nodes)
    if possible:
        has += f", with its autoscaler at most {describe_nodes(possible)}"
    elif not owns_ray():
        if max_concurrent:
            return max_concurrent
        has += " (if an autoscaler will add nodes, set tune.max_concurrent_trials)"
    raise JobError(
        f"tune.workers_per_trial={num_workers}: a trial needs {num_workers} × "
        f"({describe_resources(bundle)}), each on one node, and the cluster has {has}; "
        "lower tune.workers_per_trial, train.cpus_per_worker or tune.gpus_per_worker, or add nodes"
    )
