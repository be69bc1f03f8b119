"""Two workers exchange an array, as the gradients of a step."""

import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from ray_jobs.checks.finding import Finding, error, ok, skipped
from ray_jobs.cluster.capacity import actor_in_bundle, worker_resources, workers_that_fit
from ray_jobs.cluster.node_inventory import free_nodes
from ray_jobs.config.spec import RunSpec, TrainSpec

_PLACED_S = 10.0
_DONE_S = 90.0
"""Two imports of TensorFlow on busy nodes, and the exchanges."""
_BYTES = 1 << 25
_ROUNDS = 5


class _Worker:
    """One of the two."""

    def address(self) -> str:
        """Return where this worker can listen."""
        from ray_jobs.cluster.tf_backend import free_address

        return free_address()

    def exchange(self, addresses: Sequence[str], rank: int, train: TrainSpec) -> dict[str, Any]:
        """Sum an array with the other worker; return the seconds that it took, and versions."""
        from ray_jobs.cluster.tf_backend import set_environment

        set_environment(addresses, rank)
        import keras
        import numpy as np
        import tensorflow as tf

        from ray_jobs.cluster.strategy import Replicas, WorkerContext, make_strategy, set_devices

        set_devices(train.cpus_per_worker, train.use_gpu, train.deterministic)
        replicas = Replicas(make_strategy(len(addresses)), WorkerContext(rank, len(addresses)))
        ones, seconds, totals = np.ones(_BYTES // 4, np.float32), [], []
        for _ in range(_ROUNDS + 1):
            started = time.monotonic()
            totals.append(replicas.sum(ones))
            seconds.append(time.monotonic() - started)
        # The first one traces.
        return {
            "right": all(np.all(total == len(addresses)) for total in totals),
            "seconds": median(seconds[1:]),
            "versions": {"tensorflow": tf.__version__, "keras": keras.__version__},
        }


def collective(spec: RunSpec) -> Iterator[Finding]:
    """Let two workers, on two nodes where there are two, sum an array; say at what bandwidth."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util import placement_group, remove_placement_group

    from ray_jobs.cluster.connection import reason

    train = spec.train
    bundle = worker_resources(train)
    text = f"there is no room now for two workers of {bundle} and a CPU for Ray Data"
    no_room = skipped("collective", text)
    # What waits for room makes an autoscaler start machines.
    if not _has_room(train):
        yield no_room
        return
    placement = placement_group([bundle] * 2, strategy="SPREAD")
    workers, addresses = [], []
    try:
        if not placement.wait(_PLACED_S):
            yield no_room
            return
        workers = [actor_in_bundle(_Worker, placement, rank) for rank in range(2)]
        try:
            addresses = ray.get([w.address.remote() for w in workers], timeout=_DONE_S)
            calls = [w.exchange.remote(addresses, rank, train) for rank, w in enumerate(workers)]
            first, second = ray.get(calls, timeout=_DONE_S)
        except GetTimeoutError:
            if not addresses:
                text = f"two workers do not start in {_DONE_S:.0f} s"
                yield error("collective", text, "look at the raylet's log on their nodes")
                return
            yield error(
                "collective",
                f"two workers ({' and '.join(addresses)}) do not reach each other in "
                f"{_DONE_S:.0f} s",
                "open all TCP ports between the nodes (not to the world)",
            )
            return
        except RayError as failure:
            yield error("collective", reason(failure), "see the message")
            return
        yield from _judged(first, second, addresses)
    finally:
        for worker in workers:
            ray.kill(worker)
        remove_placement_group(placement)


def _has_room(train: TrainSpec) -> bool:
    """Whether two workers fit on what is free, once what other checks had is given back."""
    deadline = time.monotonic() + _PLACED_S
    while workers_that_fit(free_nodes(), train) < 2:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _judged(
    first: dict[str, Any], second: dict[str, Any], addresses: Sequence[str]
) -> Iterator[Finding]:
    if first["versions"] != second["versions"]:
        yield error(
            "collective",
            f"the workers import other packages: {first['versions']} at {addresses[0]}, "
            f"{second['versions']} at {addresses[1]}",
            "install requirements.lock on every node",
        )
    if not (first["right"] and second["right"]):
        yield error("collective", "the sum of two workers is wrong", "see TensorFlow's log")
        return
    # In a ring of two, each sends as many bytes as the array has.
    rate = _BYTES / max(first["seconds"], second["seconds"])
    hosts = {address.rpartition(":")[0] for address in addresses}
    where = "on two nodes" if len(hosts) == 2 else "on one node"
    yield ok("collective", f"two workers {where} exchange {rate / 1e6:,.0f} MB/s")
