"""How many workers of a training a cluster has room for.

A CPU is left to Ray Data, which would wait for one for ever. Room is counted node by node: a worker
does not spread over two of them.
"""

import threading
import time
from collections.abc import Mapping
from typing import Any

from ray_jobs.cluster.node_inventory import Nodes, current_nodes, free_nodes
from ray_jobs.config.spec import TrainSpec

_FREED_S = 10.0
"""Ray counts what an ended attempt held as free a moment later."""
_LOOK_S = 0.5


def worker_resources(train: TrainSpec) -> dict[str, float]:
    """Return the Ray resources of one worker."""
    gpus = {"GPU": float(train.gpus_per_worker)} if train.use_gpu else {}
    return {"CPU": train.cpus_per_worker, **gpus, **train.resources_per_worker}


def actor_in_bundle(kind: type, placement: Any, index: int, *arguments: Any) -> Any:
    """Start an actor that takes the whole of a placement group's bundle, and return it."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle: Mapping[str, float] = placement.bundle_specs[index]
    actor: Any = ray.remote(kind)
    return actor.options(
        num_cpus=bundle.get("CPU", 0),
        num_gpus=bundle.get("GPU", 0),
        resources={name: n for name, n in bundle.items() if name not in ("CPU", "GPU")},
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement, index),
    ).remote(*arguments)


def allowed_worker_counts(train: TrainSpec) -> list[int]:
    """Return the numbers of workers that a training may have, in order."""
    low, high = train.workers_range
    return [n for n in train.allowed_workers() if low <= n <= high]


def workers_to_start(train: TrainSpec, most: int, interrupted: threading.Event) -> int:
    """Return the most workers, of those allowed, that there is room for.

    With room for none it is the least: Ray waits for it, and so does an autoscaler's request. Where
    there is a choice, it waits some seconds for what an ended attempt held to be free.

    Args:
        train: of the run.
        most: workers.
        interrupted: ends the wait.
    """
    allowed = [n for n in allowed_worker_counts(train) if n <= most]
    if len(allowed) == 1:
        return allowed[0]
    deadline = time.monotonic() + _FREED_S
    most_room = min(workers_that_fit(current_nodes(), train), allowed[-1])
    while (room := workers_that_fit(free_nodes(), train)) < most_room:
        if time.monotonic() > deadline or interrupted.wait(_LOOK_S):
            break
    return max([n for n in allowed if n <= room], default=allowed[0])


def can_grow(train: TrainSpec, num_workers: int) -> bool:
    """Whether a training of so many workers, which have theirs, would find room for more."""
    more = [n for n in allowed_worker_counts(train) if n > num_workers]
    return bool(more) and num_workers + workers_that_fit(free_nodes(), train) >= more[0]


def workers_that_fit(nodes: Nodes, train: TrainSpec) -> int:
    """Return how many workers nodes could hold, a CPU left to Ray Data."""
    needed = worker_resources(train)

    def fit(node: Mapping[str, float]) -> int:
        return min(int(node.get(name, 0) / amount) for name, amount in needed.items())

    # Where it costs the fewest workers.
    costs = [
        fit(node) - fit({**node, "CPU": node["CPU"] - 1})
        for node in nodes
        if node.get("CPU", 0) >= 1
    ]
    return sum(map(fit, nodes)) - min(costs) if costs else 0
