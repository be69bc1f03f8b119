"""Reads the chunks of a worker in Ray Data tasks.

A dataset has a row for each chunk, its place. `read_dataset` maps it to the rows of one worker:

    trainer   the rows of the row groups that `ReadPlan.missing` returns, still encoded
    workers   the rows of the batches, decoded

Ray Data may cut the rows into blocks of any size.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from ray_jobs.config.spec import DataSpec
from ray_jobs.data.batch import WEIGHT
from ray_jobs.data.chunks import Chunks, GroupKey, Place, ReadPlan
from ray_jobs.data.decoder import Batch, RowDecoder
from ray_jobs.data.prefetch import prefetch_map
from ray_jobs.data.reader import ShardReader

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset
    from ray.util.placement_group import PlacementGroup

Decode = Literal["workers", "trainer"]

_MAX_TASKS = {"trainer": 32, "workers": 256}
"""Maximum per dataset: Ray Data takes 2 ms per task before it starts the first one."""
MAX_CPUS = {"trainer": 1, "workers": 8}
"""Maximum number of CPUs for the tasks of a worker, by where images are decoded. One task at a time
reads encoded rows of a split, several shards at once."""
_BLOCK_BYTES = {"encoded": 32 << 20, "decoded": 8 << 20}
"""By default, Ray Data collects 128 MiB before it returns the first row."""


@dataclass(frozen=True)
class ReservedCpus:
    """CPUs that are reserved for the tasks of a dataset.

    Args:
        placement: Placement group with a bundle of `cpus` CPUs for each dataset.
        cpus: CPUs for the tasks that run at the same time.
    """

    placement: "PlacementGroup"
    cpus: float


def places_dataset(places: Sequence[Place], decode: Decode) -> "Dataset":
    """Return a dataset of places, in order."""
    import ray.data

    items = [asdict(place) for place in places]
    dataset = ray.data.from_items(
        items, override_num_blocks=min(len(items), _MAX_TASKS[decode]) or 1
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return dataset


def read_dataset(
    places: "Dataset",
    reader: ShardReader,
    plan: ReadPlan,
    decoder: RowDecoder | None,
    num_workers: int,
    data: DataSpec,
    num_reads: int,
    reserved: ReservedCpus | None,
) -> "Dataset":
    """Return the dataset of one worker's rows.

    Args:
        places: Dataset of the places of all chunks.
        reader: Reader of the split.
        plan: What is read for each chunk.
        decoder: Decodes the rows in the dataset; None leaves that to the worker.
        num_workers: Number of workers that read at the same time.
        data: The `data` section.
        num_reads: Number of chunks that a task reads at the same time if it does not decode.
        reserved: CPUs for the tasks; None runs them wherever Ray likes, without CPUs of their own.
    """
    from ray.data import ExecutionOptions, ExecutionResources

    concurrency = _concurrency(decoder is not None, num_workers, reserved)
    # To Ray Data, the tasks need no CPU. Otherwise, it would divide the CPUs of the cluster among
    # all datasets, and request more nodes, of any kind, from an autoscaler.
    options: dict[str, Any] = {
        "batch_size": None,
        "batch_format": "pyarrow",
        "num_cpus": 0,
        "concurrency": min(concurrency, places.count()) or 1,
    }
    if reserved is not None:
        options["ray_remote_args_fn"] = _TaskOptions(reserved, concurrency)
    if decoder is None:
        dataset = places.map_batches(_ReadGroups(reader, plan, num_reads), **options)
        dataset.context.target_max_block_size = _BLOCK_BYTES["encoded"]
    else:
        # One stage: Ray Data does not fuse stages whose options are a function.
        read = _ReadBatches(reader, plan.chunks, plan.start, plan.stop, decoder)
        dataset = places.map_batches(read, **options)
        dataset.context.target_max_block_size = _BLOCK_BYTES["decoded"]
    limit = data.object_store_memory
    if limit is None and decoder is None:
        limit = data.buffer_bytes
    if limit is not None:
        dataset.context.execution_options = ExecutionOptions(
            preserve_order=True,
            resource_limits=ExecutionResources(object_store_memory=limit / num_workers),
        )
    return dataset


def read_chunks(
    reader: ShardReader, plan: ReadPlan, places: Iterable[Place], num_reads: int
) -> Iterator[pa.Table]:
    """Yield the row groups that a plan has to read for each chunk, unless there are none.

    Args:
        reader: Reader of the split.
        plan: What is read for each chunk.
        places: The places of the chunks.
        num_reads: Number of chunks that are read at the same time.
    """

    def read(keys: Sequence[GroupKey]) -> pa.Table:
        tables = reader.read_keys(keys)
        return pa.concat_tables([tables[key] for key in keys])

    to_read = (keys for place in places if (keys := plan.missing(place)))
    with ThreadPoolExecutor(num_reads, "feed-chunks") as threads:
        yield from prefetch_map(read, to_read, threads, num_reads - 1)


def iterate_rows(
    rows: "DataIterator", decode: Decode, batch_size: int, prefetch_batches: int
) -> Iterator[Any]:
    """Return an iterator over a dataset of `read_dataset`.

    Returns:
        Blocks of encoded rows if the trainer decodes, otherwise batches.
    """
    whole_block: Any = None
    batches: Any = rows.iter_batches(
        batch_size=whole_block if decode == "trainer" else batch_size,
        batch_format="pyarrow" if decode == "trainer" else "numpy",
        prefetch_batches=1 if decode == "trainer" else prefetch_batches,
    )
    return iter(batches)


class GroupStream:
    """Takes row groups, one after the other, from blocks of encoded rows.

    Args:
        blocks: The blocks of a dataset, in order.
        reader: Reader of the split.
    """

    def __init__(self, blocks: Iterator[pa.Table], reader: ShardReader) -> None:
        self._blocks, self._shards = blocks, reader.shards
        self._rest: pa.Table | None = None

    def take(self, keys: Sequence[GroupKey]) -> dict[GroupKey, pa.Table]:
        """Return the next row groups, which are these, without copying them."""
        return {(s, g): self._take_rows(self._shards[s].row_groups[g]) for s, g in keys}

    def _take_rows(self, num_rows: int) -> pa.Table:
        parts = []
        while num_rows:
            block = self._rest or next(self._blocks)
            parts.append(block.slice(0, num_rows))
            self._rest = block.slice(num_rows)
            num_rows -= parts[-1].num_rows
        return pa.concat_tables(parts)


def _concurrency(decodes: bool, num_workers: int, reserved: ReservedCpus | None) -> int:
    """Return how many tasks of a dataset run at the same time."""
    import ray

    if not decodes:
        return 1
    if reserved is not None:
        # Twice as many tasks as CPUs: those of the other split mostly wait for the worker.
        return max(1, math.floor(2 * reserved.cpus))
    num_cpus = ray.cluster_resources().get("CPU", 1)
    return max(1, min(MAX_CPUS["workers"], math.floor(num_cpus / num_workers) - 1))


@dataclass(frozen=True)
class _TaskOptions:
    """Returns the options with which Ray runs a task."""

    reserved: ReservedCpus
    concurrency: int

    def __call__(self) -> dict[str, Any]:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return {
            "num_cpus": self.reserved.cpus / self.concurrency,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.reserved.placement),
        }


@dataclass(frozen=True)
class _ReadGroups:
    """Reads the row groups of chunks."""

    reader: ShardReader
    plan: ReadPlan
    num_reads: int

    def __call__(self, places: pa.Table) -> Iterator[pa.Table]:
        return read_chunks(self.reader, self.plan, _places_in(places), self.num_reads)


@dataclass(frozen=True)
class _ReadBatches:
    """Reads and decodes the batches of chunks in order."""

    reader: ShardReader
    chunks: Chunks
    start: int
    stop: int
    decoder: RowDecoder

    def __call__(self, places: pa.Table) -> Iterator[Batch]:
        for place in _places_in(places):
            chunk = self.chunks.chunk(place, self.start, self.stop)
            stored = self.reader.read(chunk.ranges)
            for step, rows in enumerate(chunk.batches_SB):
                batch = self.decoder.decode(stored.rows(rows))
                batch[WEIGHT][chunk.is_padding(step)] = 0.0
                yield batch


def _places_in(places: pa.Table) -> Iterator[Place]:
    return (Place(**row) for row in places.to_pylist())
