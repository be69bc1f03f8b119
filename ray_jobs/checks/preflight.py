"""What `train` and `tune` look at by themselves, in seconds, before work starts."""

import sys
from dataclasses import replace

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Manifest


def preflight(spec: RunSpec, manifest: Manifest) -> None:
    """Check nodes, storage, data and weights, where the cluster has other nodes than this one.

    Raises:
        JobError: with all errors that were found, and what mends them.
    """
    import ray

    from ray_jobs.checks import storage_access, versions
    from ray_jobs.checks.probe import probed

    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    if not spec.run.preflight or not others:
        return
    with probed() as there:
        able, silent = versions.answering(there)
        # A node may only be busy; who needs it will wait for it.
        found = [replace(finding, status="warning") for finding in silent]
        found += versions.versions(able)
        found += storage_access.storage(spec, able)
        found += storage_access.data(spec, manifest, able, num_shards=0)
        found += storage_access.weights(spec, able)
    for finding in found:
        if finding.status == "warning":
            print(f"warning: {finding.sentence}", file=sys.stderr)
    if errors := [finding.sentence for finding in found if finding.status == "error"]:
        raise JobError("\n".join(errors))
