from ray_jobs.checks.storage_access import sample
from tests.ray_jobs.tiny import write_prepared


def test_nodes_read_different_shards_as_long_as_there_are_enough(tmp_path):
    manifest = write_prepared(tmp_path, {"train": 100, "validation": 100, "test": 100})
    read = sample(manifest, num_nodes=3, num_shards=4)
    assert [len(shards) for shards in read] == [4, 4, 4]
    assert len({shard.path for shards in read for shard in shards}) == 12
    assert len({shard.path for shards in sample(manifest, 9, 4) for shard in shards}) == 15
