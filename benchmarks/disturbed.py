"""A run of `train` that is disturbed, and the local cluster that it runs on; see `chaos`.

The driver is a process of its own, which can be killed and started again. Every worker writes down
the steps that it has done.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import yaml

ROOT = Path(__file__).parents[1]
EVERY = 8
TIMEOUT_S = 420.0
SLOT = "slot"
"""A resource of which each node has one, so that workers lie on different nodes."""
_POLL_S = 0.002


def train_recorded(config: dict[str, Any], steps_file: str) -> None:
    """Train on one worker, and write down each step that is done; runs in the worker's process.

    Args:
        config: of `train_on_worker`.
        steps_file: where to write them.
    """
    from ray_jobs.train import worker

    after_step = worker._Worker.after_step

    def recorded(self: Any, step: int) -> None:
        after_step(self, step)
        with open(steps_file, "a") as file:
            file.write(f"{self.rank} {os.getpid()} {step}\n")

    with patch.object(worker._Worker, "after_step", recorded):
        worker.train_on_worker(config)


def drive() -> None:
    """Run `train` with its steps recorded; what a run starts as its driver."""
    from ray_jobs.config import command_line
    from ray_jobs.config.spec import RunSpec
    from ray_jobs.train import job

    name, steps_file, *rest = sys.argv
    job.train_on_worker = partial(train_recorded, steps_file=steps_file)
    sys.argv = [name, *rest]
    command_line.main(RunSpec, job.fit, __doc__)


@dataclass
class Run:
    """One run of `train`, in a process that is started anew when it was killed."""

    folder: Path
    name: str
    address: str
    settings: dict[str, Any]
    logs: Path
    """Where the driver writes what it says, and ranks their steps: not on a disk that fills up."""
    prefix: tuple[str, ...] = ()
    """Words in front of the driver's command, such as what puts it on another host."""
    driver: Any = None

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder / self.name

    @property
    def log(self) -> Path:
        """What the driver said."""
        return self.logs / f"{self.name}.log"

    @property
    def steps_file(self) -> Path:
        """The steps that were done."""
        return self.logs / f"{self.name}.steps"

    def start(self) -> None:
        """Start the driver."""
        spec = {"run": {"storage_path": str(self.folder), "name": self.name}, **self.settings}
        self.logs.mkdir(parents=True, exist_ok=True)
        file = self.logs / f"{self.name}.yaml"
        file.write_text(yaml.safe_dump(spec))
        command = [sys.executable, "-m", "benchmarks.disturbed", str(self.steps_file)]
        with open(self.log, "a") as log:
            self.driver = subprocess.Popen(
                [*self.prefix, *command, str(file)],
                cwd=ROOT,
                env={**os.environ, "RAY_ADDRESS": self.address},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> None:
        """Wait for the end."""
        if code := self.driver.wait(TIMEOUT_S):
            raise RuntimeError(f"{self.name} ended with {code}:\n{self.log.read_text()[-3000:]}")

    def steps(self) -> list[tuple[int, int, int]]:
        """Return rank, process and step of all steps that were done so far."""
        if not self.steps_file.exists():
            return []
        lines = self.steps_file.read_text().splitlines()
        return [tuple(map(int, line.split())) for line in lines if len(line.split()) == 3]  # type: ignore[misc]

    def pid_of(self, rank: int) -> int:
        """Return the process of a rank, the latest one."""
        return [pid for r, pid, _ in self.steps() if r == rank][-1]

    def wait_for_step(self, step: int) -> None:
        """Wait until both ranks have done a step."""
        deadline = time.monotonic() + TIMEOUT_S
        while {rank for rank, _, done in self.steps() if done >= step} != {0, 1}:
            if self.driver.poll() is not None or time.monotonic() > deadline:
                log = self.log.read_text()
                raise RuntimeError(f"{self.name} never came to step {step}:\n{log[-3000:]}")
            time.sleep(_POLL_S)

    def wait_for_checkpoint(self) -> None:
        """Wait until there is a checkpoint, whole."""
        deadline = time.monotonic() + TIMEOUT_S
        while not list(self.path.glob("checkpoints/steps/*[0-9]/state.json")):
            if self.driver.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} never had a checkpoint")
            time.sleep(_POLL_S)

    def lost(self) -> int:
        """Return the most steps that an attempt took again of those before it."""
        most, done, pid = 0, 0, None
        for _, process, step in (found for found in self.steps() if found[0] == 0):
            if process != pid:
                most, pid = max(most, done - (step - 1)), process
            done = step
        return most

    def attempts(self) -> int:
        """Return how many processes rank 0 was."""
        return len(dict.fromkeys(pid for rank, pid, _ in self.steps() if rank == 0))

    def checkpoint(self) -> Path:
        """Return the folder of the newest checkpoint."""
        names = [p for p in (self.path / "checkpoints/steps").iterdir() if p.name.isdigit()]
        return max(names, key=lambda path: int(path.name))

    def weights(self) -> dict[str, np.ndarray]:
        """Return everything that the run ends in: last checkpoint, best epoch, finished model."""
        arrays = {}
        for path in (self.checkpoint(), *sorted((self.path / "checkpoints/best").iterdir())):
            for name in ("model", "optimizer"):
                if (path / f"{name}.npz").exists():
                    with np.load(path / f"{name}.npz", allow_pickle=False) as file:
                        arrays |= {f"{path.name} {name} {k}": file[k] for k in file.files}
        from mm_model import load_model

        model = load_model(self.path / "model/model.keras")
        return arrays | {f"final {i}": w for i, w in enumerate(model.get_weights())}


class LocalCluster:
    """A head, and nodes with room for one worker each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "include_dashboard": True, "dashboard_port": 0},
        )
        self.nodes = [self.add(), self.add()]

    def add(self) -> Any:
        """Add a node."""
        return self.cluster.add_node(num_cpus=1, resources={SLOT: 1})

    def replace(self, index: int, by_another: bool = True) -> None:
        """Take a node away, and perhaps add another one."""
        self.cluster.remove_node(self.nodes.pop(index), allow_graceful=False)
        if by_another:
            self.nodes.append(self.add())

    def controllers(self) -> list[int]:
        """Return the processes of Ray Train's controllers."""
        from ray.util.state import list_actors

        actors: Any = list_actors(
            address=self.cluster.address, filters=[("state", "=", "ALIVE")], detail=True
        )
        return [a.pid for a in actors if a.class_name == "TrainController"]


@contextmanager
def small_disk(parent: Path, megabytes: int) -> Iterator[Path]:
    """Give a small file system of its own."""
    path = parent / "small"
    path.mkdir()
    options = f"size={megabytes}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(path: Path) -> Path:
    """Fill a file system up; return the file that does."""
    ballast = path / "ballast"
    # Without a buffer, whose rest would find no room when the file is closed.
    with open(ballast, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * (1 << 20))
    return ballast


def disturb(kind: str, run: Run, cluster: LocalCluster, rng: np.random.Generator) -> None:
    """Disturb a run that is at the right step."""
    if kind == "worker":
        os.kill(run.pid_of(int(rng.integers(2))), signal.SIGKILL)
    elif kind == "hang":
        os.kill(run.pid_of(int(rng.integers(2))), signal.SIGSTOP)
    elif kind == "controller":
        pids = cluster.controllers()
        if not pids:
            raise RuntimeError("there is no controller any more")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    elif kind == "driver":
        run.driver.kill()
        run.driver.wait()
        run.start()
    elif kind == "node":
        cluster.replace(int(rng.integers(len(cluster.nodes))))
    elif kind == "disk":
        before, ballast = run.steps()[-1][2], fill(run.folder)
        run.wait_for_step(before + 2 * EVERY)
        ballast.unlink()
    elif kind == "torn":
        run.wait_for_checkpoint()
        steps = run.path / "checkpoints/steps"
        deadline = time.monotonic() + TIMEOUT_S
        while not any(path.name.endswith(".partial") for path in steps.iterdir()):
            if run.driver.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("no checkpoint was seen while it was written")
        os.kill(run.pid_of(0), signal.SIGKILL)
    elif kind == "damaged":
        run.wait_for_checkpoint()
        files = sorted(run.checkpoint().iterdir())
        file = files[int(rng.integers(len(files)))]
        os.truncate(file, file.stat().st_size // 2)
        os.kill(run.pid_of(1), signal.SIGKILL)


if __name__ == "__main__":
    drive()
