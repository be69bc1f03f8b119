"""Nodes are added for a training and removed after it; a lost one is replaced.

Where a training could end before the test has looked at the nodes, it is paused after its first
step or has too many epochs to end.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from benchmarks.chaos import settings
from benchmarks.disturbed import Run
from tests.ray_jobs.autoscaling import autoscaling_cluster
from tests.ray_jobs.hosts import nodes_of, started, wait_until
from tests.ray_jobs.tiny import write_prepared

pytestmark = [pytest.mark.slow, pytest.mark.multiworker, pytest.mark.timeout(900)]
GPU_NODE = {"CPU": 2, "GPU": 1}
SMALL_GPU_NODE = {"CPU": 1, "GPU": 1}
CPU_NODE = {"CPU": 4}
REMOVAL_TIMEOUT_S = 180


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """A function that starts a training of GPU workers on a cluster whose head has no resources.

    After the test, all nodes must be removed.
    """
    write_prepared(tmp_path / "prepared", {"train": 192, "validation": 48, "test": 5}, size=32)
    environment = {"RAY_AUTH_MODE": "token", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    runs: list[Run] = []

    def start_on(address: str, data: dict[str, Any], **train: Any) -> Run:
        assert nodes(address) == {}
        # A pause must not count as a hang.
        options = {"use_gpu": True, "resources_per_worker": {}, "hang_timeout_s": 600, **train}
        sections = settings(tmp_path / "prepared", **options)
        sections["data"] |= data
        runs.append(Run(tmp_path / "runs", "scaled", address, sections, tmp_path))
        return runs[0]

    with patch.dict(os.environ, environment):
        yield start_on


def nodes(address: str) -> dict[str, dict[str, float]]:
    """Return the resources of all nodes but the head, by ID."""
    return {
        node["NodeID"]: node["Resources"]
        for node in nodes_of(address)
        if node["Resources"].get("CPU")
    }


def wait_for_removal(address: str) -> None:
    wait_until(lambda: nodes(address) == {}, REMOVAL_TIMEOUT_S, "the nodes are removed")


def kill(node: str) -> None:
    """Kill a node's raylet on this machine."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = path.read_bytes().split(b"\0")
        if words[0].endswith(b"raylet") and f"--node_id={node}".encode() in words:
            os.kill(int(path.parent.name), signal.SIGKILL)
            return
    raise AssertionError(f"node {node} has no raylet")


def test_cpu_nodes_are_added_for_decoding_and_all_nodes_are_removed_after_it(start, tmp_path):
    with autoscaling_cluster(tmp_path, 2, gpu=SMALL_GPU_NODE, cpu=CPU_NODE) as address:
        run = start(address, {"decode": "workers"})
        run.pause()
        run.start()
        run.wait_for_step(1)
        added = list(nodes(address).values())
        assert sorted(node.get("GPU", 0) for node in added) == [0, 1, 1]
        run.resume()
        run.wait()
        assert run.attempts() == 1
        wait_for_removal(address)


def test_a_lost_spot_node_is_replaced_and_the_run_finishes(start, tmp_path):
    with autoscaling_cluster(tmp_path, 2, gpu=GPU_NODE) as address:
        run = start(address, {})
        run.pause()
        run.start()
        run.wait_for_step(1)
        before = set(nodes(address))
        kill(min(before))
        run.wait_until(lambda: run.attempts() == 2, "a second attempt")
        after = set(nodes(address))
        assert len(after) == 2
        assert min(before) not in after
        run.resume()
        run.wait()
        assert run.attempts() == 2
        wait_for_removal(address)


def test_a_training_and_a_search_both_get_the_nodes_that_they_request(start, tmp_path):
    endless = {"epochs": 100_000, "patience": 100_000, "checkpoint_every_steps": None}
    with autoscaling_cluster(tmp_path, 5, gpu=GPU_NODE) as address:
        run = start(address, {}, num_workers=[1, 2], wait_for_workers_s=0, **endless)
        spec = {
            **run.settings,
            "run": {"storage_path": str(tmp_path / "searches"), "name": "search"},
            "tune": {
                "space": {"train.learning_rate": {"uniform": [1e-4, 1e-3]}},
                "scheduler": "fifo",
                "budget": {"trials": 2},
                "max_concurrent_trials": 2,
            },
        }
        file = tmp_path / "search.yaml"
        file.write_text(yaml.safe_dump(spec))
        command = [sys.executable, "-m", "ray_jobs.tune", str(file)]
        environment = {**os.environ, "RAY_ADDRESS": address}
        with started(command, tmp_path / "search.log", env=environment) as search:
            wait_until(lambda: len(nodes(address)) == 2, 180, "nodes for the search")
            run.start()
            run.wait_until(lambda: run.num_workers() == 2, "two workers")
            assert len(nodes(address)) == 4
            search.send_signal(signal.SIGINT)
            assert search.wait(120) == 130
        run.driver.send_signal(signal.SIGINT)
        assert run.driver.wait(120) == 130
        wait_for_removal(address)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_range_of_workers_starts_small_grows_and_gets_a_lost_node_back(start, tmp_path, end):
    with autoscaling_cluster(tmp_path, 3, gpu=GPU_NODE) as address:
        run = start(
            address, {}, num_workers=[1, 3], global_batch_size=24, wait_for_workers_s=0,
            epochs=100_000, patience=100_000, checkpoint_every_steps=None,
        )  # fmt: skip
        run.start()
        run.wait_until(lambda: bool(run.steps()), "the first step")
        assert run.num_workers() == 1
        run.wait_until(lambda: run.num_workers() == 3, "three workers")
        before, attempts = set(nodes(address)), run.attempts()
        kill(min(before))
        run.wait_until(
            lambda: run.attempts() > attempts and run.num_workers() == 3, "three workers again"
        )
        assert min(before) not in nodes(address)
        assert len(nodes(address)) == 3
        run.driver.send_signal(end)
        run.driver.wait(120)
        wait_for_removal(address)
