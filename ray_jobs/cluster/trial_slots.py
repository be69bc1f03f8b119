"""How many trials a cluster can hold at once, as it is and as its autoscaler may make it.

Imports Ray only when asked.
"""

from collections.abc import Mapping

from ray_jobs.cluster.node_inventory import Nodes, current_nodes, describe_nodes, possible_nodes
from ray_jobs.config.errors import JobError


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
    from ray_jobs.cluster.connection import is_our_own

    there, possible = current_nodes(), possible_nodes()
    slots = max(
        trials_that_fit(there, bundle, num_workers), trials_that_fit(possible, bundle, num_workers)
    )
    if not slots and not possible and wanted and not is_our_own():
        return wanted
    if slots:
        return slots
    needs = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    has = describe_nodes(there)
    if possible:
        has += f", its autoscaler at most {describe_nodes(possible)}"
    elif not is_our_own():
        has += " (if an autoscaler adds nodes, tune.max_concurrent_trials says for how many trials)"
    raise JobError(
        f"a trial needs {num_workers} × ({needs}), each on one node, and the cluster has {has}; "
        "lower tune.workers_per_trial, train.cpus_per_worker or tune.gpus_per_worker, or add nodes"
    )


def trials_that_fit(nodes: Nodes, bundle: Mapping[str, float], num_workers: int) -> int:
    """Return how many trials some nodes hold; a process does not spread over two of them."""
    wanted = {name: amount for name, amount in bundle.items() if amount}

    def fit(node: Mapping[str, float]) -> int:
        # As Ray counts them: in units of 0.0001.
        return min(
            round(node.get(name, 0) * 10_000) // max(round(amount * 10_000), 1)
            for name, amount in wanted.items()
        )

    return sum(map(fit, nodes)) // num_workers
