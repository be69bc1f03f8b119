"""A node that is about to be preempted costs only the steps since the notice."""

import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks.chaos import settings
from benchmarks.disturbed import LocalCluster, Run
from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint_manager import CheckpointManager
from tests.ray_jobs.tiny import write_prepared

pytestmark = [pytest.mark.slow, pytest.mark.multiworker, pytest.mark.timeout(600)]
NOTICE_S = 120
STEPS_PER_EPOCH = 200


def announce_preemption(address: str, node: str) -> None:
    """Send the notice that a cloud's integration sends to Ray."""
    command = [
        f"{Path(sys.executable).parent}/ray", "drain-node", f"--address={address}",
        f"--node-id={node}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test",
        f"--deadline-remaining-seconds={NOTICE_S}",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)


def test_the_checkpoint_of_a_preemption_is_complete_before_the_node_goes(tmp_path):
    rows = {"train": 32 * STEPS_PER_EPOCH, "validation": 32, "test": 5}
    write_prepared(tmp_path / "prepared", rows, size=64, rows_per_group=50, rows_per_shard=400)
    # Otherwise, checkpoints are written only at the end of each epoch. A pause must not be a hang.
    sections = settings(
        tmp_path / "prepared", checkpoint_every_steps=None, epochs=1, hang_timeout_s=600
    )
    cluster = LocalCluster()
    try:
        run = Run(tmp_path / "runs", "preempted", cluster.cluster.address, sections, tmp_path)
        run.pause()
        with patch.dict(os.environ, {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}):
            run.start()
        run.wait_for_step(1)
        node, announced = cluster.nodes[1], time.monotonic()
        announce_preemption(run.address, node.node_id)
        run.resume()
        run.wait_for_checkpoint()
        run.pause()
        checkpoint = CheckpointManager(Folder(run.path)).newest()
        assert checkpoint is not None
        step = checkpoint.state.step
        assert 0 < step < STEPS_PER_EPOCH
        assert time.monotonic() - announced < NOTICE_S
        assert node.node_id in {n.node_id for n in cluster.cluster.list_all_nodes()}
        cluster.remove(1)
        cluster.add()
        run.resume()
        run.wait()
    finally:
        cluster.cluster.shutdown()
    assert run.attempts() == 2
    first, second = dict.fromkeys(pid for rank, pid, _ in run.steps() if rank == 0)
    assert min(taken for _, pid, taken in run.steps() if pid == second) == step + 1
    assert max(taken for _, pid, taken in run.steps() if pid == first) < STEPS_PER_EPOCH
    assert "a node was preempted" in run.log.read_text()
