"""Choose the node type to add: spot first, on demand while there is no spot capacity.

The autoscaler on the head loads this module (see cluster.yaml). Ray 2.60 records the launches that
a provider has refused but ignores them when it chooses a node type, so it would request the same
spot nodes forever.
"""

from typing import Any


def score(
    node_resources: dict[str, Any],
    resources: list[dict[str, Any]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> tuple[Any, ...] | None:
    """Return Ray's own score of a node type, followed by tie-breakers.

    Args:
        node_resources: Resources of a node of this type.
        resources: Pending resource requests.
        node_type: Name of the type, which ends in `spot` if the provider can preempt its nodes.
        node_availability_summary: Latest launch of each type within the last half hour.
    """
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer

    usual = _default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    if usual is None:
        return None
    newest = node_availability_summary.node_availabilities.get(node_type)
    return (*usual, newest is None or newest.is_available, node_type.endswith("spot"))
