from typing import Any

import pytest

from ray_jobs.config.spec import DataSpec
from ray_jobs.data.chunks import (
    Chunks,
    EvaluationChunks,
    GroupKey,
    ReadPlan,
    TrainingChunks,
    keys_of,
)
from tests.ray_jobs.feeds import sampler_of

EPOCHS = 4


def chunks_of(manifest: Any, split: str, rank: int, num_workers: int) -> Chunks:
    if split == "train":
        return TrainingChunks(sampler_of(manifest), rank, num_workers)
    info, data = manifest.splits["validation"], DataSpec(shuffle_window_rows=8 * num_workers)
    return EvaluationChunks("validation", info, 4, rank, num_workers, data)


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("num_cached", [0, 3, 1000])
@pytest.mark.parametrize(("split", "num_workers"), [("train", 1), ("train", 4), ("validation", 2)])
@pytest.mark.parametrize("start", [0, 3])
def test_a_plan_reads_what_neither_the_previous_chunk_nor_the_cache_has(
    manifest, split, num_workers, num_cached, is_shared, start
):
    workers = [chunks_of(manifest, split, rank, num_workers) for rank in range(num_workers)]
    stop = sampler_of(manifest).steps_before(EPOCHS) if split == "train" else EPOCHS
    cacheable = frozenset(sorted(workers[0].all_groups)[:num_cached])
    plans = [ReadPlan(chunks, start, stop, cacheable, is_shared) for chunks in workers]
    caches: list[set[GroupKey]] = [set() for _ in workers]
    held: list[set[GroupKey]] = [set() for _ in workers]
    first = workers[0].first_epoch(start)
    unread = set(plans[0].unread_places()) if num_workers == 1 or is_shared else None
    earlier, epoch = [set[GroupKey]() for _ in workers], -1
    for place in plans[0].places():
        known = set().union(*caches) if is_shared else set()
        if place.epoch > epoch:
            epoch, earlier = place.epoch, [cache | known for cache in caches]
        for rank, (plan, chunks) in enumerate(zip(plans, workers, strict=True)):
            missing, wanted = set(plan.missing(place)), keys_of(chunks.ranges(place))
            assert wanted <= missing | held[rank] | caches[rank] | known
            if start == 0:
                assert not missing & earlier[rank]
            if num_workers == 1 and unread is not None and missing:
                assert place in unread
            held[rank] = set(wanted)
            caches[rank] |= missing & cacheable
    if num_cached == 1000 and is_shared and unread is not None:
        assert max(place.epoch for place in unread) <= first + 1
