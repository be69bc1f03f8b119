"""Training with two workers across hosts while a network cable is unplugged."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from benchmarks.chaos import distance, same, settings
from benchmarks.disturbed import SLOT, Run
from tests.ray_jobs.heads import TOKEN
from tests.ray_jobs.hosts import Host, hosts, nodes_of, ray_node, started, wait_until
from tests.ray_jobs.tiny import write_prepared

pytestmark = [pytest.mark.slow, pytest.mark.multiworker, pytest.mark.timeout(900)]
MIDDLE = 12
"""A step in the middle of the second of three epochs."""
SHORT_OUTAGE_S = 3.0
"""Too short for Ray to notice; TCP retransmits the lost packets."""
JOIN_TIMEOUT_S = 90.0
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Ray declares a node dead after about 10 s instead of 30 s.
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass
class Network:
    """A head and two workers; each host runs a Ray node."""

    head: Host
    workers: list[Host]
    prepared: Path
    folder: Path
    nodes: ExitStack

    def join(self, host: Host) -> None:
        """Start a Ray node with room for one worker on a host."""
        slot = f"--resources={json.dumps({SLOT: 1})}"
        command = ray_node(host, "--num-cpus=1", slot, head=self.head)
        self.nodes.enter_context(started(command, self.folder / f"{host.name}.log"))
        wait_until(lambda: host.address in self.alive(), JOIN_TIMEOUT_S, f"{host.address} joins")

    def run(self, name: str, **train: object) -> Run:
        """Start a run whose driver is on the head."""
        sections = settings(self.prepared, batch_norm="sync", **train)
        address, prefix = f"{self.head.address}:6379", tuple(self.head.command())
        run = Run(self.folder / "runs", name, address, sections, self.folder, prefix)
        run.start()
        return run

    def alive(self) -> set[str]:
        """Return the addresses of the live nodes."""
        found = nodes_of(f"{self.head.address}:6379", self.head.command())
        return {node["NodeManagerAddress"] for node in found}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    folder = tmp_path_factory.mktemp("hosts")
    write_prepared(folder / "prepared", {"train": 256, "validation": 64, "test": 8}, size=32)
    # A short path, since the path of a socket is limited in length.
    temporary = tempfile.mkdtemp(prefix="ray-")
    with patch.dict(os.environ, ENVIRONMENT), ExitStack() as stack:
        head, *workers = stack.enter_context(hosts(3))
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        command = ray_node(head, "--num-cpus=2", f"--temp-dir={temporary}")
        stack.enter_context(started(command, folder / "head.log"))
        network = Network(head, workers, folder / "prepared", folder, stack)
        for host in workers:
            network.join(host)
        yield network


@pytest.fixture(scope="module")
def expected(network: Network) -> dict[str, np.ndarray]:
    """The final weights of an undisturbed run across two hosts."""
    run = network.run("alone")
    run.wait_for_step(1)
    homes = [sum(run.pid_of(r) in h.processes() for r in (0, 1)) for h in network.workers]
    run.wait()
    assert homes == [1, 1]
    return run.weights()


def test_a_run_across_hosts_survives_a_short_outage(network, expected):
    run = network.run("short")
    run.wait_for_step(MIDDLE)
    network.workers[1].pull_cable()
    time.sleep(SHORT_OUTAGE_S)
    network.workers[1].plug_cable()
    run.wait()
    assert run.attempts() == 1
    assert same(run.weights(), expected)


def test_a_run_on_a_host_that_was_lost_and_returns_ends_with_the_same_bits(network, expected):
    run = network.run("back")
    run.wait_for_step(MIDDLE)
    host = network.workers[1]
    host.pull_cable()
    wait_until(lambda: host.address not in network.alive(), JOIN_TIMEOUT_S, "it is declared dead")
    host.plug_cable()
    network.join(host)
    run.wait()
    assert run.attempts() == 2
    assert same(run.weights(), expected)


def test_a_run_continues_on_the_remaining_host(network, expected):
    run = network.run("left", num_workers=[1, 2])
    run.wait_for_step(MIDDLE)
    host = network.workers[1]
    host.pull_cable()
    run.wait()
    assert run.attempts() == 2
    assert host.address not in network.alive()
    assert distance(run.weights(), expected) < 1e-4
