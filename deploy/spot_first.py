"""Choose which kind of node to add: spot first, on demand while no spot is to be had.

Read by the autoscaler on the head, which cluster.yaml tells so. Ray 2.60 knows which launches a
provider has refused, and does not count that against a kind of node: left alone, it asks for the
same spot nodes for ever.
"""

from typing import Any


def score(
    node_resources: dict[str, Any],
    resources: list[dict[str, Any]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> tuple[Any, ...] | None:
    """Return Ray's own score of a kind of node, and what decides between equal ones.

    Args:
        node_resources: of such a node.
        resources: that are waited for.
        node_type: its name, which ends in `spot` where the provider may take it back.
        node_availability_summary: the newest launch of each kind, if it was in the last half hour.
    """
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer

    usual = _default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    if usual is None:
        return None
    newest = node_availability_summary.node_availabilities.get(node_type)
    return (*usual, newest is None or newest.is_available, node_type.endswith("spot"))
