"""What share of the training's time do checkpoints take that come every 20 steps at the most?

Method: the fusion model with EfficientNetB5 (28 million weights, some 340 MB a checkpoint with
Adam's moments) at 64 px in batches of 16, one process on all cores, rows ready in memory. With
`train.checkpoint_every_steps=20` the real loop offers a checkpoint every 15 steps; every other one
is written, by the real `CheckpointStore` to the disk, in the background, and awaited where a worker
awaits it. So blocks of 15 steps that begin with a checkpoint, and are disturbed by its writing,
take turns with blocks without one, in one process. The first steps, in which the graph is traced,
are in neither. Two shares of the wall time:

    checkpoint_cost   by what the blocks take: 1 - median without / median with
    paused            by the clock: the pauses of the loop for the copy, and waits for the writer

What rank 0 writes at the end of an epoch is another matter, and no step waits for other workers.

Run:   python -m benchmarks.checkpoint [--blocks 8] [--folder WHERE]
Ends in one line of JSON.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ray_jobs.hooks import Copy, Hooks, Wish

SIZE, BATCH, EVERY = 64, 16, 20


class Checkpoints(Hooks):
    """Writes every other checkpoint, as a worker does, and notes what takes how long.

    Args:
        store: that writes.
        num_blocks: between checkpoints, the one before the first not counted.
    """

    def __init__(self, store: Any, num_blocks: int) -> None:
        self.store, self.num_blocks = store, num_blocks
        self.offered: list[tuple[float, float]] = []
        """When the step before each checkpoint ended, and the process's CPU seconds then."""
        self.pauses_s: list[float] = []
        """From there to the next step."""
        self.waits_s: list[float] = []
        """For the writer, in the steps that follow."""
        self.ended = time.perf_counter()

    def before_step(self, step: int, num_steps: int) -> None:
        """Wait as a worker does."""
        if len(self.pauses_s) < len(self.offered):
            self.pauses_s.append(time.perf_counter() - self.ended)
            self.waits_s.append(0.0)
        if step + num_steps > self.store.written + EVERY:
            started = time.perf_counter()
            self.store.wait()
            if self.waits_s:
                self.waits_s[-1] += time.perf_counter() - started

    def after_step(self, step: int) -> None:
        """Note the time."""
        self.ended = time.perf_counter()

    def wish(self) -> Wish:
        """Stop after the last block."""
        return Wish(stop=len(self.offered) > self.num_blocks)

    def on_checkpoint(self, step: int, copy: Copy) -> None:
        """Write, or take for written."""
        if len(self.offered) > self.num_blocks:
            return
        if len(self.offered) % 2 == 0:
            self.store.save(copy(self.store.spare()))
        else:
            # Else the next one would be late by what this one was left out.
            self.store.written = step
        self.offered.append((self.ended, time.process_time()))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--blocks", type=int, default=8, help="of 15 steps, half with a checkpoint")
    parser.add_argument("--folder", help="where checkpoints go for a while; by default as Python")
    arguments = parser.parse_args()

    from benchmarks.photos import jpeg, photo
    from benchmarks.shards import write_shards
    from ray_jobs.checkpoint_store import CheckpointStore
    from ray_jobs.replicas import Place, set_devices
    from ray_jobs.spec import RunSpec
    from ray_jobs.storage import Folder

    set_devices(os.cpu_count() or 1, use_gpu=False)

    from benchmarks.memory_loop import MemoryLoop

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        image = jpeg(photo(np.random.default_rng(0), SIZE))
        num_rows = {"train": BATCH * EVERY * (arguments.blocks + 2), "validation": 16, "test": 16}
        manifest = write_shards(Path(folder) / "prepared", num_rows, [image], SIZE)
        spec = RunSpec.model_validate(
            {
                "data": {"prepared": f"{folder}/prepared"},
                "model": {"image": {"kind": "efficientnet_b5", "weights": None}},
                "train": {"global_batch_size": BATCH, "checkpoint_every_steps": EVERY},
            }
        )
        store = CheckpointStore(Folder(f"{folder}/run"))
        hooks = Checkpoints(store, arguments.blocks)
        MemoryLoop(spec, manifest, Place(), num_batches=8).run(hooks)
        store.close()
        newest = Path(folder) / "run" / "checkpoints" / "steps" / f"{store.steps()[-1]:08d}"
        num_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    block_s, cpu_s = np.diff(hooks.offered, axis=0).T
    pauses_s, waits_s = np.asarray(hooks.pauses_s), np.asarray(hooks.waits_s)
    # The loop reads the batch norms' statistics for a checkpoint that is then not written, too.
    block_s[1::2] -= pauses_s[1 : len(block_s) : 2]
    print("\n| block | checkpoint | seconds | CPU seconds | pause, s | waited, s |")
    print("|---|---|---|---|---|---|")
    for i, (seconds, cpu) in enumerate(zip(block_s, cpu_s, strict=True)):
        written = "no" if i % 2 else "yes"
        print(
            f"| {i + 1} | {written} | {seconds:.2f} | {cpu:.2f} | {pauses_s[i]:.3f} "
            f"| {waits_s[i]:.3f} |"
        )
    print(f"\na checkpoint: {num_bytes / 1e6:,.0f} MB; {block_s[1::2].mean() / 15:.2f} s a step\n")
    paused_s = (pauses_s + waits_s)[: len(block_s) : 2].sum()
    result = {
        "checkpoint_cost": 1 - np.median(block_s[1::2]) / np.median(block_s[::2]),
        "paused": paused_s / block_s[::2].sum(),
    }
    print(json.dumps({name: round(float(share), 4) for name, share in result.items()}))


if __name__ == "__main__":
    main()
