"""Compares our loop with Keras' `fit` and, on two workers, with the pattern in Ray's documentation.

Method: the fusion model with an untrained EfficientNetB0 at 96 px, two numbers per row, batches of
32, Adam, on CPU, all rows in memory. The two sides take turns, each in its own processes. Steps are
timed from the end of the warm-up, in which graphs are traced. The ratio of rows per second is
computed per round; medians over the rounds are reported.

    vs_fit                     `Loop` in one process on all cores, against
                               `keras.Model.fit(x, y, batch_size=32, shuffle=False)` with the same
                               model, seed, arrays, optimizer and loss, without XLA, as is Keras'
                               default on CPU. Mean losses that differ by more than 0.001 are an
                               error.
    two_workers_vs_legacy_fit  the worker (loop, callbacks, coordinator) in two processes with one
                               CPU each, started by Ray Train, against Ray's `TensorflowTrainer`
                               with `MultiWorkerMirroredStrategy`, tf_keras and `fit` on a tf.data
                               dataset of each worker's rows (`benchmarks.legacy`).

In the second comparison, both sides have the same rows, layers and layer sizes, dropout, L2, summed
loss of output and heads, Adam at a constant rate, ring collectives and threads, and no
augmentation, for which legacy Keras has slower layers. They differ in initial weights and random
numbers; our dropout draws numbers for all rows of the global batch; each of their steps updates and
exchanges a loss metric; our loop checks every few seconds whether to stop. Start-up and tracing are
excluded; see `benchmarks.startup`.

Wall time is sensitive to other users of the machine, so the CPU time of the timed process is also
shown.

Run:   python -m benchmarks.loop [--rounds 3] [--two-rounds 2] [--steps 40]
The last line of the output is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
SIZE, BATCH, WARM_UP = 96, 32, 5
_SAME_LOSS = 1e-3
SIDES = {"one": ("ours", "fit"), "two": ("ours", "legacy")}
"""The two sides to compare, by number of workers."""


def make_spec(folder: str, workers: str) -> Any:
    """Return the spec of a run, which the other side follows as far as possible."""
    from mm_model.spec import NO_AUGMENTATION
    from ray_jobs.config.spec import RunSpec

    two = workers == "two"
    return RunSpec.model_validate(
        {
            "run": {"storage_path": folder, "name": "run"},
            "data": {"prepared": f"{folder}/prepared", "image_size": SIZE},
            "model": {
                "image": {"kind": "efficientnet_b0", "weights": None},
                **({"augmentation": NO_AUGMENTATION.model_dump()} if two else {}),
            },
            "train": {
                "num_workers": 2 if two else 1,
                "cpus_per_worker": 1 if two else os.cpu_count(),
                "global_batch_size": BATCH,
                "class_weight": "none",
                "schedule": "constant",
            },
        }
    )


# -- one worker, in this process ------------------------------------------------------------------


def one_ours(folder: str, steps: int, ends: str) -> None:
    """Train with our loop on one worker."""
    from ray_jobs.cluster.strategy import WorkerContext, set_devices

    spec = make_spec(folder, "one")
    set_devices(spec.train.cpus_per_worker, use_gpu=False)

    from benchmarks.memory_loop import TimedLoop
    from ray_jobs.data.manifest import read_manifest
    from ray_jobs.storage.folder import Folder

    manifest = read_manifest(Folder(spec.data.prepared))
    TimedLoop(spec, manifest, WorkerContext(), num_steps=steps, ends=ends).run()


def one_fit(folder: str, steps: int, ends: str) -> None:
    """Train with Keras' `fit`."""
    import keras

    from benchmarks.arrays import make_arrays
    from mm_model.losses import make_loss
    from mm_model.optimizer import make_optimizer
    from ray_jobs.cluster.strategy import set_devices
    from ray_jobs.data.manifest import read_manifest
    from ray_jobs.storage.folder import Folder
    from ray_jobs.train.model_factory import new_model

    spec = make_spec(folder, "one")
    set_devices(spec.train.cpus_per_worker, use_gpu=False)
    manifest = read_manifest(Folder(spec.data.prepared))
    keras.utils.set_random_seed(spec.run.seed)
    model = new_model(spec, manifest)
    off: Any = False
    model.compile(make_optimizer(spec.train), make_loss(spec.train), jit_compile=off)
    arrays = make_arrays(steps * BATCH, SIZE, len(manifest.numeric_columns))

    times: list[tuple[float, float]] = []

    class Timer(keras.callbacks.Callback):
        # Otherwise `fit` would wait for the logs of each step.
        async_safe = True

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            times.append((time.perf_counter(), time.process_time()))

    inputs = {"image": arrays["image"], "numeric": arrays["numeric"]}
    options: Any = {"batch_size": BATCH, "verbose": 0, "shuffle": False, "callbacks": [Timer()]}
    history = model.fit(inputs, arrays["label"], **options)
    loss = history.history["loss"][0]
    Path(ends).write_text(json.dumps({"ends": times, "loss": loss}))


# -- two workers of Ray ---------------------------------------------------------------------------


def two_ours(folder: str, steps: int, ends: str) -> None:
    """Train with two of our workers."""
    from ray_jobs.cluster import connection
    from ray_jobs.data.manifest import read_manifest
    from ray_jobs.storage.folder import Folder
    from ray_jobs.train.coordinator import make_coordinator
    from ray_jobs.train.datasets import RunData
    from ray_jobs.train.supervisor import fit_once

    spec = make_spec(folder, "two")
    run = Folder(tempfile.mkdtemp(dir=folder))
    manifest = read_manifest(Folder(spec.data.prepared))
    manifest.write(run)
    with connection.connected("local", num_cpus=2):
        coordinator = make_coordinator()
        config = {
            "spec": spec.model_dump(mode="json"), "run": run.uri, "coordinator": coordinator,
            "decode": "trainer", "cache": "none", "index": None, "ray_s": 0.0,
            "data": RunData(spec, manifest, "trainer", "none", 0, 2, coordinator),
            "attempt_start": time.time(),
            "timed": {"num_steps": steps, "ends": ends},
        }  # fmt: skip
        fit_once(spec.train, 2, _train_from_memory, config, run.uri, (), config["data"])


def _train_from_memory(config: dict[str, Any]) -> None:
    """Run a worker whose loop takes its batches from memory."""
    from functools import partial
    from unittest.mock import patch

    from benchmarks.memory_loop import TimedLoop
    from ray_jobs.train.worker import train_on_worker

    with patch("ray_jobs.train.loop.Loop", partial(TimedLoop, **config["timed"])):
        train_on_worker(config)


def two_legacy(folder: str, steps: int, ends: str) -> None:
    """Train as in Ray's documentation."""
    # TensorFlow reads this variable when it is imported.
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    from ray.train import RunConfig, ScalingConfig
    from ray.train.tensorflow import TensorflowTrainer

    from benchmarks.legacy import train_legacy
    from ray_jobs.cluster import connection
    from ray_jobs.data.manifest import read_manifest
    from ray_jobs.storage.folder import Folder

    spec = make_spec(folder, "two")
    statistics: Any = read_manifest(Folder(spec.data.prepared)).statistics
    config = {
        "steps": steps, "size": SIZE, "batch": BATCH, "learning_rate": spec.train.learning_rate,
        "model": spec.model.model_dump(mode="json"), "ends": ends,
        "statistics": statistics.model_dump(mode="json"),
    }  # fmt: skip
    with connection.connected("local", num_cpus=2):
        TensorflowTrainer(
            train_legacy,
            train_loop_config=config,
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(name="legacy", storage_path=tempfile.mkdtemp(dir=folder)),
        ).fit()


# -- comparison -----------------------------------------------------------------------------------


def measure(workers: str, side: str, folder: str, steps: int) -> dict[str, float]:
    """Run one side in a process of its own; return its rows per second, median step and loss."""
    ends = f"{folder}/ends.json"
    command = [sys.executable, "-m", "benchmarks.loop", "--side", f"{workers}_{side}"]
    command += ["--folder", folder, "--ends", ends, "--steps", str(steps)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
    record = json.loads(Path(ends).read_text())
    wall_s, cpu_s = np.diff(record["ends"][WARM_UP - 1 :], axis=0).T
    return {
        "rows_per_s": BATCH * len(wall_s) / float(wall_s.sum()),
        "step_s": float(np.median(wall_s)),
        "cpu_s": float(np.median(cpu_s)),
        "loss": record["loss"],
        "seconds": time.monotonic() - started,
    }


def compare(workers: str, rounds: int, folder: str, steps: int) -> float:
    """Print each round of both sides; return the median ratio."""
    ratios = []
    for number in range(rounds):
        rates, losses = [], []
        for side in SIDES[workers]:
            result = measure(workers, side, folder, steps)
            rates.append(result["rows_per_s"])
            losses.append(result["loss"])
            print(
                f"| {workers} | {number + 1} | {side} | {result['rows_per_s']:.1f} "
                f"| {result['step_s']:.3f} | {result['cpu_s']:.3f} | {result['loss']:.4f} "
                f"| {result['seconds']:.0f} |",
                flush=True,
            )
        if workers == "one" and abs(losses[0] - losses[1]) > _SAME_LOSS:
            raise RuntimeError(f"the two sides differ in their losses: {losses}")
        ratios.append(rates[0] / rates[1])
    print(f"\nratios with {workers}: {', '.join(f'{r:.3f}' for r in ratios)}\n", flush=True)
    return float(np.median(ratios))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds with one worker")
    parser.add_argument("--two-rounds", type=int, default=2, help="rounds with two workers")
    parser.add_argument(
        "--steps", type=int, default=40, help="steps of each run, including the warm-up"
    )
    for name in ("--side", "--folder", "--ends"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        globals()[arguments.side](arguments.folder, arguments.steps, arguments.ends)
        return

    from benchmarks.photos import make_jpegs
    from benchmarks.shards import write_shards

    with tempfile.TemporaryDirectory() as folder:
        # An epoch must have more steps than the run takes.
        num_rows = {"train": 4 * arguments.steps * BATCH, "validation": BATCH, "test": BATCH}
        write_shards(Path(folder) / "prepared", num_rows, make_jpegs(SIZE), SIZE)
        print("| workers | round | side | rows/s | median step, s | its CPU, s | loss | seconds |")
        print("|---|---|---|---|---|---|---|---|")
        result = {}
        if arguments.rounds:
            result["vs_fit"] = compare("one", arguments.rounds, folder, arguments.steps)
        if arguments.two_rounds:
            ratio = compare("two", arguments.two_rounds, folder, arguments.steps)
            result["two_workers_vs_legacy_fit"] = ratio
    print(json.dumps({name: round(ratio, 4) for name, ratio in result.items()}))


if __name__ == "__main__":
    main()
