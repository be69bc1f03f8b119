from collections.abc import Iterator
from typing import Any

import pytest

from ray_jobs.config.spec import TrainSpec
from ray_jobs.train.coordinator import make_coordinator
from ray_jobs.train.reading_reservation import reserve_cpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture
def cluster() -> Iterator[dict[str, str]]:
    """The node IDs of a head without CPUs, a node with a GPU and one without."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        names = {"gpu": {"num_cpus": 6, "num_gpus": 1}, "cpu": {"num_cpus": 4}}
        nodes = {name: cluster.add_node(**options).node_id for name, options in names.items()}
        ray.init(cluster.address)
        yield nodes
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.parametrize(
    ("decode", "num_workers", "cpus", "nodes"),
    [
        ("trainer", 2, 0.5, {"cpu"}),
        ("workers", 1, 4.0, {"cpu", "gpu"}),
        ("workers", 4, 1.0, {"cpu", "gpu"}),
    ],
)
def test_tasks_run_on_nodes_without_gpus_if_these_have_enough_cpus(
    cluster, decode, num_workers, cpus, nodes
):
    import ray

    workers, coordinator = [cluster["gpu"]] * num_workers, make_coordinator()
    reserved = reserve_cpus(TrainSpec(use_gpu=True), decode, workers, 0, coordinator)
    assert reserved is not None
    assert reserved.placement.wait(30)
    table: Any = ray.util.placement_group_table(reserved.placement)
    assert reserved.cpus == cpus
    assert set(table["bundles_to_node_id"].values()) == {cluster[name] for name in nodes}
    ray.kill(coordinator)
