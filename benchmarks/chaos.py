"""Does a run that is disturbed end in the very weights of one that never was?

Method: a small model with everything that is random (dropout, augmentation, batch norm of each
worker's own rows), two workers, three epochs, a checkpoint at least every 8 steps. One run is left
alone. Then every run is disturbed once, at a random step, in one of these ways:

    worker      SIGKILL of one of the workers
    controller  SIGKILL of Ray Train's controller
    driver      SIGKILL of `train`, which is then started again by the same command
    node        a node of the cluster is removed with the worker on it, and another one added
    disk        the disk of the run folder is full for a while (a small tmpfs, filled up; to mount
                it needs root)
    torn        SIGKILL of rank 0 while it writes a checkpoint
    hang        SIGSTOP of a worker, for ever; found by train.hang_timeout_s
    damaged     the newest checkpoint is cut short on the disk, then a worker is killed

A local cluster of a head and two nodes, each with room for one worker. Each run's last checkpoint
(model and optimizer) and the finished model are compared bit by bit with those of the run that was
left alone. `lost` is how many steps were taken again; `damaged` goes back one checkpoint more, and
is counted apart. At last a run of two workers loses a node that does not come back, and goes on
with one (`train.num_workers: [1, 2]`): `resized_distance` is the largest distance of a tensor of
its weights to that of two all the way, as a share of the tensor's largest weight.

Run:   python -m benchmarks.chaos [--runs 20] [--seed 0] [--kinds worker,node]
Ends in one line of JSON.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.photos import jpeg, photo
from benchmarks.shards import write_shards

ROOT = Path(__file__).parents[1]
KINDS = ("worker", "controller", "driver", "node", "disk", "torn", "hang", "damaged")
EVERY = 8
TIMEOUT_S = 420.0
_SLOT = "slot"
"""A resource of which each node has one, so that workers lie on different nodes."""
_POLL_S = 0.002
_SMALL_MB = 512
"""Room for a run whose disk nobody else fills."""


def train_recorded(config: dict[str, Any], steps_file: str) -> None:
    """Train on one worker, and write down each step that is done; runs in the worker's process."""
    from ray_jobs import worker

    after_step = worker._Worker.after_step

    def recorded(self: Any, step: int) -> None:
        after_step(self, step)
        with open(steps_file, "a") as file:
            file.write(f"{self.rank} {os.getpid()} {step}\n")

    worker._Worker.after_step = recorded
    worker.train_on_worker(config)


def drive() -> None:
    """Run `train` with its steps recorded; what the benchmark starts as the driver."""
    from ray_jobs import cli, train
    from ray_jobs.spec import RunSpec

    steps_file = sys.argv[2]
    train.train_on_worker = partial(train_recorded, steps_file=steps_file)
    sys.argv = [sys.argv[0], *sys.argv[3:]]
    cli.main(RunSpec, train.fit, __doc__)


@dataclass
class Run:
    """One run of `train`, in a process that is started anew when it was killed."""

    folder: Path
    name: str
    address: str
    settings: dict[str, Any]
    logs: Path
    """Where the driver writes what it says, and ranks their steps: not on a disk that fills up."""
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
        command = [sys.executable, "-m", "benchmarks.chaos", "--drive"]
        with open(self.log, "a") as log:
            self.driver = subprocess.Popen(
                [*command, str(self.steps_file), str(file)],
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
        return self.cluster.add_node(num_cpus=1, resources={_SLOT: 1})

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


def settings(prepared: Path, batch_norm: str = "local", **train: Any) -> dict[str, Any]:
    """Return the sections of the spec that all runs share."""
    return {
        "data": {"prepared": str(prepared), "cache": "none"},
        "model": {"image": {"kind": "tiny", "weights": None}, "batch_norm": batch_norm},
        "train": {
            "num_workers": 2,
            "resources_per_worker": {_SLOT: 1},
            "global_batch_size": 32,
            "epochs": 3,
            "learning_rate": 1e-3,
            "checkpoint_every_steps": EVERY,
            "max_failures": 10,
            "hang_timeout_s": 45,
            **train,
        },
    }


def distance(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    """Return the largest distance of two float tensors, as a share of the largest weight in them.

    Paths differ by process in their numbers, so places identify variables.
    """
    pairs = zip(first.values(), second.values(), strict=True)
    floats = [(a, b) for a, b in pairs if a.dtype == np.float32 and b.size]
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12)) for a, b in floats)


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """Whether all arrays are bitwise the same."""
    if len(first) != len(second):
        return False
    pairs = zip(first.values(), second.values(), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    kinds = arguments.kinds.split(",")
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = Path(temporary)
        images = [jpeg(photo(rng, 64)) for _ in range(40)]
        rows = {"train": 32 * 24 + 5, "validation": 96, "test": 16}
        write_shards(folder / "prepared", rows, images, 64)
        cluster = LocalCluster()
        try:
            result = measure(arguments.runs, kinds, folder, cluster, rng)
        finally:
            cluster.cluster.shutdown()
    print(json.dumps(result))


def measure(
    num_runs: int, kinds: list[str], folder: Path, cluster: LocalCluster, rng: np.random.Generator
) -> dict[str, Any]:
    """Run all runs; return what the last line says."""
    address = str(cluster.cluster.address)
    total = 3 * (32 * 24 + 5) // 32

    def run_of(name: str, where: Path, **options: Any) -> Run:
        sections = settings(folder / "prepared", **options)
        run = Run(where, name, address, sections, folder / "logs")
        run.start()
        return run

    started = time.monotonic()
    alone = run_of("alone", folder / "runs")
    alone.wait()
    expected = alone.weights()
    print(f"left alone: {total} steps, {time.monotonic() - started:.0f} s\n")
    print("| run | disturbed | at step | attempts | steps lost | seconds | same bits |")
    print("|---|---|---|---|---|---|---|")
    equal, lost, lost_damaged = 0, 0, 0
    for number in range(num_runs):
        kind = kinds[number % len(kinds)]
        # A full disk lasts two checkpoints, and another one has to come before the end; one that is
        # torn has to be seen; a controller has to be there. A worker that hangs when it has nothing
        # more to do is Ray's to find, which takes ten minutes.
        margin = {"disk": 3 * EVERY, "torn": EVERY, "controller": 4, "hang": 2}.get(kind, 1)
        at = int(rng.integers(1, total - margin))
        started = time.monotonic()
        if kind == "disk":
            with small_disk(folder, _SMALL_MB) as where:
                run = run_of(f"{number}-{kind}", where)
                alike = disturbed_alike(run, kind, at, cluster, rng, expected)
                again, attempts = run.lost(), run.attempts()
            (folder / "small").rmdir()
        else:
            run = run_of(f"{number}-{kind}", folder / "runs")
            alike = disturbed_alike(run, kind, at, cluster, rng, expected)
            again, attempts = run.lost(), run.attempts()
        equal += alike
        if kind == "damaged":
            lost_damaged = max(lost_damaged, again)
        else:
            lost = max(lost, again)
        seconds = time.monotonic() - started
        print(
            f"| {number + 1} | {kind} | {at} | {attempts} | {again} | {seconds:.0f} | {alike} |",
            flush=True,
        )
    return {
        "runs": num_runs,
        "bitwise_equal": equal,
        "max_lost_steps": lost,
        "max_lost_steps_of_damaged": lost_damaged,
        "checkpoint_every_steps": EVERY,
        "resized_distance": resized(run_of, folder, cluster),
    }


def disturbed_alike(
    run: Run,
    kind: str,
    at: int,
    cluster: LocalCluster,
    rng: np.random.Generator,
    expected: dict[str, np.ndarray],
) -> bool:
    """Disturb a run at a step; return whether it ends as expected."""
    run.wait_for_step(at)
    disturb(kind, run, cluster, rng)
    run.wait()
    return same(run.weights(), expected)


def resized(run_of: Callable[..., Run], folder: Path, cluster: LocalCluster) -> float:
    """Return how far a run that goes on with one worker ends from one of two all the way."""
    # Synchronised batch norms: their statistics do not depend on the number of workers.
    alone = run_of("sync-alone", folder / "runs", batch_norm="sync")
    alone.wait()
    run = run_of("sync-resized", folder / "runs", batch_norm="sync", num_workers=[1, 2])
    run.wait_for_step(20)
    cluster.replace(0, by_another=False)
    run.wait()
    mine, theirs = (
        {name: w for name, w in ended.weights().items() if " optimizer " not in name}
        for ended in (run, alone)
    )
    found = distance(mine, theirs)
    print(f"\ntwo workers, then one: {run.attempts()} attempts, {run.lost()} steps lost")
    cluster.nodes.append(cluster.add())
    return found


if __name__ == "__main__":
    drive() if sys.argv[1:2] == ["--drive"] else main()
