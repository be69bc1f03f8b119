"""Lists the resources of a cluster's nodes: current, free, and possible with its autoscaler."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ray_jobs.cluster import compat_ray

Nodes = Sequence[Mapping[str, float]]
"""Total or free resources per node, by Ray's resource names."""

_MAX_NODES = 1000
"""Maximum number of nodes that is assumed for a node group without a limit."""
_RAY_UP_CONFIG = "~/ray_bootstrap_config.yaml"
"""Where `ray up` stores the cluster configuration on the head node."""


def current_nodes() -> Nodes:
    """Return the total resources of each node that is alive."""
    return list(resources_by_node().values())


def resources_by_node() -> dict[str, dict[str, float]]:
    """Return the total resources of each node that is alive, by node ID."""
    import ray

    return {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}


def free_nodes(held: Mapping[str, Mapping[str, float]] = MappingProxyType({})) -> Nodes:
    """Return the free resources of each node that is alive.

    Args:
        held: Resources by node ID that count as free, too.
    """
    free = compat_ray.free_resources()
    for node in free.keys() & held.keys():
        for name, amount in held[node].items():
            free[node][name] = free[node].get(name, 0) + amount
    return list(free.values())


def possible_nodes() -> Nodes:
    """Return the resources of all nodes that the autoscaler may run; empty if unknown.

    KubeRay reports the limits to the cluster; `ray up` leaves its configuration on the head node,
    where jobs run.
    """
    if groups := compat_ray.autoscaler_groups():
        return _expand(groups)
    return _nodes_of_ray_up(Path(_RAY_UP_CONFIG).expanduser())


def _nodes_of_ray_up(path: Path) -> Nodes:
    import yaml

    try:
        config: Any = yaml.safe_load(path.read_text())
        max_workers, types = config["max_workers"], config["available_node_types"]
        if not any(kind.get("resources") for kind in types.values()):
            return []  # The file lists existing machines without their resources.
        head = types.pop(config["head_node_type"]).get("resources", {})
        workers = _expand(
            [
                (kind.get("resources", {}), min(kind.get("max_workers", max_workers), max_workers))
                for kind in types.values()
            ]
        )
        # The types cannot all reach their limits together; jobs with GPUs request GPU nodes.
        workers.sort(key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)), reverse=True)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return []
    return [head, *workers[:max_workers]]


def _expand(groups: Sequence[tuple[dict[str, float], int]]) -> list[dict[str, float]]:
    """Return one entry per node for groups of (resources, count); a negative count is unlimited."""
    return [
        node
        for node, count in groups
        for _ in range(min(count, _MAX_NODES) if count >= 0 else _MAX_NODES)
    ]


def describe_nodes(nodes: Nodes) -> str:
    """Return the CPUs and GPUs of nodes as text that groups equal nodes: `2 × 8 CPU and 1 GPU`."""
    shown = [{name: node[name] for name in ("CPU", "GPU") if node.get(name)} for node in nodes]
    counts = Counter(describe_resources(node) or "no CPU" for node in shown)
    return "; ".join(f"{n} × {text}" if n > 1 else text for text, n in counts.items()) or "no node"


def describe_resources(resources: Mapping[str, float]) -> str:
    """Return resources as text: `8 CPU and 1 GPU`."""
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
