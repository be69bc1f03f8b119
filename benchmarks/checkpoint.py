"""What share of the training's time do checkpoints take that come every 20 steps at the most?

Method: the fusion model with EfficientNetB5 (28 million weights, some 340 MB a checkpoint with
Adam's moments) at 96 px in batches of 32, one process on all cores, rows ready in memory. With
`train.checkpoint_every_steps=20` the real loop offers a checkpoint every 15 steps; every other one
is written, by the real `CheckpointManager` to the disk, in the background, and awaited where
a worker awaits it.
So blocks of 15 steps that begin with a checkpoint take turns with blocks without one, in
one process. The first steps, in which the graph is traced, are in neither.

A checkpoint costs the loop's pause for the copy, waits for the writer, and what the first three
steps take longer than the others of their block (by their median, so that a machine that is slower
for minutes does not matter), less the same in blocks without one. The writer is done long before
the third step is. Two figures:

    seconds           that a checkpoint costs, the mean over blocks
    checkpoint_cost   as a share of the wall time

What rank 0 writes at the end of an epoch is another matter, and no step waits for other workers.

Run:   python -m benchmarks.checkpoint [--blocks 8] [--size 96] [--batch 32] [--folder WHERE]
Ends in one line of JSON.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ray_jobs.train.callbacks import Callbacks, ControlRequest, CopyCheckpoint

EVERY = 20
_DISTURBED = 3
"""First steps of a block, in which a checkpoint is written."""


@dataclass
class Block:
    """The steps from one checkpoint to the next."""

    written: bool
    pause_s: float = 0.0
    """From the step before the checkpoint to the next one."""
    waited_s: float = 0.0
    """For the writer."""
    steps_s: list[float] = field(default_factory=list)

    @property
    def step_s(self) -> float:
        """What a step takes that nothing disturbs."""
        return float(np.median(self.steps_s[_DISTURBED:]))

    @property
    def longer_s(self) -> float:
        """What the first steps take longer than others."""
        return sum(self.steps_s[:_DISTURBED]) - _DISTURBED * self.step_s

    @property
    def lost_s(self) -> float:
        """What this block takes longer than steps alone would."""
        # The loop reads the batch norms' statistics for a checkpoint that is then not written, too.
        return self.longer_s + (self.pause_s + self.waited_s if self.written else 0.0)


class Checkpoints(Callbacks):
    """Writes every other checkpoint, as a worker does, and notes what takes how long.

    Args:
        store: that writes.
        num_blocks: between checkpoints, the one before the first not counted.
    """

    def __init__(self, store: Any, num_blocks: int) -> None:
        self.store, self.num_blocks = store, num_blocks
        self.blocks: list[Block] = []
        self.started = self.ended = time.perf_counter()

    def before_step(self, step: int, num_steps: int) -> None:
        """Wait as a worker does."""
        paused = time.perf_counter()
        if step + num_steps > self.store.written + EVERY:
            self.store.wait()
        self.started = time.perf_counter()
        if self.blocks:
            block = self.blocks[-1]
            block.waited_s += self.started - paused
            if not block.steps_s:
                block.pause_s = paused - self.ended

    def after_step(self, step: int) -> None:
        """Note the time."""
        self.ended = time.perf_counter()
        if self.blocks:
            self.blocks[-1].steps_s.append(self.ended - self.started)

    def poll_control(self) -> ControlRequest:
        """Stop after the last block."""
        return ControlRequest(stop=len(self.blocks) > self.num_blocks)

    def on_checkpoint(self, step: int, copy: CopyCheckpoint) -> None:
        """Write, or take for written."""
        block = Block(written=len(self.blocks) % 2 == 0)
        self.blocks.append(block)
        if len(self.blocks) > self.num_blocks:
            return
        if block.written:
            self.store.save(copy(self.store.spare()))
        else:
            # Else the next one would be late by what this one was left out.
            self.store.written = step


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--blocks", type=int, default=8, help="of 15 steps, half with a checkpoint")
    parser.add_argument("--size", type=int, default=96, help="of images, in pixels")
    parser.add_argument("--batch", type=int, default=32, help="rows of a step")
    parser.add_argument("--folder", help="where checkpoints go for a while; by default as Python")
    arguments = parser.parse_args()
    size, batch = arguments.size, arguments.batch

    from benchmarks.photos import jpeg, photo
    from benchmarks.shards import write_shards
    from ray_jobs.cluster.strategy import WorkerContext, set_devices
    from ray_jobs.config.spec import RunSpec
    from ray_jobs.storage.folder import Folder
    from ray_jobs.train.checkpoints.checkpoint_manager import CheckpointManager

    set_devices(os.cpu_count() or 1, use_gpu=False)

    from benchmarks.memory_loop import MemoryLoop

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        image = jpeg(photo(np.random.default_rng(0), size))
        num_rows = {"train": batch * EVERY * (arguments.blocks + 2), "validation": 16, "test": 16}
        manifest = write_shards(Path(folder) / "prepared", num_rows, [image], size)
        spec = RunSpec.model_validate(
            {
                "data": {"prepared": f"{folder}/prepared"},
                "model": {"image": {"kind": "efficientnet_b5", "weights": None}},
                "train": {"global_batch_size": batch, "checkpoint_every_steps": EVERY},
            }
        )
        store = CheckpointManager(Folder(f"{folder}/run"))
        callbacks = Checkpoints(store, arguments.blocks)
        MemoryLoop(spec, manifest, WorkerContext(), num_batches=8).run(callbacks)
        store.close()
        newest = Path(folder) / "run" / "checkpoints" / "steps" / f"{store.steps()[-1]:08d}"
        num_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    blocks = callbacks.blocks[: arguments.blocks]
    print("\n| block | checkpoint | a step, s | pause, s | waited, s | first steps longer, s |")
    print("|---|---|---|---|---|---|")
    for number, block in enumerate(blocks, 1):
        print(
            f"| {number} | {'yes' if block.written else 'no'} | {block.step_s:.2f} "
            f"| {block.pause_s:.3f} | {block.waited_s:.3f} | {block.longer_s:.2f} |"
        )
    print(f"\na checkpoint: {num_bytes / 1e6:,.0f} MB\n")
    with_one, without = (
        [block.lost_s for block in blocks if block.written is written] for written in (True, False)
    )
    seconds = float(np.mean(with_one) - np.mean(without))
    rest_s = float(np.mean([len(block.steps_s) * block.step_s for block in blocks]))
    result = {"seconds": seconds, "checkpoint_cost": seconds / (seconds + rest_s)}
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
