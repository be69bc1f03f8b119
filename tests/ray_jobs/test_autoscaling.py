"""GPU nodes are added for a training and removed after it; a lost one is replaced.

The training is paused after its first step, so that it cannot end before the test has looked at the
nodes, whatever the speed of the machine.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks.chaos import settings
from benchmarks.disturbed import Run
from tests.ray_jobs.autoscaling import autoscaling_cluster
from tests.ray_jobs.hosts import nodes_of, wait_until
from tests.ray_jobs.tiny import write_prepared

pytestmark = [pytest.mark.slow, pytest.mark.multiworker, pytest.mark.timeout(900)]
GPU_NODE = {"CPU": 2, "GPU": 1}
REMOVAL_TIMEOUT_S = 180


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A paused training of two workers with a GPU each, on a cluster whose head has none."""
    write_prepared(tmp_path / "prepared", {"train": 160, "validation": 40, "test": 5}, size=32)
    # The pause must not count as a hang.
    sections = settings(
        tmp_path / "prepared", use_gpu=True, resources_per_worker={}, hang_timeout_s=600
    )
    environment = {"RAY_AUTH_MODE": "token", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    with (
        patch.dict(os.environ, environment),
        autoscaling_cluster(tmp_path, GPU_NODE, max_nodes=2) as address,
    ):
        assert gpu_nodes(address) == []
        run = Run(tmp_path / "runs", "scaled", address, sections, tmp_path)
        run.pause()
        run.start()
        run.wait_for_step(1)
        yield run
        wait_until(lambda: gpu_nodes(address) == [], REMOVAL_TIMEOUT_S, "the nodes are removed")


def gpu_nodes(address: str) -> list[str]:
    """Return the ids of the nodes with a GPU."""
    return [node["NodeID"] for node in nodes_of(address) if node["Resources"].get("GPU")]


def raylet_of(node: str) -> int:
    """Return the process ID of a node's raylet on this machine."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = path.read_bytes().split(b"\0")
        if words[0].endswith(b"raylet") and f"--node_id={node}".encode() in words:
            return int(path.parent.name)
    raise AssertionError(f"node {node} has no raylet")


def test_gpu_nodes_are_added_for_a_training_and_removed_after_it(run):
    assert len(gpu_nodes(run.address)) == 2
    run.resume()
    run.wait()
    assert run.attempts() == 1


def test_a_lost_spot_node_is_replaced_and_the_run_finishes(run):
    before = set(gpu_nodes(run.address))
    os.kill(raylet_of(min(before)), signal.SIGKILL)
    run.wait_until(lambda: run.attempts() == 2, "a second attempt")
    after = set(gpu_nodes(run.address))
    assert len(after) == 2
    assert min(before) not in after
    run.resume()
    run.wait()
    assert run.attempts() == 2
