"""A cluster on this machine whose autoscaler adds and removes nodes."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml


@contextmanager
def autoscaling_cluster(
    folder: Path, node: dict[str, float], max_nodes: int, idle_minutes: float = 0.25
) -> Iterator[str]:
    """Start a head without CPUs and yield its address.

    Args:
        folder: Folder for the configuration and the log.
        node: Resources of each node that the autoscaler adds.
        max_nodes: Maximum number of these nodes.
        idle_minutes: Idle time after which a node is removed.
    """
    port, dashboard = _free_port(), _free_port()
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID as head_id

    config = {
        "cluster_name": f"fake-{port}",
        "max_workers": max_nodes,
        "idle_timeout_minutes": idle_minutes,
        "upscaling_speed": 10.0,
        "provider": {
            "type": "external",
            "module": (
                "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
            ),
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": head_id,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": node, "node_config": {}, "min_workers": 0,
                "max_workers": max_nodes,
            },
        },
        "head_node_type": "ray.head.default",
        "auth": {}, "docker": {}, "initialization_commands": [], "setup_commands": [],
        "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
        "worker_start_ray_commands": [], "file_mounts": {}, "cluster_synced_files": [],
        "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
    }  # fmt: skip
    path = folder / "autoscaling.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = {
        **os.environ,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": head_id,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head_id,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
    }
    command = [
        f"{Path(sys.executable).parent}/ray", "start", "--head", "--block", f"--port={port}",
        "--num-cpus=0", f"--dashboard-port={dashboard}", f"--autoscaling-config={path}",
        f"--ray-client-server-port={_free_port()}",
    ]  # fmt: skip
    with open(folder / "head.log", "wb") as log:
        head = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait_for(port, head, folder / "head.log")
        yield f"127.0.0.1:{port}"
    finally:
        # End its whole session, which includes the nodes that it started.
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(port: int, head: subprocess.Popen[Any], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert head.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"the head does not listen: {log.read_text()}")
