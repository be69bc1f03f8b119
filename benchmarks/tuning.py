"""Compares the trials per hour of `tune` with the pattern in Ray's documentation.

Method: both sides have the same machine, data, model, number of epochs, space, random searcher and
number of concurrent trials, and every trial trains to its end (FIFO). Time is measured from the
start of the search, on a running Ray, to the end of the last trial.

    documented   a function trainable that calls `fit()` of a `TensorflowTrainer` with one worker
                 and `TuneReportCallback`, as in Ray's documentation. The worker uses our `Loop`,
                 since Keras 3's `fit` does not run there, and our lighter trainer, to this side's
                 advantage. Four trials.
    ours         the trials of `python -m ray_jobs.tune` in an empty folder, including the start of
                 their processes and the computation of features

    frozen_vs_documented   a frozen, untrained EfficientNetB0 at 96 px; heads, numeric branch and
                           fusion are trained; our side trains them on features of the plain image
                           and four augmented views
    full_vs_documented     the `tiny` branch at 64 px, trained completely

The ratio compares finished trials per hour. Our search has its usual size, because its trials share
a start. The documented side runs only a few trials, because each of them costs the same.

Run:   python -m benchmarks.tuning [--trials 16] [--documented 4]
The last line of the output is JSON.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.documented import run_documented
from benchmarks.photos import make_jpegs
from benchmarks.shards import write_shards
from ray_jobs.config.spec import RunSpec

SIZE, ROWS = 96, {"train": 384, "validation": 128, "test": 64}
MAX_CONCURRENT = 2
SPACE = {
    "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "train.weight_decay": {"loguniform": [1e-3, 1e-1]},
    "model.dropout": {"uniform": [0.1, 0.5]},
    "model.fusion.units": {"choice": [32, 64, 128]},
}
MODELS: dict[str, dict[str, Any]] = {
    "frozen": {"image": {"kind": "efficientnet_b0", "weights": None, "trainable": False}},
    "full": {"image": {"kind": "tiny", "weights": None, "units": 64}},
}


def make_spec(folder: str, kind: str, trials: int) -> RunSpec:
    """Return the spec of a search."""
    return RunSpec.model_validate(
        {
            "run": {"storage_path": f"{folder}/runs", "name": kind},
            "data": {
                "prepared": f"{folder}/prepared",
                "image_size": 96 if kind == "frozen" else 64,
            },
            "model": MODELS[kind],
            "train": {"epochs": 8, "patience": 8, "optimizer": "adamw"},
            "tune": {
                "space": SPACE,
                "searcher": "random",
                "scheduler": "fifo",
                "budget": {"trials": trials},
                "max_concurrent_trials": MAX_CONCURRENT,
            },
        }
    )


def run_ours(spec: RunSpec) -> list[str]:
    """Run the trials of a search as `tune` does, and return their states."""
    from ray_jobs.train.job import open_run
    from ray_jobs.tune.job import run_search
    from ray_jobs.tune.search.space import Space

    run = open_run(spec)
    search = run_search(run, Space(run.spec))
    for row in search.trials:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in row.seconds.items())
        print(f"    {row.name} {row.state} {parts}")
    return [row.state for row in search.trials]


def rate(name: str, run: Any, *arguments: Any) -> float:
    """Run trials, and return the number of trials per hour.

    Raises:
        RuntimeError: If a trial does not finish.
    """
    started = time.monotonic()
    states = run(*arguments)
    seconds = time.monotonic() - started
    if set(states) != {"finished"}:
        raise RuntimeError(f"{name}: not all trials finished: {states}")
    per_hour = 3600 * len(states) / seconds
    print(f"{name}: {len(states)} trials in {seconds:.0f} s, {per_hour:.0f} per hour", flush=True)
    return per_hour


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=16, help="trials of each of our searches")
    parser.add_argument(
        "--documented", type=int, default=4, help="trials of the documented pattern"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from ray_jobs.cluster.connection import connected

    ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder, "prepared"), ROWS, make_jpegs(SIZE, 64), SIZE)
        # A documented trial needs a CPU for itself and one for its worker; Ray Data needs one.
        cpus = patch(
            "ray_jobs.cluster.connection.available_cpus", return_value=2 * MAX_CONCURRENT + 1
        )
        with cpus, connected("local", num_cpus=2 * MAX_CONCURRENT):
            for kind in MODELS:
                ours = make_spec(folder, kind, arguments.trials)
                theirs = make_spec(folder, kind, arguments.documented)
                baseline = rate(f"{kind}, documented", run_documented, theirs, MAX_CONCURRENT)
                ratios[f"{kind}_vs_documented"] = rate(f"{kind}, ours", run_ours, ours) / baseline
    print(json.dumps({name: round(ratio, 2) for name, ratio in ratios.items()}))


if __name__ == "__main__":
    main()
