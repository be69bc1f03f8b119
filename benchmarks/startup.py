"""How long does a training take from the command to its first step, and where does it go?

Method: the real `train` with two workers, the `tiny` branch at 32 px, a local Ray, in a process of
its own, several times. The parts are `startup/*_s` of history.jsonl, as every run has them. The
total is from the start of the process to the moment at which the terminal says that training has
started, a quarter of a second late at most; what no part accounts for (Python, spec, coordinator,
the choice of a cache) is `other`.

    ray         ray.init of a local Ray
    workers     Ray Train: controller, placement, two processes, their environment
    imports     TensorFlow and Keras on the worker
    build       manifest, strategy, model, optimizer
    checkpoint  waiting for the newest checkpoint, here that there is none; and for all workers
    first_step  the first batch, the graph, one step

Parts are rank 0's. The medians of all rounds; the first may find a colder disk.

Run:   python -m benchmarks.startup [--rounds 3]
Ends in one line of JSON: seconds of each part.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("ray", "workers", "imports", "build", "checkpoint", "first_step")
SIZE = 32
SHOWN_AT = "shown-at"


def train(folder: str) -> None:
    """Train in this process, and leave in a file when the start was seen to be done."""
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
    """Train once; return the seconds of each part, of the rest and of all."""
    import numpy as np

    from benchmarks.photos import jpeg, photo
    from benchmarks.shards import write_shards

    with tempfile.TemporaryDirectory() as folder:
        image = jpeg(photo(np.random.default_rng(0), SIZE))
        num_rows = {"train": 256, "validation": 64, "test": 64}
        write_shards(Path(folder) / "prepared", num_rows, [image], SIZE)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
        command = [sys.executable, "-m", "benchmarks.startup", "--folder", folder]
        began = time.time()
        subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
        total = float(Path(folder, SHOWN_AT).read_text()) - began
        record = json.loads(Path(folder, "run", "history.jsonl").read_text().splitlines()[0])
    found = {part: record[f"startup/{part}_s"] for part in PARTS}
    return {**found, "other": total - sum(found.values()), "total": total}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        train(arguments.folder)
        return
    import numpy as np

    rounds = []
    for number in range(arguments.rounds):
        rounds.append(measure())
        print(f"round {number + 1}: {rounds[-1]['total']:.1f} s", flush=True)
    medians = {name: float(np.median([found[name] for found in rounds])) for name in rounds[0]}
    print("\n| part | seconds | each round | share |\n|---|---|---|---|")
    for name, seconds in medians.items():
        each = ", ".join(f"{found[name]:.1f}" for found in rounds)
        print(f"| {name} | {seconds:.1f} | {each} | {seconds / medians['total']:.0%} |")
    print(json.dumps({f"{name}_s": round(seconds, 2) for name, seconds in medians.items()}))


if __name__ == "__main__":
    main()
