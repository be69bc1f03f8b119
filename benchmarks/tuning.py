"""How many more trials an hour does a search finish than Ray's documented way, one after another?

Method: the same machine, data, model, number of epochs, space and random choice for both, every
trial trained to its end (FIFO), as many trials at once; from the start of the search, with Ray
there already, to its last trial's end.

    documented   a function trainable that makes a `TensorflowTrainer` of one worker and calls
                 `fit()`, with `TuneReportCallback` among its callbacks, as Ray's documentation has
                 it. The worker trains by our own `Loop`, since Keras 3's `fit` does not run there,
                 and the trainer is the lighter one of ours, which favours it. Four trials.
    ours         the trials of `python -m ray_jobs.tune`, from an empty folder: what starts their
                 processes, and what computes the features, is in it.

    frozen_vs_documented   EfficientNetB0 at 96 px, frozen, untrained: heads, numbers and fusion
                           learn; ours on features, four augmented views and the plain one.
    full_vs_documented     the `tiny` branch at 64 px, all of it learns.

The ratio is that of finished trials an hour. Ours runs a search of the usual size, theirs as few
trials as give a steady rate: each of theirs costs the same, ours share a start.

Run:   python -m benchmarks.tuning [--trials 16] [--documented 4]
Ends in one line of JSON.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.documented import run_documented
from benchmarks.photos import jpeg, photo
from benchmarks.shards import write_shards
from ray_jobs.config.spec import RunSpec

SIZE, ROWS = 96, {"train": 384, "validation": 128, "test": 64}
AT_ONCE = 2
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
    """Return the specification of a search."""
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
                "max_concurrent_trials": AT_ONCE,
            },
        }
    )


def run_ours(spec: RunSpec) -> list[str]:
    """Run the trials of a search as `tune` does, and return how they ended."""
    from ray_jobs.data.manifest import read_manifest
    from ray_jobs.storage.folder import Folder
    from ray_jobs.tune.job import trials_of
    from ray_jobs.tune.search.space import Space

    found = trials_of(spec, read_manifest(Folder(spec.data.prepared)), Space(spec))
    for row in found.trials:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in row.seconds.items())
        print(f"    {row.name} {row.state} {parts}")
    return [row.state for row in found.trials]


def rate(name: str, run: Any, *arguments: Any) -> float:
    """Run some trials, and return how many finish in an hour.

    Raises:
        RuntimeError: if one of them does not.
    """
    started = time.monotonic()
    states = run(*arguments)
    seconds = time.monotonic() - started
    if set(states) != {"finished"}:
        raise RuntimeError(f"{name}: trials ended as {states}")
    found = 3600 * len(states) / seconds
    print(f"{name}: {len(states)} trials in {seconds:.0f} s, {found:.0f} an hour", flush=True)
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=16, help="of ours, in each search")
    parser.add_argument("--documented", type=int, default=4, help="of theirs")
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from ray_jobs.cluster.connection import connected

    ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        images = [jpeg(photo(rng, SIZE)) for _ in range(64)]
        write_shards(Path(folder, "prepared"), ROWS, images, SIZE)
        # Theirs takes a CPU for the trial and one for its worker, and one is left to Ray Data.
        with patch("os.cpu_count", return_value=1), connected("local", num_cpus=2 * AT_ONCE):
            for kind in MODELS:
                ours = make_spec(folder, kind, arguments.trials)
                theirs = make_spec(folder, kind, arguments.documented)
                slow = rate(f"{kind}, documented", run_documented, theirs, AT_ONCE)
                ratios[f"{kind}_vs_documented"] = rate(f"{kind}, ours", run_ours, ours) / slow
    print(json.dumps({name: round(ratio, 2) for name, ratio in ratios.items()}))


if __name__ == "__main__":
    main()
