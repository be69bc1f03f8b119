"""Writes shards in Ray tasks; an interrupted `prepare` resumes when it is started again.

A task that has written a shard stores the shard's facts under the fingerprint of its input.
Resuming needs no other state of the interrupted job, and shards whose input has changed are
rewritten.
"""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from pydantic import ValidationError

from ray_jobs.cluster import connection
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import Split
from ray_jobs.config.spec import RunSection
from ray_jobs.prepare.row_validation import Rows
from ray_jobs.prepare.shards.shard_plan import NewShard
from ray_jobs.prepare.shards.shard_writer import ShardFacts, ShardWriter
from ray_jobs.storage.atomic_write import PARTIAL
from ray_jobs.storage.folder import Folder

FOLDER = "_progress"
_NUM_THREADS = 16
_TASKS_PER_CPU = 2
_FINISH_TIMEOUT_S = 10.0
"""Time to wait for running tasks after an error or interrupt."""


def write_shards(
    rows: Rows, shards: Sequence[NewShard], writer: ShardWriter, run: RunSection
) -> Iterator[ShardFacts]:
    """Write the shards that an interrupted `prepare` has not written, and yield the facts of all.

    Raises:
        JobError: If a task fails or the output folder cannot be written.
    """
    from rich.progress import track

    finished = read_finished(writer.output) if shards else {}
    todo = []
    for split, index, chosen in shards:
        # Fingerprints take time, so compute them only if there is something to compare with.
        name = _entry_name(writer, split, index, rows.take(chosen)) if finished else ""
        if name in finished:
            yield finished[name]
        else:
            todo.append((split, index, chosen))
    if todo:
        with connection.connected(run.address, num_cpus=1, worker_logs=run.worker_logs):
            yield from track(
                _run_tasks(rows, todo, writer),
                description="Writing shards",
                total=len(todo),
                disable=not sys.stdout.isatty(),
                transient=True,
            )


def read_finished(output: Folder) -> dict[str, ShardFacts]:
    """Return the facts of the recorded shards that are complete, by entry name."""

    def read_entry(name: str) -> tuple[str, ShardFacts] | None:
        try:
            facts = ShardFacts.model_validate_json(output.read_bytes(name))
        except ValidationError:
            return None
        if facts.shard and not output.has_file(facts.shard.path, facts.shard.num_bytes):
            return None
        return name.removeprefix(f"{FOLDER}/").removesuffix(".json"), facts

    names = [name for name in output.names(FOLDER) if name.endswith(".json")]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        return dict(entry for entry in threads.map(read_entry, names) if entry)


def clear_progress(output: Folder) -> None:
    """Delete the recorded facts, and the partial files of killed writers."""
    output.delete(FOLDER)
    for name in list(output.names()):
        if name.endswith(PARTIAL):
            output.delete(name)


def _run_tasks(rows: Rows, shards: Sequence[NewShard], writer: ShardWriter) -> Iterator[ShardFacts]:
    """Write shards a few at a time, and yield the facts of each as it is written.

    Each task receives only the rows of its shard.
    """
    import ray
    from ray.exceptions import RayError

    task, shared = ray.remote(num_cpus=1)(_write_and_record), ray.put(writer)
    pending: list[ray.ObjectRef] = []

    def next_facts() -> ShardFacts:
        ready, pending[:] = ray.wait(pending)
        facts = ray.get(ready[0])
        if isinstance(facts, str):
            raise JobError(
                f"prepare.output={str(writer.output)!r} could not be written: {facts}; check free "
                "space and permissions, and run the same command again to resume"
            )
        return facts

    try:
        for split, index, chosen in shards:
            # Look up the CPUs each time, since a cluster may grow.
            if len(pending) >= _TASKS_PER_CPU * max(ray.cluster_resources().get("CPU", 1), 1):
                yield next_facts()
            pending.append(task.remote(shared, split, index, rows.take(chosen)))
        while pending:
            yield next_facts()
    except RayError as error:
        raise JobError(
            f"a task failed ({type(error).__name__}); set --run.worker_logs true to see its log"
        ) from error
    finally:
        if pending:
            # Otherwise they would write while a following job deletes or writes shards. Cancelling
            # a task that just ends or starts aborts this process (ray#54260, ray#54846).
            ray.wait(pending, num_returns=len(pending), timeout=_FINISH_TIMEOUT_S)


def _write_and_record(
    writer: ShardWriter, split: Split, index: int, rows: Rows
) -> ShardFacts | str:
    """Write and record a shard; return its facts, or the error if the folder cannot be written."""
    try:
        facts = writer.write(split, index, rows)
        name = f"{FOLDER}/{_entry_name(writer, split, index, rows)}.json"
        writer.output.write_text(name, facts.model_dump_json())
    except OSError as error:
        return str(error)
    return facts


def _entry_name(writer: ShardWriter, split: Split, index: int, rows: Rows) -> str:
    """Return the name of a shard's entry, from its position and the fingerprint of its input."""
    return f"{split}-{index:05d}-{writer.fingerprint(split, rows)}"
