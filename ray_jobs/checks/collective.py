"""Checks that two workers can sum an array, as they sum gradients in a training step."""

import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from ray_jobs.checks.finding import Finding, error, ok, skipped
from ray_jobs.cluster.capacity import worker_resources, workers_that_fit
from ray_jobs.cluster.connection import root_cause
from ray_jobs.cluster.node_inventory import describe_resources, free_nodes
from ray_jobs.cluster.worker_group import GroupWorker, start_workers
from ray_jobs.config.spec import RunSpec, TrainSpec

_CAPACITY_TIMEOUT_S = 10.0
_TIMEOUT_S = 90.0
"""Time to import TensorFlow on two busy nodes, or for the exchanges."""
_BYTES = 1 << 25
_ROUNDS = 5


class _Worker(GroupWorker):
    def exchange(self, addresses: Sequence[str], train: TrainSpec) -> dict[str, Any]:
        """Sum an array with the other worker; return `correct` and `seconds`."""
        strategy = self.start_tensorflow(addresses, train)
        import numpy as np

        from ray_jobs.cluster.strategy import Replicas, WorkerContext

        replicas = Replicas(strategy, WorkerContext(self.rank, self.num_workers))
        ones, seconds, correct = np.ones(_BYTES // 4, np.float32), [], True
        for _ in range(_ROUNDS + 1):
            started = time.monotonic()
            total = replicas.sum(ones)
            seconds.append(time.monotonic() - started)
            correct &= bool(np.all(total == self.num_workers))
        # The first round traces.
        return {"correct": correct, "seconds": median(seconds[1:])}


def collective(spec: RunSpec) -> Iterator[Finding]:
    """Let two workers, on two nodes if possible, sum an array; report the bandwidth."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util import placement_group, remove_placement_group

    train = spec.train
    bundle = worker_resources(train)
    no_capacity = skipped(
        "collective",
        f"two workers with {describe_resources(bundle)} each and one CPU for Ray Data do not fit "
        "on the free nodes",
    )
    # A pending placement group would make an autoscaler start machines.
    if not _wait_for_capacity(train):
        yield no_capacity
        return
    placement = placement_group([bundle] * 2, strategy="SPREAD")
    workers, addresses = [], []
    try:
        if not placement.wait(_CAPACITY_TIMEOUT_S):
            yield no_capacity
            return
        workers = start_workers(_Worker, placement)
        addresses = ray.get([worker.address.remote() for worker in workers], timeout=_TIMEOUT_S)
        calls = [worker.exchange.remote(addresses, train) for worker in workers]
        yield from _findings(ray.get(calls, timeout=_TIMEOUT_S), addresses)
    except GetTimeoutError:
        if addresses:
            text = f"two workers ({' and '.join(addresses)}) did not connect within"
            remedy = "open all TCP ports between the nodes (but not to the internet)"
        else:
            text, remedy = "two workers did not start within", "see the raylet logs of their nodes"
        yield error("collective", f"{text} {_TIMEOUT_S:.0f} s", remedy)
    except RayError as failure:
        yield error("collective", root_cause(failure), "see the raylet logs of the nodes")
    finally:
        for worker in workers:
            ray.kill(worker)
        remove_placement_group(placement)


def _wait_for_capacity(train: TrainSpec) -> bool:
    """Whether two workers fit once earlier checks have released their resources."""
    deadline = time.monotonic() + _CAPACITY_TIMEOUT_S
    while workers_that_fit(free_nodes(), train) < 2:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _findings(results: Sequence[dict[str, Any]], addresses: Sequence[str]) -> Iterator[Finding]:
    if not all(result["correct"] for result in results):
        yield error("collective", "the sum of two workers is wrong", "see TensorFlow's log")
        return
    # In a ring of two, each worker sends as many bytes as the array has.
    rate = _BYTES / max(result["seconds"] for result in results)
    hosts = {address.rpartition(":")[0] for address in addresses}
    where = "two nodes" if len(hosts) == 2 else "one node"
    yield ok("collective", f"two workers on {where} exchange {rate / 1e6:,.0f} MB/s")
