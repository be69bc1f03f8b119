"""How many trials a cluster can hold at once, as it is and as its autoscaler may make it.

Imports Ray only when asked.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_jobs.cli import JobError
from ray_jobs.room import Nodes

_MOST = 1000
"""Nodes of a kind of which an autoscaler knows no limit."""
_CONFIG_OF_RAY_UP = "~/ray_bootstrap_config.yaml"
"""Where `ray up` puts the cluster's configuration, on the head."""


def trial_slots(bundle: Mapping[str, float], num_workers: int, wanted: int | None = None) -> int:
    """Return how many trials can ever run at once.

    Args:
        bundle: Ray resources of each process of a trial.
        num_workers: processes of it.
        wanted: taken at its word where the nodes that are there hold none, and nobody says what an
            autoscaler could add.

    Raises:
        JobError: if not even one can.
    """
    from ray_jobs.cluster import is_our_own

    there, possible = nodes_there(), nodes_possible()
    slots = max(slots_on(there, bundle, num_workers), slots_on(possible, bundle, num_workers))
    if not slots and not possible and wanted and not is_our_own():
        return wanted
    if slots:
        return slots
    needs = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    has = "; ".join(map(_text, there)) or "no node"
    if possible:
        has += f", its autoscaler at most {'; '.join(map(_text, possible))}"
    elif not is_our_own():
        has += " (if an autoscaler adds nodes, tune.max_concurrent_trials says for how many trials)"
    raise JobError(
        f"a trial needs {num_workers} × ({needs}), each on one node, and the cluster has {has}; "
        "lower tune.workers_per_trial, train.cpus_per_worker or tune.gpus_per_worker, or add nodes"
    )


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
    """Return the resources of all nodes that the autoscaler may have, as far as it is known.

    KubeRay tells the cluster, and `ray up` leaves its configuration on the head, where jobs run.
    """
    from ray._private.state import state

    config = state.get_cluster_config()
    if config is not None and config.node_group_configs:
        groups = [(dict(g.resources), g.max_count) for g in config.node_group_configs]
        return _nodes(groups)
    return _nodes_of_ray_up(Path(_CONFIG_OF_RAY_UP).expanduser())


def _nodes_of_ray_up(path: Path) -> list[dict[str, float]]:
    import yaml

    try:
        config: Any = yaml.safe_load(path.read_text())
        most, kinds = config["max_workers"], config["available_node_types"]
        groups = [
            (
                kind.get("resources", {}),
                1 if name == config["head_node_type"] else min(kind.get("max_workers", most), most),
            )
            for name, kind in kinds.items()
        ]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return []
    return _nodes(groups)


def _nodes(groups: Sequence[tuple[dict[str, float], int]]) -> list[dict[str, float]]:
    counts = [count if count >= 0 else _MOST for _, count in groups]
    return [
        node
        for (node, _), count in zip(groups, counts, strict=True)
        for _ in range(min(count, _MOST))
    ]


def _text(node: Mapping[str, float]) -> str:
    shown: Sequence[str] = [n for n in ("CPU", "GPU") if node.get(n)]
    return " and ".join(f"{node[name]:g} {name}" for name in shown) or "no CPU"
