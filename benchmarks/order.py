"""Are the rows of a step the same whatever the number of workers, and wherever a run goes on?

Method: 10,007 rows in shards, steps of 96 rows, two epochs and a half, through the real feeds. Each
step's rows of all workers are compared with those of one worker; then the feed is started anew at
random steps, and what it reads is counted.

Run:   python -m benchmarks.order
Ends in one line of JSON.
"""

import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.photos import jpeg, photo
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
        images = [jpeg(photo(rng, 16)) for _ in range(10)]
        num_rows = {"train": NUM_ROWS, "validation": 10, "test": 10}
        manifest = write_shards(Path(name), num_rows, images, 16)

        def order_of(seed: int) -> TrainingSampler:
            return TrainingSampler.of(manifest.splits["train"], BATCH, seed, DATA)

        def steps(
            start: int, stop: int, num_workers: int = 1, seed: int = 0
        ) -> list[tuple[int, ...]]:
            """Return the rows of each step over all workers."""
            shares = []
            for rank in range(num_workers):
                options = FeedOptions(data=DATA, threads=2)
                feed = TrainingFeed(
                    Folder(name), manifest, order_of(seed), rank, num_workers, options
                )
                column = COLUMNS.index("row")
                shares.append(
                    [b[NUMERIC][:, column].astype(int).tolist() for b in feed.batches(start, stop)]
                )
            return [tuple(r for part in parts for r in part) for parts in zip(*shares, strict=True)]

        order = order_of(0)
        last = order.steps_before(3) - order.num_steps(2) // 2
        alone = steps(0, last)
        result: dict[str, object] = {"steps": last}
        print("\n| what | |\n|---|---|")
        for num_workers in (2, 4):
            same = steps(0, last, num_workers) == alone
            result[f"same_with_{num_workers}_workers"] = same
            print(f"| steps alike with {num_workers} workers | {same} |")
        resumed, most_read_again = True, 0
        for start in sorted(rng.choice(last, 10, replace=False).tolist()):
            resumed &= steps(start, last) == alone[start:]
            first = next(iter(order.windows(start, last)))
            most_read_again = max(most_read_again, start - first.epoch_step - first.first_step)
        result |= {"same_after_resume": resumed, "steps_read_again": most_read_again}
        print(f"| steps alike after starting anew at 10 random steps | {resumed} |")
        print(
            f"| steps read again at most, of {order.steps_per_window} in a window "
            f"| {most_read_again} |"
        )
        whole = NUM_ROWS // BATCH
        epochs = [Counter(row for step in alone[:whole] for row in step)]
        result["rows_once"] = max(epochs[0].values()) == 1 and len(epochs[0]) == whole * BATCH
        print(f"| rows seen twice in the first {whole} steps | {max(epochs[0].values()) - 1} |")
        middle = order.num_steps(0)
        others = {
            "other_epoch_differs": alone[:middle] != alone[middle : 2 * middle],
            "other_seed_differs": steps(0, middle, seed=1) != alone[:middle],
        }
        result |= others
        for what, differs in others.items():
            print(f"| {what.replace('_', ' ')} | {differs} |")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
