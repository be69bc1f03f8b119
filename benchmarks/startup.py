"""Measures the time from the `train` command to the first step, and how it is spent.

Method: `train` with one and with two workers, the `tiny` branch at 32 px and a local Ray, and a
bare Keras script that trains the same model with `fit` on arrays. They run in turns, each in a
process of its own. The parts are `startup/*_s` in history.jsonl, as in every run. The total is the
time from the start of the process until the console reports the first step, at most a quarter of a
second late; for the script, until the end of its first step. The remainder (Python, spec,
coordinator, choice of a cache) is `other`.

    ray         ray.init of a local Ray
    workers     Ray Train: controller, placement, processes and their environment
    imports     TensorFlow and Keras in the worker
    build       manifest, strategy, model, optimizer
    checkpoint  looking for a checkpoint (there is none) and waiting for all workers
    first_step  the first batch, tracing the graph, one step

The parts are those of rank 0. Results are medians of all rounds; the disk cache may be cold in the
first.

Run:   python -m benchmarks.startup [--rounds 3]
The last line of the output is JSON: the seconds of each part, and the ratio of one worker to the
script.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS = ("ray", "workers", "imports", "build", "checkpoint", "first_step")
SIZE = 32
ENDED_AT = "ended-at"


def train(folder: str, num_workers: int) -> None:
    """Train in this process, and write the time at which the console reports the first step."""
    from unittest.mock import patch

    from ray_jobs.train.job import fit
    from ray_jobs.train.telemetry import console

    class ProgressConsole(console.ProgressConsole):
        def show(self, event: console.Event) -> None:
            if event["kind"] == "startup":
                Path(folder, ENDED_AT).write_text(str(time.time()))
            super().show(event)

    with patch.object(console, "ProgressConsole", ProgressConsole):
        fit(_spec(folder, num_workers))


def train_bare(folder: str) -> None:
    """Train with Keras' `fit`, and write the time at which the first step ends."""
    import keras

    from benchmarks.arrays import make_arrays
    from mm_model.losses import make_loss
    from mm_model.optimizer import make_optimizer
    from ray_jobs.data.manifest import read_manifest
    from ray_jobs.storage.folder import Folder
    from ray_jobs.train.model_factory import new_model

    class Timer(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            Path(folder, ENDED_AT).write_text(str(time.time()))

    spec = _spec(folder, 1)
    manifest = read_manifest(Folder(spec.data.prepared))
    model = new_model(spec, manifest)
    off: Any = False
    model.compile(make_optimizer(spec.train, 8), make_loss(spec.train), jit_compile=off)
    batch = make_arrays(spec.train.global_batch_size, SIZE, len(manifest.numeric_columns))
    inputs = {"image": batch["image"], "numeric": batch["numeric"]}
    options: Any = {"batch_size": spec.train.global_batch_size, "verbose": 0}
    model.fit(inputs, batch["label"], callbacks=[Timer()], **options)


def _spec(folder: str, num_workers: int) -> Any:
    from ray_jobs.config.spec import RunSpec

    return RunSpec.model_validate(
        {
            "run": {"storage_path": folder, "name": "run"},
            "data": {"prepared": f"{folder}/prepared"},
            "model": {"image": {"kind": "tiny", "weights": None, "units": 8}},
            "train": {"num_workers": num_workers, "epochs": 1},
        }
    )


def measure(num_workers: int) -> dict[str, float]:
    """Run once; return the seconds of each part, the remainder and the total.

    Args:
        num_workers: Number of workers of `train`; 0 for the script, which has no parts.
    """
    from benchmarks.photos import make_jpegs
    from benchmarks.shards import write_shards

    with tempfile.TemporaryDirectory() as folder:
        num_rows = {"train": 256, "validation": 64, "test": 64}
        write_shards(Path(folder) / "prepared", num_rows, make_jpegs(SIZE), SIZE)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
        command = [sys.executable, "-m", "benchmarks.startup", "--folder", folder]
        command += ["--workers", str(num_workers)]
        start = time.time()
        subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
        total = float(Path(folder, ENDED_AT).read_text()) - start
        if not num_workers:
            return {"total": total}
        record = json.loads(Path(folder, "run", "history.jsonl").read_text().splitlines()[0])
    seconds = {part: record[f"startup/{part}_s"] for part in PARTS}
    return {**seconds, "other": total - sum(seconds.values()), "total": total}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        if arguments.workers:
            train(arguments.folder, arguments.workers)
        else:
            train_bare(arguments.folder)
        return
    names = {0: "script", 1: "one worker", 2: "two workers"}
    rounds: dict[int, list[dict[str, float]]] = {number: [] for number in names}
    for number in range(arguments.rounds):
        for num_workers, name in names.items():
            rounds[num_workers].append(measure(num_workers))
            total_s = rounds[num_workers][-1]["total"]
            print(f"round {number + 1}: {name} {total_s:.1f} s", flush=True)
    result = {}
    print("\n| run | part | seconds | each round | fraction |\n|---|---|---|---|---|")
    for num_workers, name in names.items():
        results = rounds[num_workers]
        medians = {part: median([seconds[part] for seconds in results]) for part in results[0]}
        for part, middle_s in medians.items():
            each = ", ".join(f"{seconds[part]:.1f}" for seconds in results)
            fraction = middle_s / medians["total"]
            print(f"| {name} | {part} | {middle_s:.1f} | {each} | {fraction:.0%} |")
            result[f"{name} {part}_s".replace(" ", "_")] = round(middle_s, 2)
    result["ratio"] = round(result["one_worker_total_s"] / result["script_total_s"], 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
