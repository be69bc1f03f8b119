"""Find in seconds what would stop a job, or spoil it, and say what mends it.

Reads: prepared data and the cluster; writes a few bytes into the storage path, and removes them.
Run:   python -m ray_jobs.doctor ray_jobs/specs/houses.yaml --address auto
       python -m ray_jobs.submit doctor ray_jobs/specs/houses.yaml

Each check is a line: whether all is well, and if not, what mends it. The exit status is 1 where one
of them found an error. `train` and `tune` look at nodes, storage and data by themselves where the
cluster has other nodes than this one (--run.preflight false leaves that out).
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack

from pydantic import PositiveInt

from ray_jobs.checks.finding import Finding, error, ok, skipped
from ray_jobs.checks.local import working_directory
from ray_jobs.cluster import connection
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Manifest, read_manifest
from ray_jobs.storage.folder import Folder

_LET_IN = (
    "`ray status` must work from here; with token authentication RAY_AUTH_MODE=token and the token "
    "are needed here, too, and Python and Ray must be those of the cluster"
)
_MARKS = {
    "ok": "[green]✓[/green]",
    "warning": "[bold yellow]![/bold yellow]",
    "error": "[bold red]✗[/bold red]",
    "skipped": "[dim]–[/dim]",
}


class DoctorSpec(RunSpec):
    """A run, and how its doctor looks at it."""

    address: str | None = None
    """Short for run.address."""
    working_dir: str | None = None
    """Folder that would go with a submitted job; by default the project's."""
    sample_shards: PositiveInt = 8
    """Shards that each node reads whole and compares with the manifest."""


def examine(spec: DoctorSpec) -> list[Finding]:
    """Print what each check finds, and return all of it.

    Raises:
        JobError: if there is an error among it.
    """
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    found = []
    for finding in findings(spec):
        found.append(finding)
        console.print(f"{_MARKS[finding.status]} {finding.check:<14} {escape(finding.text)}")
        if finding.remedy:
            console.print(f"  {'':<14} → {escape(finding.remedy)}")
    errors = [finding for finding in found if finding.status == "error"]
    if errors:
        several = f"{len(errors)} errors, the first: " if len(errors) > 1 else ""
        raise JobError(f"{several}{errors[0].sentence}")
    return found


def findings(spec: DoctorSpec) -> Iterator[Finding]:
    """Yield what each check finds, the quickest checks first."""
    from ray_jobs.train.job import with_absolute_paths

    spec = with_absolute_paths(spec)
    if spec.address:
        spec = spec.overlay({"run.address": spec.address})
    yield from working_directory(spec.working_dir)
    manifest, found = _manifest(spec)
    yield from found
    with ExitStack() as stack:
        try:
            stack.enter_context(_connection(spec))
        except JobError as failure:
            yield error("cluster", str(failure), _LET_IN)
            return
        yield from _on_cluster(spec, manifest)


def _connection(spec: RunSpec) -> AbstractContextManager[None]:
    import ray

    address, train = spec.run.address or os.environ.get("RAY_ADDRESS"), spec.train
    # A local Ray is made as large as the run's would be; one that is there is looked at later.
    is_there = bool(address) or ray.is_initialized()
    return connection.connected(
        address,
        num_cpus=0 if is_there else train.workers_range[0] * train.cpus_per_worker,
        data_cpus=0 if is_there else 1,
        worker_logs=spec.run.worker_logs,
        object_store_memory=spec.data.object_store_memory,
    )


def _on_cluster(spec: DoctorSpec, manifest: Manifest | None) -> Iterator[Finding]:
    from ray_jobs.checks import collective, resources, storage_access, versions
    from ray_jobs.checks.probe import probed

    failed = False
    with probed() as there:
        able, unable = versions.answering(there)
        checks = [
            unable,
            resources.workers(spec, there),
            resources.budgets(spec, manifest, there),
            versions.versions(able),
            versions.clocks(able),
            versions.shared_memory(able),
            storage_access.storage(spec, able),
            storage_access.weights(spec, able),
            storage_access.data(spec, manifest, able, spec.sample_shards) if manifest else (),
            versions.gpus(able) if spec.train.use_gpu else (),
        ]
        for check in checks:
            for finding in check:
                failed |= finding.status == "error"
                yield finding
    if spec.train.workers_range[1] == 1 and (spec.tune.workers_per_trial or 1) == 1:
        yield skipped("collective", "one worker exchanges nothing")
    elif failed:
        yield skipped("collective", "not tried before the errors above are mended")
    else:
        yield from collective.collective(spec)


def _manifest(spec: RunSpec) -> tuple[Manifest | None, list[Finding]]:
    """Return the manifest of the prepared data, and what is wrong with it as seen from here."""
    from ray_jobs.train.job import require_trainable

    folder = Folder(spec.data.prepared)
    try:
        manifest = read_manifest(folder)
        require_trainable(spec, manifest)
    except (JobError, OSError, ValueError) as failure:
        text, _, remedy = str(failure).partition("; ")
        remedy = remedy or "run `python -m ray_jobs.prepare`, or correct data.prepared"
        return None, [error("manifest", text, remedy)]
    rows = ", ".join(f"{info.num_rows:,} {split}" for split, info in manifest.splits.items())
    return manifest, [ok("manifest", f"{folder}: {rows} rows, every shard there")]
