"""Measures the time from the `train` command to the first step, and how it is spent.

Method: `train` with two workers, the `tiny` branch at 32 px and a local Ray runs several times,
each in a separate process. The parts are `startup/*_s` in history.jsonl, as in every run. The total
is the time from the start of the process until the console reports the first step, at most a
quarter of a second late. The remainder (Python, spec, coordinator, choice of a cache) is `other`.

    ray         ray.init of a local Ray
    workers     Ray Train: controller, placement, two processes and their environment
    imports     TensorFlow and Keras in the worker
    build       manifest, strategy, model, optimizer
    checkpoint  looking for a checkpoint (there is none) and waiting for all workers
    first_step  the first batch, tracing the graph, one step

The parts are those of rank 0. Results are medians of all rounds; the disk cache may be cold in the
first.

Run:   python -m benchmarks.startup [--rounds 3]
The last line of the output is JSON: the seconds of each part.
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

ROOT = Path(__file__).parents[1]
PARTS = ("ray", "workers", "imports", "build", "checkpoint", "first_step")
SIZE = 32
SHOWN_AT = "shown-at"


def train(folder: str) -> None:
    """Train in this process, and write the time at which the console reports the first step."""
    from unittest.mock import patch

    from ray_jobs.config.spec import RunSpec
    from ray_jobs.train.job import fit
    from ray_jobs.train.telemetry import console

    class ProgressConsole(console.ProgressConsole):
        def show(self, event: console.Event) -> None:
            if event["kind"] == "startup":
                Path(folder, SHOWN_AT).write_text(str(time.time()))
            super().show(event)

    spec = {
        "run": {"storage_path": folder, "name": "run"},
        "data": {"prepared": f"{folder}/prepared"},
        "model": {"image": {"kind": "tiny", "weights": None, "units": 8}},
        "train": {"num_workers": 2, "epochs": 1},
    }
    with patch.object(console, "ProgressConsole", ProgressConsole):
        fit(RunSpec.model_validate(spec))


def measure() -> dict[str, float]:
    """Train once; return the seconds of each part, the remainder and the total."""
    from benchmarks.photos import make_jpegs
    from benchmarks.shards import write_shards

    with tempfile.TemporaryDirectory() as folder:
        num_rows = {"train": 256, "validation": 64, "test": 64}
        write_shards(Path(folder) / "prepared", num_rows, make_jpegs(SIZE), SIZE)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
        command = [sys.executable, "-m", "benchmarks.startup", "--folder", folder]
        start = time.time()
        subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
        total = float(Path(folder, SHOWN_AT).read_text()) - start
        record = json.loads(Path(folder, "run", "history.jsonl").read_text().splitlines()[0])
    seconds = {part: record[f"startup/{part}_s"] for part in PARTS}
    return {**seconds, "other": total - sum(seconds.values()), "total": total}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        train(arguments.folder)
        return
    rounds = []
    for number in range(arguments.rounds):
        rounds.append(measure())
        print(f"round {number + 1}: {rounds[-1]['total']:.1f} s", flush=True)
    medians = {name: median([seconds[name] for seconds in rounds]) for name in rounds[0]}
    print("\n| part | seconds | each round | fraction |\n|---|---|---|---|")
    for name, middle_s in medians.items():
        each = ", ".join(f"{seconds[name]:.1f}" for seconds in rounds)
        print(f"| {name} | {middle_s:.1f} | {each} | {middle_s / medians['total']:.0%} |")
    print(json.dumps({f"{name}_s": round(middle_s, 2) for name, middle_s in medians.items()}))


if __name__ == "__main__":
    main()
