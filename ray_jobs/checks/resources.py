"""Checks whether the cluster, now or grown by its autoscaler, is large enough for a job."""

from collections.abc import Iterator, Sequence

from ray_jobs.checks.finding import Finding, error, from_message, ok, warning
from ray_jobs.checks.probe import Node
from ray_jobs.cluster.capacity import trial_slots, worker_resources, workers_that_fit
from ray_jobs.cluster.node_inventory import describe_nodes, describe_resources, possible_nodes
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Manifest


def workers(spec: RunSpec, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Check that the workers of a training run and the trials of a search can start."""
    train = spec.train
    low, high = train.workers_range
    current, possible = [node.resources for node in nodes], possible_nodes()
    fit_now, fit_later = workers_that_fit(current, train), workers_that_fit(possible, train)
    resources = describe_resources(worker_resources(train))
    needed = f"{low} workers with {resources} each" if low > 1 else f"a worker with {resources}"
    if max(fit_now, fit_later) < low:
        has = describe_nodes(current)
        if possible:
            has += f", or with the autoscaler {describe_nodes(possible)},"
        yield error(
            "workers",
            f"train.num_workers={low}: the cluster has {has} and cannot run {needed} with one CPU "
            "left for Ray Data",
            "lower train.num_workers, train.cpus_per_worker or train.gpus_per_worker, or add nodes",
        )
    elif fit_now < low:
        yield ok("workers", f"the cluster can run {needed} once the autoscaler has added nodes")
    else:
        more = f", up to {min(high, max(fit_now, fit_later))}" if high > low else ""
        yield ok("workers", f"the cluster can run {needed}{more}, with one CPU left for Ray Data")
    if spec.tune.space:
        yield _trials(spec)


def _trials(spec: RunSpec) -> Finding:
    tune, train = spec.tune, spec.train
    bundle = worker_resources(train, tune.gpus_per_worker)
    num_workers = tune.workers_per_trial or train.workers_range[0]
    try:
        slots = trial_slots(bundle, num_workers, tune.max_concurrent_trials)
    except JobError as failure:
        return from_message("trials", str(failure))
    return ok("trials", f"{slots} can run at the same time")


def budgets(spec: RunSpec, manifest: Manifest | None, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Check the memory budgets of the `data` section against the nodes."""
    data = spec.data
    code = "budgets"
    store = sum(node.resources.get("object_store_memory", 0) for node in nodes)
    memory = sum(node.resources.get("memory", 0) for node in nodes)
    # Nodes that an autoscaler adds bring more of both.
    make = warning if len(possible_nodes()) > len(nodes) else error
    found = []
    if data.object_store_memory and data.object_store_memory > store:
        text = (
            f"data.object_store_memory={data.object_store_memory} exceeds the {store:.0f} bytes of "
            "the current nodes"
        )
        found.append(make(code, text, "lower it, or raise --object-store-memory of `ray start`"))
    if data.cache == "object_store" and manifest is not None:
        cached = min(data.cache_bytes, decoded_bytes(spec, manifest))
        # The other half is for blocks in transit.
        if cached > store / 2:
            text = (
                f"data.cache=object_store would store {cached} bytes of decoded rows, more than "
                f"half of the object store ({store:.0f} bytes)"
            )
            remedy = "set data.cache=disk, lower data.cache_bytes, or enlarge the object store"
            found.append(make(code, text, remedy))
    if data.buffer_bytes > memory / 2:
        text = (
            f"data.buffer_bytes={data.buffer_bytes} exceeds half of the workers' memory "
            f"({memory:.0f} bytes)"
        )
        found.append(warning(code, text, "lower it"))
    store_gb, memory_gb = store / 1e9, memory / 1e9
    yield from found or [ok(code, f"{store_gb:.1f} GB object store, {memory_gb:.1f} GB memory")]


def decoded_bytes(spec: RunSpec, manifest: Manifest) -> int:
    """Return the bytes of all decoded training and validation rows."""
    from ray_jobs.data.decoder import RowDecoder

    decoder = RowDecoder(manifest, with_image=True, size=spec.data.image_size)
    rows = sum(manifest.splits[split].num_rows for split in ("train", "validation"))
    return rows * decoder.row_bytes
