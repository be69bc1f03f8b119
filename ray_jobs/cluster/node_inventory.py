"""The nodes of a cluster, as they are and as its autoscaler may make them.

Imports Ray only when asked.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Nodes = Sequence[Mapping[str, float]]
"""What nodes have, or have free, by the names of Ray's resources."""

_MOST = 1000
"""Nodes of a kind of which an autoscaler knows no limit."""
_CONFIG_OF_RAY_UP = "~/ray_bootstrap_config.yaml"
"""Where `ray up` puts the cluster's configuration, on the head."""


def current_nodes() -> Nodes:
    """Return the resources of the nodes that are there."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def free_nodes() -> Nodes:
    """Return what nobody holds of the nodes that are there."""
    from ray._private.state import available_resources_per_node

    return [dict(node) for node in available_resources_per_node().values()]


def possible_nodes() -> Nodes:
    """Return the resources of all nodes that the autoscaler may have, as far as it is known.

    KubeRay tells the cluster, and `ray up` leaves its configuration on the head, where jobs run.
    """
    from ray._private.state import state

    config = state.get_cluster_config()
    if config is not None and config.node_group_configs:
        groups = [(dict(g.resources), g.max_count) for g in config.node_group_configs]
        return _nodes(groups)
    return _nodes_of_ray_up(Path(_CONFIG_OF_RAY_UP).expanduser())


def _nodes_of_ray_up(path: Path) -> Nodes:
    import yaml

    try:
        config: Any = yaml.safe_load(path.read_text())
        most, kinds, head = (
            config[name] for name in ("max_workers", "available_node_types", "head_node_type")
        )
        workers = _nodes(
            [
                (kind.get("resources", {}), min(kind.get("max_workers", most), most))
                for name, kind in kinds.items()
                if name != head
            ]
        )
        if not any(kind.get("resources") for kind in kinds.values()):
            return []  # machines that are there, of which it does not say what they have
        # Not all kinds can be at their most at once; who needs GPUs asks for those that have them.
        largest = sorted(workers, key=lambda n: (n.get("GPU", 0), n.get("CPU", 0)), reverse=True)
        return [dict(kinds[head].get("resources", {})), *largest[:most]]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return []


def _nodes(groups: Sequence[tuple[dict[str, float], int]]) -> Nodes:
    counts = [count if count >= 0 else _MOST for _, count in groups]
    return [
        node
        for (node, _), count in zip(groups, counts, strict=True)
        for _ in range(min(count, _MOST))
    ]


def describe_nodes(nodes: Nodes) -> str:
    """Return nodes in words, those that are alike together."""
    alike = Counter(map(_text, nodes))
    return "; ".join(f"{n} × {one}" if n > 1 else one for one, n in alike.items()) or "no node"


def _text(node: Mapping[str, float]) -> str:
    shown: Sequence[str] = [n for n in ("CPU", "GPU") if node.get(n)]
    return " and ".join(f"{node[name]:g} {name}" for name in shown) or "no CPU"
