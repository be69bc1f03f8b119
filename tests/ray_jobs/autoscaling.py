"""A cluster on this machine whose autoscaler adds and removes nodes."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from tests.ray_jobs.heads import free_ports
from tests.ray_jobs.hosts import wait_until


@contextmanager
def autoscaling_cluster(folder: Path, max_nodes: int, **nodes: dict[str, float]) -> Iterator[str]:
    """Start a head without CPUs, which adds nodes of some types, and yield its address.

    Args:
        folder: Folder for the configuration and the log.
        max_nodes: Maximum number of nodes of each type.
        nodes: Resources of a node by type.
    """
    port, dashboard, client = free_ports(3)
    from ray.autoscaler._private.fake_multi_node import node_provider

    head_id = node_provider.FAKE_HEAD_NODE_ID

    config = {
        "cluster_name": f"fake-{port}",
        "max_workers": max_nodes * len(nodes),
        "idle_timeout_minutes": 0.25,
        "upscaling_speed": 10.0,
        "provider": {
            "type": "external",
            "module": f"{node_provider.__name__}.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": head_id,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            **{
                name: {
                    "resources": node, "node_config": {}, "min_workers": 0,
                    "max_workers": max_nodes,
                }
                for name, node in nodes.items()
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
        f"--ray-client-server-port={client}",
    ]  # fmt: skip

    def listens() -> bool:
        assert head.poll() is None, (folder / "head.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", int(port))) == 0

    with open(folder / "head.log", "wb") as log:
        head = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until(listens, 60, "the head listens")
        yield f"127.0.0.1:{port}"
    finally:
        # End its whole session, which includes the nodes that it started.
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
