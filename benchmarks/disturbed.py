"""Runs `train` on a local cluster and disturbs it; see `chaos`.

The driver is a separate process that can be killed and restarted. Every worker records its
steps in a file.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
"""A resource that each node has once, so that workers run on different nodes."""
PAUSE = ".pause"
"""Suffix of the file that pauses a run."""
_POLL_S = 0.002
_PAUSE_POLL_S = 0.1


def train_recorded(config: dict[str, Any], steps_file: str) -> None:
    """Train on one worker, record each step, and wait after it while the run is paused.

    Args:
        config: Argument of `train_on_worker`.
        steps_file: File for the steps.
    """
    from ray_jobs.train import worker

    after_step, pause_file = worker._Worker.after_step, Path(steps_file).with_suffix(PAUSE)

    def recorded(self: Any, step: int) -> None:
        after_step(self, step)
        with open(steps_file, "a") as file:
            file.write(f"{self.rank} {os.getpid()} {step}\n")
        while pause_file.exists():
            time.sleep(_PAUSE_POLL_S)

    with patch.object(worker._Worker, "after_step", recorded):
        worker.train_on_worker(config)


def drive() -> None:
    """Run `train` and record the steps of its workers; the entry point of `Run.driver`."""
    from ray_jobs.config import command_line
    from ray_jobs.config.spec import RunSpec
    from ray_jobs.train import job

    name, steps_file, *rest = sys.argv
    job.train_on_worker = partial(train_recorded, steps_file=steps_file)
    sys.argv = [name, *rest]
    command_line.main(RunSpec, job.fit, __doc__)


@dataclass
class Run:
    """A run of `train` in a process that can be killed and restarted."""

    folder: Path
    name: str
    address: str
    settings: dict[str, Any]
    logs: Path
    """Folder for the output and the recorded steps; not on a disk that fills up."""
    prefix: tuple[str, ...] = ()
    """Words in front of the driver's command, for example to run it on another host."""
    driver: Any = None

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder / self.name

    @property
    def log(self) -> Path:
        """The output of the driver."""
        return self.logs / f"{self.name}.log"

    @property
    def steps_file(self) -> Path:
        """The recorded steps."""
        return self.logs / f"{self.name}.steps"

    def pause(self) -> None:
        """Make workers wait after their next step, until `resume`."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self.steps_file.with_suffix(PAUSE).touch()

    def resume(self) -> None:
        """Let paused workers continue."""
        self.steps_file.with_suffix(PAUSE).unlink()

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
        """Wait for the end of the run."""
        if code := self.driver.wait(TIMEOUT_S):
            raise RuntimeError(f"{self.name} ended with {code}:\n{self.log.read_text()[-3000:]}")

    def steps(self) -> list[tuple[int, int, int]]:
        """Return rank, process ID and step of all recorded steps."""
        if not self.steps_file.exists():
            return []
        lines = self.steps_file.read_text().splitlines()
        return [tuple(map(int, line.split())) for line in lines if len(line.split()) == 3]  # type: ignore[misc]

    def pid_of(self, rank: int) -> int:
        """Return the latest process ID of a rank."""
        return [pid for r, pid, _ in self.steps() if r == rank][-1]

    def wait_for_step(self, step: int) -> None:
        """Wait until both ranks have taken a step."""
        self.wait_until(
            lambda: {rank for rank, _, done in self.steps() if done >= step} == {0, 1},
            f"step {step}",
        )

    def num_workers(self) -> int:
        """Return the number of workers that have taken the last step."""
        steps = self.steps()
        return len({rank for rank, _, step in steps[-10:] if step == steps[-1][2]})

    def wait_for_checkpoint(self) -> None:
        """Wait for the first complete checkpoint."""
        complete = "checkpoints/steps/*[0-9]/state.json"
        self.wait_until(lambda: any(self.path.glob(complete)), "a checkpoint")

    def wait_until(self, condition: Callable[[], bool], event: str) -> None:
        """Wait for a condition.

        Raises:
            RuntimeError: If the run ends, or the time limit passes, before the event.
        """
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if self.driver.poll() is not None or time.monotonic() > deadline:
                log = self.log.read_text()
                raise RuntimeError(f"{self.name} did not reach {event}:\n{log[-3000:]}")
            time.sleep(_POLL_S)

    def lost(self) -> int:
        """Return the maximum number of steps that a restart repeated."""
        lost, last_step, last_pid = 0, 0, None
        for _, pid, step in (record for record in self.steps() if record[0] == 0):
            if pid != last_pid:
                lost, last_pid = max(lost, last_step - (step - 1)), pid
            last_step = step
        return lost

    def attempts(self) -> int:
        """Return the number of processes of rank 0."""
        return len(dict.fromkeys(pid for rank, pid, _ in self.steps() if rank == 0))

    def checkpoint(self) -> Path:
        """Return the folder of the newest checkpoint."""
        names = [p for p in (self.path / "checkpoints/steps").iterdir() if p.name.isdigit()]
        return max(names, key=lambda path: int(path.name))

    def weights(self) -> dict[str, np.ndarray]:
        """Return all results of the run: the last checkpoint, the best epoch, the final model."""
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
    """A head node, and two nodes that run one worker each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "include_dashboard": True, "dashboard_port": 0},
        )
        self.nodes: list[Any] = []
        self.add()
        self.add()

    def add(self) -> None:
        """Add a node."""
        self.nodes.append(self.cluster.add_node(num_cpus=1, resources={SLOT: 1}))

    def remove(self, index: int) -> None:
        """Remove a node without warning."""
        self.cluster.remove_node(self.nodes.pop(index), allow_graceful=False)

    def controllers(self) -> list[int]:
        """Return the process IDs of Ray Train's controllers."""
        from ray.util.state import list_actors

        actors: Any = list_actors(
            address=self.cluster.address, filters=[("state", "=", "ALIVE")], detail=True
        )
        return [a.pid for a in actors if a.class_name == "TrainController"]


@contextmanager
def small_disk(parent: Path, megabytes: int) -> Iterator[Path]:
    """Mount a small file system; requires root."""
    path = parent / "small"
    path.mkdir()
    options = f"size={megabytes}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
        path.rmdir()


def fill(path: Path) -> Path:
    """Fill up a file system; return the file that fills it."""
    ballast = path / "ballast"
    # Unbuffered, because closing the file on a full disk could not flush a buffer.
    with open(ballast, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * (1 << 20))
    return ballast


def disturb(kind: str, run: Run, cluster: LocalCluster, rng: np.random.Generator) -> None:
    """Disturb a run now."""
    if kind == "worker":
        os.kill(run.pid_of(int(rng.integers(2))), signal.SIGKILL)
    elif kind == "hang":
        os.kill(run.pid_of(int(rng.integers(2))), signal.SIGSTOP)
    elif kind == "controller":
        pids = cluster.controllers()
        if not pids:
            raise RuntimeError("the controller no longer exists")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    elif kind == "driver":
        run.driver.kill()
        run.driver.wait()
        run.start()
    elif kind == "node":
        cluster.remove(int(rng.integers(len(cluster.nodes))))
        cluster.add()
    elif kind == "disk":
        before, ballast = run.steps()[-1][2], fill(run.folder)
        run.wait_for_step(before + 2 * EVERY)
        ballast.unlink()
    elif kind == "torn":
        run.wait_for_checkpoint()
        steps = run.path / "checkpoints/steps"
        run.wait_until(lambda: any(steps.glob("*.partial")), "an incomplete checkpoint")
        os.kill(run.pid_of(0), signal.SIGKILL)
    elif kind == "damaged":
        run.wait_for_checkpoint()
        files = sorted(run.checkpoint().iterdir())
        file = files[int(rng.integers(len(files)))]
        os.truncate(file, file.stat().st_size // 2)
        os.kill(run.pid_of(1), signal.SIGKILL)


if __name__ == "__main__":
    drive()
