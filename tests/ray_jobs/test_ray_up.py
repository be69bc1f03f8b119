"""`ray up` with `deploy/on_premise.yaml`, a job on that cluster, and `ray down`."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from tests.ray_jobs.heads import TOKEN
from tests.ray_jobs.hosts import Machine, end_processes, hosts, ssh_server, started, wait_until
from tests.ray_jobs.tiny import write_prepared

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
RAY = f"{sys.prefix}/bin/ray"
DASHBOARD_TIMEOUT_S = 90
SHUTDOWN_TIMEOUT_S = 180
"""`ray down` stops the head; a worker without a head ends after a minute."""


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    """A laptop, a head and a worker; the laptop can log in to the other two."""
    key = tmp_path / "key"
    with ExitStack() as stack:
        all_hosts = stack.enter_context(hosts(3))
        if not shutil.which("rsync"):
            pytest.skip("needs rsync")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        machines = [Machine(host, tmp_path / host.name) for host in all_hosts]
        for machine in machines[1:]:
            # The environment that the set-up commands would install.
            (machine.home / "multimodal-ray").mkdir(parents=True)
            (machine.home / "multimodal-ray/venv").symlink_to(sys.prefix)
            stack.enter_context(ssh_server(machine, key.with_suffix(".pub")))
        (machines[0].home / ".ray").mkdir(parents=True)
        (machines[0].home / ".ray/auth_token").write_text(TOKEN)
        yield machines


def test_ray_up_starts_a_cluster_that_runs_a_job_and_ray_down_ends_all_processes(
    machines, tmp_path
):
    laptop, head, worker = machines
    cluster = yaml.safe_load((ROOT / "deploy/on_premise.yaml").read_text())
    cluster["provider"] |= {"head_ip": head.host.address, "worker_ips": [worker.host.address]}
    cluster["auth"] |= {"ssh_user": "root", "ssh_private_key": str(tmp_path / "key")}
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(cluster))

    def run(*words: str) -> None:
        command = laptop.command(*words)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    write_prepared(tmp_path / "prepared", {"train": 40, "validation": 20, "test": 5})
    train = {
        "data.prepared": tmp_path / "prepared",
        "run.storage_path": tmp_path / "runs",
        "run.name": "submitted",
        "model.image.kind": "tiny",
        "model.image.weights": "none",
        "train.global_batch_size": 8,
        "train.epochs": 1,
    }
    flags = [word for name, value in train.items() for word in (f"--{name}", str(value))]
    assert head.others() == worker.others() == []
    run(RAY, "up", "-y", "--no-config-cache", str(file))
    try:
        log = tmp_path / "dashboard.log"
        with started(laptop.command(RAY, "dashboard", str(file)), log, cwd=ROOT):
            wait_until(
                lambda: submitted(laptop, "list").returncode == 0,
                DASHBOARD_TIMEOUT_S,
                "the dashboard answers through its tunnel",
            )
            done = submitted(laptop, "train", *flags)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            # The head has no CPUs for workers, so the job started one.
            assert any("raylet" in words for words in worker.others())
    finally:
        # Like Ctrl-C; this also ends the tunnel's process.
        end_processes(laptop.host)
        run(RAY, "down", "-y", "-v", str(file))
    assert json.loads((tmp_path / "runs/submitted/summary.json").read_text())["epochs"] == 1
    wait_until(
        lambda: head.others() == worker.others() == [], SHUTDOWN_TIMEOUT_S, "all processes end"
    )


def submitted(laptop: Machine, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `submit` on the laptop, which has the token and a tunnel to the dashboard."""
    command = laptop.command(sys.executable, "-m", "ray_jobs.submit", *words)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
