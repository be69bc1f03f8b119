"""`ray up` on machines of one's own, from `deploy/on_premise.yaml`, a job, and `ray down`."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import yaml

from tests.ray_jobs.heads import TOKEN
from tests.ray_jobs.hosts import Machine, end_processes, hosts, ssh_server, started, wait_until
from tests.ray_jobs.tiny import write_prepared

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
RAY = f"{sys.prefix}/bin/ray"
ANSWERS_S = 90
ENDS_S = 180
"""A worker that has lost its head gives up after a minute, and ends; `ray down` stops the head."""


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    """A laptop, a head and a worker; the last two let the first one in."""
    key = tmp_path / "key"
    with ExitStack() as stack:
        found = stack.enter_context(hosts(3))
        if not shutil.which("rsync"):
            pytest.skip("needs rsync")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        made = [Machine(host, tmp_path / host.name) for host in found]
        for machine in made[1:]:
            # What set-up would install, is there.
            (machine.home / "multimodal-ray").mkdir(parents=True)
            (machine.home / "multimodal-ray/venv").symlink_to(sys.prefix)
            stack.enter_context(ssh_server(machine, key.with_suffix(".pub")))
        (made[0].home / ".ray").mkdir(parents=True)
        (made[0].home / ".ray/auth_token").write_text(TOKEN)
        yield made


def test_machines_become_a_cluster_run_a_job_and_are_left_without_a_process(machines, tmp_path):
    laptop, head, worker = machines
    cluster = yaml.safe_load((ROOT / "deploy/on_premise.yaml").read_text())
    cluster["provider"] |= {"head_ip": head.host.address, "worker_ips": [worker.host.address]}
    cluster["auth"] |= {"ssh_user": "root", "ssh_private_key": str(tmp_path / "key")}
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(cluster))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = laptop.command(*words)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    def dashboard_is_there() -> bool:
        return submitted(laptop, "list").returncode == 0

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
            wait_until(dashboard_is_there, ANSWERS_S, "the dashboard answers through its tunnel")
            done = submitted(laptop, "train", *flags)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            # The head has no CPU for workers.
            assert any("raylet" in words for words in worker.others())
    finally:
        # As Ctrl-C would: the tunnel is a process of its own.
        end_processes(laptop.host)
        down = run(RAY, "down", "-y", "-v", str(file))
    assert json.loads((tmp_path / "runs/submitted/summary.json").read_text())["epochs"] == 1
    left = [head.others, worker.others]
    with suppress(AssertionError):
        wait_until(lambda: not any(of_host() for of_host in left), ENDS_S, "every process is gone")
    assert [of_host() for of_host in left] == [[], []], down.stdout + down.stderr


def submitted(laptop: Machine, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the submitter on the laptop, which knows the token, and the dashboard by its tunnel."""
    command = laptop.command(sys.executable, "-m", "ray_jobs.submit", *words)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
