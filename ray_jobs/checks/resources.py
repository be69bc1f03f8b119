"""Whether the cluster, or what its autoscaler may make of it, is large enough for a job."""

from collections.abc import Iterator, Sequence

from ray_jobs.checks.finding import Finding, error, ok, warning
from ray_jobs.checks.probe import Node
from ray_jobs.cluster.capacity import worker_resources, workers_that_fit
from ray_jobs.cluster.node_inventory import describe_nodes, possible_nodes
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Manifest


def workers(spec: RunSpec, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Check that the workers of a training, and the trials of a search, can ever start."""
    train = spec.train
    least, most = train.workers_range
    there, possible = [node.resources for node in nodes], possible_nodes()
    room, room_later = workers_that_fit(there, train), workers_that_fit(possible, train)
    needs = " and ".join(f"{n:g} {name}" for name, n in worker_resources(train).items())
    wanted = f"{least} workers of {needs}" if least > 1 else f"a worker of {needs}"
    if max(room, room_later) < least:
        text = f"{wanted}, each on one node, and a CPU for Ray Data do not fit on "
        text += describe_nodes(there)
        if possible:
            text += f", nor on what the autoscaler may add: {describe_nodes(possible)}"
        yield error(
            "workers",
            text,
            "lower train.num_workers, train.cpus_per_worker or train.gpus_per_worker, or add nodes",
        )
    elif room < least:
        yield ok("workers", f"{wanted} fit once the autoscaler has added nodes")
    else:
        more = f", up to {min(most, max(room, room_later))} of them" if most > least else ""
        yield ok("workers", f"{wanted} fit{more}, with a CPU for Ray Data")
    if spec.tune.space:
        yield from _trials(spec)


def _trials(spec: RunSpec) -> Iterator[Finding]:
    from ray_jobs.cluster.trial_slots import trial_slots
    from ray_jobs.tune.trials.trial_workers import member_resources

    tune = spec.tune
    bundle = member_resources(spec.train, tune.gpus_per_worker)
    num_workers = tune.workers_per_trial or spec.train.workers_range[0]
    try:
        slots = trial_slots(bundle, num_workers, tune.max_concurrent_trials)
    except JobError as failure:
        text, _, remedy = str(failure).partition("; ")
        yield error("trials", text, remedy)
    else:
        yield ok("trials", f"{slots} of them can run at once")


def budgets(spec: RunSpec, manifest: Manifest | None, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Check what the data's settings ask for against memory and object store of the nodes."""
    data = spec.data
    store = sum(node.resources.get("object_store_memory", 0) for node in nodes)
    memory = sum(node.resources.get("memory", 0) for node in nodes)
    # Nodes that an autoscaler adds bring more of both.
    make = warning if len(possible_nodes()) > len(nodes) else error
    problems = []
    if data.object_store_memory and data.object_store_memory > store:
        problems.append(
            make(
                "budgets",
                f"data.object_store_memory={data.object_store_memory} is more than the "
                f"{store:.0f} bytes of the nodes that are there",
                "lower it, or start Ray with a larger --object-store-memory",
            )
        )
    if data.cache == "object_store" and manifest is not None:
        kept = min(data.cache_bytes, decoded_bytes(spec, manifest))
        # The other half is for what flows through it.
        if kept > store / 2:
            problems.append(
                make(
                    "budgets",
                    f"data.cache=object_store would keep {kept} bytes of decoded rows, more than "
                    f"half of the {store:.0f} bytes of object store that is there",
                    "set data.cache=disk, lower data.cache_bytes, or enlarge the store",
                )
            )
    if data.buffer_bytes > memory / 2:
        problems.append(
            warning(
                "budgets",
                f"data.buffer_bytes={data.buffer_bytes} is more than half of the {memory:.0f} "
                "bytes of memory that the nodes give to workers",
                "lower data.buffer_bytes",
            )
        )
    yield from problems
    if not problems:
        yield ok(
            "budgets", f"{store / 1e9:.1f} GB of object store, {memory / 1e9:.1f} GB beside it"
        )


def decoded_bytes(spec: RunSpec, manifest: Manifest) -> int:
    """Return the bytes of all decoded rows of training and validation."""
    from ray_jobs.data.reader import RowDecoder

    decoder = RowDecoder(manifest, with_image=True, size=spec.data.image_size)
    rows = sum(manifest.splits[split].num_rows for split in ("train", "validation"))
    return rows * decoder.row_bytes
