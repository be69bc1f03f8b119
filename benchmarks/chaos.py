"""Checks that disturbed runs end with the same weights as an undisturbed one.

Method: a small model with all random components (dropout, augmentation, batch norm on each worker's
own rows), two workers, three epochs, a checkpoint at least every 8 steps. One run is not disturbed.
Each further run is disturbed once, at a random step, in one of these ways:

    worker      SIGKILL of one of the workers
    controller  SIGKILL of Ray Train's controller
    driver      SIGKILL of `train`, which is then restarted with the same command
    node        a node is removed together with its worker, and another node is added
    disk        the disk of the run folder is full for a while (a small tmpfs; mounting needs root)
    torn        SIGKILL of rank 0 while it writes a checkpoint
    hang        SIGSTOP of a worker, detected by train.hang_timeout_s
    damaged     the newest checkpoint is truncated, then a worker is killed

The local cluster has a head node and two nodes that run one worker each. The last checkpoint of
each run (model and optimizer) and the final model are compared bitwise with those of the
undisturbed run. `max_lost_steps` counts repeated steps; `damaged` falls back to an earlier
checkpoint and is counted separately. Finally, a run with two workers loses a node for good and
continues with one (`train.num_workers: [1, 2]`). `resized_distance` is the maximum difference
between a weight tensor and that of an undisturbed run, relative to the tensor's largest weight. The
activation is smooth, as in EfficientNet: at the kink of ReLU, rounding can flip the gradient of a
pixel, which changes a tensor by up to a hundredth within these 72 steps (docs/experiments.md).

Run:   python -m benchmarks.chaos [--runs 20] [--seed 0] [--kinds worker,node]
The last line of the output is JSON.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.disturbed import EVERY, SLOT, LocalCluster, Run, disturb, small_disk
from benchmarks.photos import make_jpegs
from benchmarks.shards import write_shards

KINDS = ("worker", "controller", "driver", "node", "disk", "torn", "hang", "damaged")
_SMALL_MB = 512
"""Size of the disk that is filled up."""


def settings(prepared: Path, batch_norm: str = "local", **train: Any) -> dict[str, Any]:
    """Return the spec sections that all runs share."""
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
    """Return the maximum difference between two float tensors, relative to the largest weight.

    Variables are matched by position, because Keras numbers their paths per process.
    """
    pairs = zip(first.values(), second.values(), strict=True)
    floats = [(a, b) for a, b in pairs if a.dtype == np.float32 and b.size]
    return float(np.max([np.abs(a - b).max() / max(np.abs(b).max(), 1e-12) for a, b in floats]))


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """Return whether all arrays are bitwise equal."""
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
        images = make_jpegs(64, 40, rng)
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
    """Perform all runs and return the result."""
    address = str(cluster.cluster.address)
    total = 3 * (32 * 24 + 5) // 32

    def run_of(name: str, where: Path, **options: Any) -> Run:
        sections = settings(folder / "prepared", **options)
        run = Run(where, name, address, sections, folder / "logs")
        run.start()
        return run

    started = time.monotonic()
    undisturbed = run_of("alone", folder / "runs")
    undisturbed.wait()
    expected = undisturbed.weights()
    print(f"undisturbed: {total} steps, {time.monotonic() - started:.0f} s\n")
    print("| run | disturbance | step | attempts | lost steps | seconds | bitwise equal |")
    print("|---|---|---|---|---|---|---|")
    num_equal, lost, lost_damaged = 0, 0, 0
    for number in range(num_runs):
        kind = kinds[number % len(kinds)]
        # A full disk lasts for two checkpoints and needs one more before the end. A torn checkpoint
        # must be observed while it is written. The controller must still exist. Only Ray would
        # detect a hang after the last step, and only after ten minutes.
        margin = {"disk": 3 * EVERY, "torn": EVERY, "controller": 4, "hang": 2}.get(kind, 1)
        at = int(rng.integers(1, total - margin))
        started = time.monotonic()
        disk = small_disk(folder, _SMALL_MB) if kind == "disk" else nullcontext(folder / "runs")
        with disk as parent:
            run = run_of(f"{number}-{kind}", parent)
            equal = ends_equal(run, kind, at, cluster, rng, expected)
            steps_lost, attempts = run.lost(), run.attempts()
        num_equal += equal
        if kind == "damaged":
            lost_damaged = max(lost_damaged, steps_lost)
        else:
            lost = max(lost, steps_lost)
        seconds = time.monotonic() - started
        print(
            f"| {number + 1} | {kind} | {at} | {attempts} | {steps_lost} | {seconds:.0f} "
            f"| {equal} |",
            flush=True,
        )
    return {
        "runs": num_runs,
        "bitwise_equal": num_equal,
        "max_lost_steps": lost,
        "max_lost_steps_of_damaged": lost_damaged,
        "checkpoint_every_steps": EVERY,
        "resized_distance": measure_resized(run_of, folder, cluster),
    }


def ends_equal(
    run: Run,
    kind: str,
    at: int,
    cluster: LocalCluster,
    rng: np.random.Generator,
    expected: dict[str, np.ndarray],
) -> bool:
    """Disturb a run at a step; return whether it ends with the expected weights."""
    run.wait_for_step(at)
    disturb(kind, run, cluster, rng)
    run.wait()
    return same(run.weights(), expected)


def measure_resized(run_of: Callable[..., Run], folder: Path, cluster: LocalCluster) -> float:
    """Return the distance between an undisturbed run and one that loses one of two workers."""
    # The statistics of synchronized batch norm do not depend on the number of workers.
    undisturbed = run_of("sync-alone", folder / "runs", batch_norm="sync")
    undisturbed.wait()
    run = run_of("sync-resized", folder / "runs", batch_norm="sync", num_workers=[1, 2])
    run.wait_for_step(20)
    cluster.remove(0)
    run.wait()
    print(f"\ntwo workers, then one: {run.attempts()} attempts, {run.lost()} lost steps")
    cluster.add()
    return distance(trained_weights(run), trained_weights(undisturbed))


def trained_weights(run: Run) -> dict[str, np.ndarray]:
    """Return the weights of a run without the optimizer state."""
    return {name: w for name, w in run.weights().items() if " optimizer " not in name}


if __name__ == "__main__":
    main()
