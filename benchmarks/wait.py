"""Measures the fraction of the wall time during which steps wait for data.

Method: the `train` job trains an EfficientNetB0 from scratch at 96 px on JPEGs stored at 320 px.
The model runs on the CPU, which is always busy. The cache is off, so every epoch decodes.
`data/wait_s` and `time/epoch_s` come from history.jsonl of the run; the fraction covers all epochs,
including the first.

Run:   python -m benchmarks.wait [--rows 768] [--epochs 3]
The last line of the output is JSON.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.photos import make_jpegs
from benchmarks.shards import write_shards
from ray_jobs.config.spec import RunSpec
from ray_jobs.train.job import fit
from ray_jobs.train.telemetry.history_keys import DATA_WAIT_S, EPOCH, EPOCH_S


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    images = make_jpegs(320, 100)
    shares: dict[str, float] = {}
    print("\n| workers | epoch | seconds | waited | fraction |\n|---|---|---|---|---|")
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
            seconds, waited = record[EPOCH_S], record[DATA_WAIT_S]
            print(
                f"| {num_workers} | {record[EPOCH] + 1} | {seconds:.1f} | {waited:.2f} "
                f"| {waited / seconds:.2%} |"
            )
        total = sum(record[EPOCH_S] for record in history)
        shares[f"wait_share_{num_workers}_workers"] = round(
            sum(record[DATA_WAIT_S] for record in history) / total, 4
        )
    print(json.dumps(shares))


if __name__ == "__main__":
    main()
