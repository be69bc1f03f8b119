"""Makes the Ray Data datasets of a training run, and gives each worker its own rows of them.

The driver knows the step at which an attempt starts, so the datasets contain only what is still to
be read: the windows of the remaining steps and the rows of the remaining validations, without what
the cache keeps from earlier epochs.
"""

from collections.abc import Iterator
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ray.train import DataConfig, get_context, get_dataset_shard

from ray_jobs.config.prepare_spec import Split
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.cache import Kind
from ray_jobs.data.chunks import ReadPlan
from ray_jobs.data.loader import Feed, FeedOptions, ReadAhead, make_feeds
from ray_jobs.data.manifest import Manifest
from ray_jobs.data.ray_reading import Decode, places_dataset
from ray_jobs.data.sampler import TrainingSampler
from ray_jobs.train.reading_reservation import cpus_with_new_nodes, reserve_cpus

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset

T = TypeVar("T")


class RunData(DataConfig):
    """What the workers of an attempt read.

    Args:
        spec: The run's settings.
        manifest: The manifest of the prepared data.
        decode: Where images are decoded.
        cache: Kind of the cache.
        step: Completed steps at the start of the attempt.
        num_workers: Number of workers of the attempt.
        coordinator: The run's coordinator.
    """

    def __init__(
        self,
        spec: RunSpec,
        manifest: Manifest,
        decode: Decode,
        cache: Kind,
        step: int,
        num_workers: int,
        coordinator: Any,
    ) -> None:
        super().__init__()
        self.decode: Decode = decode
        self.cache: Kind = cache
        self._train, self._coordinator = spec.train, coordinator
        self._expected_cpus = cpus_with_new_nodes(spec.train, num_workers)
        self._make_feeds = partial(
            make_feeds, spec, manifest, FeedOptions.of(spec, manifest, decode)
        )
        sampler, epochs = TrainingSampler.of_run(spec, manifest), spec.train.epochs
        self._spans: dict[Split, tuple[int, int]] = {
            "train": (step, sampler.steps_before(epochs)),
            "validation": (sampler.epoch_of(step), epochs),
        }

    def datasets(self) -> dict[str, "Dataset"]:
        """Return the places of the chunks to read, as the trainer's datasets."""
        is_shared = self.cache == "object_store"
        plans = {s: self._plan(feed, is_shared) for s, feed in self._feeds(0, 1).items()}
        return {s: places_dataset(list(p.unread_places()), self.decode) for s, p in plans.items()}

    def configure(
        self, datasets: dict[str, "Dataset"], world_size: int, worker_handles: Any,
        worker_node_ids: list[str] | None, **kwargs: Any,
    ) -> list[dict[str, "DataIterator"]]:  # fmt: skip
        """Return, for each worker, an iterator over its rows of each dataset; called by Ray."""
        nodes = worker_node_ids or []
        is_shared = self._is_shared(len(set(nodes)) == 1)
        reserved = reserve_cpus(
            self._train, self.decode, nodes, self._expected_cpus, self._coordinator
        )
        workers = [self._feeds(rank, world_size) for rank in range(world_size)]
        return [
            {
                split: feed.dataset(
                    datasets[split], self._plan(feed, is_shared), reserved
                ).iterator()
                for split, feed in feeds.items()
                if split in datasets
            }
            for feeds in workers
        ]

    def start_reading(self, threads: Executor) -> dict[Split, ReadAhead]:
        """Return this worker's rows, and start to read those for training."""
        context = get_context()
        rank, num_workers = context.get_world_rank(), context.get_world_size()
        is_shared = self._is_shared(context.get_local_world_size() == num_workers)
        ahead: dict[Split, ReadAhead] = {}
        for split, feed in self._feeds(rank, num_workers).items():
            rows: Any = get_dataset_shard(split)
            items = feed.iterate(rows)
            if split == "train":
                items = _started(items, threads)
            ahead[split] = ReadAhead(items, self._spans[split][0], is_shared)
        return ahead

    def _feeds(self, rank: int, num_workers: int) -> dict[Split, Feed]:
        return {feed.chunks.split: feed for feed in self._make_feeds(rank, num_workers)}

    def _plan(self, feed: Feed, is_shared: bool) -> ReadPlan:
        return feed.plan(*self._spans[feed.chunks.split], self.cache != "none", is_shared)

    def _is_shared(self, on_one_node: bool) -> bool:
        """Whether all workers use the same cache."""
        return self.cache == "object_store" or on_one_node


def _started(items: Iterator[T], threads: Executor) -> Iterator[T]:
    """Return an iterator whose first item is computed in a thread."""
    first = threads.submit(next, items, None)

    def rest() -> Iterator[T]:
        if (item := first.result()) is not None:
            yield item
            yield from items

    return rest()
