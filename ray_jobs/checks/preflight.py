"""Checks nodes, storage, data and weights within seconds before `train` or `tune` starts."""

import sys
from dataclasses import replace

from ray_jobs.checks import node_health, storage_access
from ray_jobs.checks.probe import clock, live_nodes, run_on_nodes
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Manifest


def preflight(spec: RunSpec, manifest: Manifest) -> None:
    """Check nodes, storage, data and weights if the cluster has more nodes than this one.

    Raises:
        JobError: If a check found an error; names all errors and their remedies.
    """
    import ray

    own = ray.get_runtime_context().get_node_id()
    nodes = live_nodes()
    if not spec.run.preflight or all(node.id == own for node in nodes):
        return
    answers, unavailable = run_on_nodes("nodes", nodes, clock)
    ready = list(answers)
    # A node that does not answer may only be busy; a job that needs it waits for it.
    found = [replace(finding, severity="warning") for finding in unavailable]
    found += node_health.versions(ready)
    found += storage_access.storage(spec, ready)
    found += storage_access.data(spec, manifest, ready, num_shards=0)
    found += storage_access.weights(spec, ready)
    for finding in found:
        if finding.severity == "warning":
            print(f"warning: {finding.sentence}", file=sys.stderr)
    if errors := [finding.sentence for finding in found if finding.severity == "error"]:
        raise JobError("\n".join(errors))
