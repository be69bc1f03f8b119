"""How many trials a cluster can hold at once, as it is and as its autoscaler may make it.

Imports Ray only when asked.
"""

from collections.abc import Mapping, Sequence

from ray_jobs.cli import JobError
from ray_jobs.room import Nodes

_MOST = 1000
"""Nodes of a kind of which an autoscaler knows no limit."""


def trial_slots(bundle: Mapping[str, float], num_workers: int) -> int:
    """Return how many trials can ever run at once.

    Args:
        bundle: Ray resources of each process of a trial.
        num_workers: processes of it.

    Raises:
        JobError: if not even one can.
    """
    there, possible = nodes_there(), nodes_possible()
    slots = max(slots_on(there, bundle, num_workers), slots_on(possible, bundle, num_workers))
    if not slots:
        needs = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
        has = "; ".join(map(_text, there)) or "no node"
        if possible:
            has += f", its autoscaler at most {'; '.join(map(_text, possible))}"
        raise JobError(
            f"a trial needs {num_workers} × ({needs}), each on one node, and the cluster has "
            f"{has}; lower tune.workers_per_trial, train.cpus_per_worker or "
            "tune.gpus_per_worker, or add nodes"
        )
    return slots


def slots_on(nodes: Nodes, bundle: Mapping[str, float], num_workers: int) -> int:
    """Return how many trials some nodes hold; a process does not spread over two of them."""
    wanted = {name: amount for name, amount in bundle.items() if amount}

    def fit(node: Mapping[str, float]) -> int:
        # As Ray counts them: in units of 0.0001.
        return min(
            round(node.get(name, 0) * 10_000) // max(round(amount * 10_000), 1)
            for name, amount in wanted.items()
        )

    return sum(map(fit, nodes)) // num_workers


def nodes_there() -> list[dict[str, float]]:
    """Return the resources of the nodes that are there."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def nodes_possible() -> list[dict[str, float]]:
    """Return the resources of all nodes that the autoscaler may have; none without one."""
    from ray._private.state import state

    config = state.get_cluster_config()
    nodes: list[dict[str, float]] = []
    for group in config.node_group_configs if config else ():
        count = group.max_count if group.max_count >= 0 else _MOST
        nodes += [dict(group.resources)] * min(count, _MOST)
    return nodes


def _text(node: Mapping[str, float]) -> str:
    shown: Sequence[str] = [n for n in ("CPU", "GPU") if node.get(n)]
    return " and ".join(f"{node[name]:g} {name}" for name in shown) or "no CPU"
