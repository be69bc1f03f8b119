"""Checks that the rows of a step depend neither on the number of workers nor on a restart.

Method: 10,007 rows in shards, steps of 96 rows, two and a half epochs, through the feeds of
`train`. The rows of each step of several workers are compared with those of one worker. Then the
feed is restarted at random steps, and the steps that it reads again are counted.

Run:   python -m benchmarks.order
The last line of the output is JSON.
"""

import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.photos import make_jpegs
from benchmarks.shards import COLUMNS, write_shards
from ray_jobs.config.spec import DataSpec
from ray_jobs.data.batch import NUMERIC
from ray_jobs.data.loader import FeedOptions, TrainingFeed
from ray_jobs.data.sampler import TrainingSampler
from ray_jobs.storage.folder import Folder

NUM_ROWS, BATCH = 10_007, 96
DATA = DataSpec(cache="none")


def main() -> None:
    """Run from the command line."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        images = make_jpegs(16, 10, rng)
        num_rows = {"train": NUM_ROWS, "validation": 10, "test": 10}
        manifest = write_shards(Path(name), num_rows, images, 16)

        def sampler_of(seed: int) -> TrainingSampler:
            return TrainingSampler.of(manifest.splits["train"], BATCH, seed, DATA)

        def steps(
            start: int, stop: int, num_workers: int = 1, seed: int = 0
        ) -> list[tuple[int, ...]]:
            """Return the rows of each step, of all workers together."""
            shares = []
            for rank in range(num_workers):
                options = FeedOptions(data=DATA, threads=2)
                feed = TrainingFeed(
                    Folder(name), manifest, sampler_of(seed), rank, num_workers, options
                )
                column = COLUMNS.index("row")
                shares.append(
                    [b[NUMERIC][:, column].astype(int).tolist() for b in feed.batches(start, stop)]
                )
            return [tuple(r for part in parts for r in part) for parts in zip(*shares, strict=True)]

        sampler = sampler_of(0)
        last = sampler.steps_before(3) - sampler.num_steps(2) // 2
        alone = steps(0, last)
        result: dict[str, object] = {"steps": last}
        print("\n| check | result |\n|---|---|")
        for num_workers in (2, 4):
            same = steps(0, last, num_workers) == alone
            result[f"same_with_{num_workers}_workers"] = same
            print(f"| same steps with {num_workers} workers | {same} |")
        resumed, max_read_again = True, 0
        for start in sorted(rng.choice(last, 10, replace=False).tolist()):
            resumed &= steps(start, last) == alone[start:]
            first = next(iter(sampler.windows(start, last)))
            max_read_again = max(max_read_again, start - first.epoch_step - first.first_step)
        result |= {"same_after_resume": resumed, "steps_read_again": max_read_again}
        print(f"| same steps after a restart at 10 random steps | {resumed} |")
        print(
            f"| most steps read again, of {sampler.steps_per_window} per window "
            f"| {max_read_again} |"
        )
        num_steps = NUM_ROWS // BATCH
        epochs = [Counter(row for step in alone[:num_steps] for row in step)]
        result["rows_once"] = max(epochs[0].values()) == 1 and len(epochs[0]) == num_steps * BATCH
        print(f"| repeated rows in the first {num_steps} steps | {max(epochs[0].values()) - 1} |")
        middle = sampler.num_steps(0)
        differences = {
            "other_epoch_differs": alone[:middle] != alone[middle : 2 * middle],
            "other_seed_differs": steps(0, middle, seed=1) != alone[:middle],
        }
        result |= differences
        for name, differs in differences.items():
            print(f"| {name.replace('_', ' ')} | {differs} |")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
