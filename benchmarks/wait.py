"""What share of the wall time do steps wait for data, with a model that computes all the time?

Method: the real `train` job, EfficientNetB0 untrained at 96 px on CPU, from JPEGs stored at 320 px;
the cache is off, so that every epoch decodes. `data/wait_s` and `time/epoch_s` come from the run's
history.jsonl; the share is of all epochs, the first one included.

Run:   python -m benchmarks.wait [--rows 768] [--epochs 3]
Ends in one line of JSON.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.photos import jpeg, photo
from benchmarks.shards import write_shards
from ray_jobs.config.spec import RunSpec
from ray_jobs.train.job import fit
from ray_jobs.train.telemetry import console


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    images = [jpeg(photo(rng, 320)) for _ in range(100)]
    shares: dict[str, float] = {}
    print("\n| workers | epoch | seconds | waited | share |\n|---|---|---|---|---|")
    for num_workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            num_rows = {"train": arguments.rows, "validation": 64, "test": 64}
            write_shards(Path(folder) / "prepared", num_rows, images, 320)
            spec = {
                "run": {"storage_path": folder, "name": "run"},
                "data": {"prepared": f"{folder}/prepared", "image_size": 96, "cache": "none"},
                "model": {"image": {"kind": "efficientnet_b0", "weights": None}},
                "train": {
                    "num_workers": num_workers,
                    "cpus_per_worker": 2 / num_workers,
                    "epochs": arguments.epochs,
                },
            }
            fit(RunSpec.model_validate(spec))
            lines = (Path(folder) / "run" / "history.jsonl").read_text().splitlines()
        history = [json.loads(line) for line in lines]
        for record in history:
            seconds, waited = record[console.EPOCH_S], record[console.DATA_WAIT_S]
            print(
                f"| {num_workers} | {record[console.EPOCH] + 1} | {seconds:.1f} | {waited:.2f} "
                f"| {waited / seconds:.2%} |"
            )
        total = sum(record[console.EPOCH_S] for record in history)
        shares[f"wait_share_{num_workers}_workers"] = round(
            sum(record[console.DATA_WAIT_S] for record in history) / total, 4
        )
    print(json.dumps(shares))


if __name__ == "__main__":
    main()
