"""Find, within seconds, problems that would break a job, and suggest remedies.

Reads prepared data, or if there are none yet, the data that `prepare` would read, and inspects the
cluster. Writes a few bytes into the storage path and deletes them.

Run:   python -m ray_jobs.doctor ray_jobs/specs/houses.yaml --address auto
       python -m ray_jobs.submit doctor ray_jobs/specs/houses.yaml

Prints one line per check, with a remedy if it found a problem. The exit status is 1 if a check
found an error. `train` and `tune` run the checks of nodes, storage and data automatically if the
cluster has nodes other than this one; --run.preflight false disables these checks.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack

from pydantic import PositiveInt

from ray_jobs.checks import collective, node_health, resources, storage_access
from ray_jobs.checks.finding import (
    Finding,
    from_message,
    ok,
    print_findings,
    require_no_error,
    skipped,
)
from ray_jobs.checks.local import working_directory
from ray_jobs.checks.probe import clock, live_nodes, run_on_nodes
from ray_jobs.cluster import connection
from ray_jobs.cluster.capacity import cpu_settings
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import MANIFEST, Manifest, read_manifest
from ray_jobs.prepare.dry_run import examine_inputs
from ray_jobs.prepare.findings import stored_findings
from ray_jobs.prepare.inputs import read_inputs
from ray_jobs.storage.folder import Folder
from ray_jobs.train.job import require_trainable, with_absolute_paths
from ray_jobs.tune.search.space import SearchSpec

_CONNECT_REMEDY = (
    "make `ray status` work here: with token authentication, set RAY_AUTH_MODE=token and the "
    "token, and use the Python and Ray versions of the cluster"
)


class DoctorSpec(SearchSpec):
    """A run, and options for its checks."""

    address: str | None = None
    """Shorthand for `run.address`."""
    working_dir: str | None = None
    """Folder to upload with a submitted job. Default: the project folder."""
    sample_shards: PositiveInt = 8
    """Shards that each node reads in full and compares with the manifest."""


def examine(spec: DoctorSpec) -> list[Finding]:
    """Print and return the findings of all checks.

    Raises:
        JobError: If a finding is an error.
    """
    found = print_findings(findings(spec))
    require_no_error(found)
    return found


def findings(spec: DoctorSpec) -> Iterator[Finding]:
    """Yield the findings of all checks, the fastest checks first."""
    spec = with_absolute_paths(spec)
    if spec.address:
        spec = spec.overlay({"run.address": spec.address})
    yield from working_directory(spec.working_dir)
    manifest, found = _check_data(spec)
    yield from found
    with ExitStack() as stack:
        try:
            stack.enter_context(_connection(spec))
        except JobError as failure:
            yield from_message("cluster", str(failure), _CONNECT_REMEDY)
            return
        yield from _check_cluster(spec, manifest)


def _check_data(spec: RunSpec) -> tuple[Manifest | None, list[Finding]]:
    """Return the manifest, and what `prepare` found or, without a manifest, would find."""
    folder = Folder(spec.data.prepared)
    try:
        manifest = read_manifest(folder)
        require_trainable(spec, manifest)
    except (JobError, OSError, ValueError) as failure:
        remedy = "run `python -m ray_jobs.prepare`, or correct data.prepared"
        missing = from_message("manifest", str(failure), remedy)
        return None, [missing, *_check_raw_data(spec, folder)]
    rows = ", ".join(f"{info.num_rows:,} {split}" for split, info in manifest.splits.items())
    summary = ok("manifest", f"{folder}: {rows} rows, all shards exist")
    return manifest, [summary, *stored_findings(manifest)]


def _check_raw_data(spec: RunSpec, folder: Folder) -> list[Finding]:
    try:
        if not spec.prepare.images or folder.exists(MANIFEST):
            return []
        return examine_inputs(read_inputs(spec)).findings
    except (JobError, OSError) as failure:
        return [from_message("prepare", str(failure))]


def _connection(spec: RunSpec) -> AbstractContextManager[None]:
    import ray

    address, train = spec.run.address or os.environ.get("RAY_ADDRESS"), spec.train
    # A local Ray starts with the run's size; the size of an existing one is checked later.
    exists = bool(address) or ray.is_initialized()
    return connection.connected(
        address,
        num_cpus=0 if exists else train.workers_range[0] * train.cpus_per_worker,
        data_cpus=0 if exists else 1,
        cpu_settings=cpu_settings(train),
        worker_logs=spec.run.worker_logs,
        object_store_memory=spec.data.object_store_memory,
    )


def _check_cluster(spec: DoctorSpec, manifest: Manifest | None) -> Iterator[Finding]:
    failed = False
    nodes = live_nodes()
    answers, unavailable = run_on_nodes("nodes", nodes, clock)
    ready = list(answers)
    for check in (
        unavailable,
        resources.workers(spec, nodes),
        resources.budgets(spec, manifest, nodes),
        node_health.versions(ready),
        node_health.clocks(ready),
        node_health.shared_memory(ready),
        storage_access.storage(spec, ready),
        storage_access.weights(spec, ready),
        storage_access.data(spec, manifest, ready, spec.sample_shards) if manifest else (),
        node_health.gpus(ready) if spec.train.use_gpu else (),
    ):
        for finding in check:
            failed |= finding.severity == "error"
            yield finding
    if spec.train.workers_range[1] == 1 and (spec.tune.workers_per_trial or 1) == 1:
        yield skipped("collective", "a single worker exchanges nothing")
    elif failed:
        yield skipped("collective", "it runs once the errors above are resolved")
    else:
        yield from collective.collective(spec)
