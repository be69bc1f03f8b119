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
its weights to that of two all the way, as a share of the tensor's largest weight. The model's
activation is smooth, as in EfficientNet: at ReLU's kink a rounding flips a gradient of a pixel,
which in these 72 steps grows to a hundredth of a tensor (EXPERIMENTS.md).

Run:   python -m benchmarks.chaos [--runs 20] [--seed 0] [--kinds worker,node]
Ends in one line of JSON.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.disturbed import EVERY, SLOT, LocalCluster, Run, disturb, small_disk
from benchmarks.photos import jpeg, photo
from benchmarks.shards import write_shards

KINDS = ("worker", "controller", "driver", "node", "disk", "torn", "hang", "damaged")
_SMALL_MB = 512
"""Room for a run whose disk nobody else fills."""


def settings(prepared: Path, batch_norm: str = "local", **train: Any) -> dict[str, Any]:
    """Return the sections of the spec that all runs share."""
    return {
        "data": {"prepared": str(prepared), "cache": "none"},
        "model": {
            "image": {"kind": "tiny", "weights": None},
            "activation": "silu",
            "batch_norm": batch_norm,
        },
        "train": {
            "num_workers": 2,
            "resources_per_worker": {SLOT: 1},
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
    return float(np.max([np.abs(a - b).max() / max(np.abs(b).max(), 1e-12) for a, b in floats]))


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
        **resized(run_of, folder, cluster),
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


def resized(run_of: Callable[..., Run], folder: Path, cluster: LocalCluster) -> dict[str, float]:
    """Return how far a run that goes on with one worker ends from one of two all the way."""
    # Synchronised batch norms: their statistics do not depend on the number of workers.
    alone = run_of("sync-alone", folder / "runs", batch_norm="sync")
    alone.wait()
    run = run_of("sync-resized", folder / "runs", batch_norm="sync", num_workers=[1, 2])
    run.wait_for_step(20)
    cluster.replace(0, by_another=False)
    run.wait()
    print(f"\ntwo workers, then one: {run.attempts()} attempts, {run.lost()} steps lost")
    cluster.nodes.append(cluster.add())
    return {"resized_distance": distance(learnt(run), learnt(alone))}


def learnt(run: Run) -> dict[str, np.ndarray]:
    """Return the weights of a run, without the optimizer's moments."""
    return {name: w for name, w in run.weights().items() if " optimizer " not in name}


if __name__ == "__main__":
    main()
