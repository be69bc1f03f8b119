"""Measures the cost of checkpoints at most every 20 steps, as a fraction of the training time.

Method: the fusion model with EfficientNetB5 (28 million weights, about 340 MB per checkpoint with
Adam's moments) at 96 px in batches of 32, one process on all cores, rows in memory. With
`train.checkpoint_every_steps=20`, the loop offers a checkpoint every 15 steps. `CheckpointManager`
writes every other one to disk in the background, with the same waits as in a worker. Blocks of 15
steps with and without a checkpoint therefore alternate in one process. The first steps, in which
the graph is traced, belong to no block.

The cost of a block is the pause of the loop for the copy, the waits for the writer, and the extra
time of the first three steps over the median of the others in the block, which cancels slow drifts
of the machine's speed. The writer finishes long before the third step. The cost of a checkpoint is
the difference between blocks with and without one:

    seconds           mean cost of a checkpoint
    checkpoint_cost   the same as a fraction of the wall time

The writes of rank 0 at the end of an epoch and waits for other workers are excluded.

Run:   python -m benchmarks.checkpoint [--blocks 8] [--size 96] [--batch 32] [--folder DIR]
The last line of the output is JSON.
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
"""Number of steps at the start of a block during which a checkpoint is written."""


@dataclass
class Block:
    """The steps between two offered checkpoints."""

    written: bool
    pause_s: float = 0.0
    """Seconds between the steps before and after the checkpoint."""
    waited_s: float = 0.0
    """Seconds of waiting for the writer."""
    steps_s: list[float] = field(default_factory=list)

    @property
    def step_s(self) -> float:
        """Seconds of an undisturbed step."""
        return float(np.median(self.steps_s[_DISTURBED:]))

    @property
    def extra_s(self) -> float:
        """Extra seconds of the first steps."""
        return sum(self.steps_s[:_DISTURBED]) - _DISTURBED * self.step_s

    @property
    def cost_s(self) -> float:
        """Seconds beyond those of undisturbed steps."""
        # Without a write, the pause only reads batch norm statistics, which is not counted.
        return self.extra_s + (self.pause_s + self.waited_s if self.written else 0.0)


class Checkpoints(Callbacks):
    """Writes every other checkpoint as a worker does, and records the durations.

    Args:
        manager: The checkpoint manager.
        num_blocks: Number of blocks to record, from the first checkpoint on.
    """

    def __init__(self, manager: Any, num_blocks: int) -> None:
        self.manager, self.num_blocks = manager, num_blocks
        self.blocks: list[Block] = []
        self.started = self.ended = time.perf_counter()

    def before_step(self, step: int, num_steps: int) -> None:
        """Wait for the writer as a worker does."""
        paused = time.perf_counter()
        if step + num_steps > self.manager.written + EVERY:
            self.manager.wait()
        self.started = time.perf_counter()
        if self.blocks:
            block = self.blocks[-1]
            block.waited_s += self.started - paused
            if not block.steps_s:
                block.pause_s = paused - self.ended

    def after_step(self, step: int) -> None:
        """Record the duration of the step."""
        self.ended = time.perf_counter()
        if self.blocks:
            self.blocks[-1].steps_s.append(self.ended - self.started)

    def poll_control(self) -> ControlRequest:
        """Stop after the last block."""
        return ControlRequest(stop=len(self.blocks) > self.num_blocks)

    def on_checkpoint(self, step: int, copy: CopyCheckpoint) -> None:
        """Write the checkpoint, or treat it as written."""
        block = Block(written=len(self.blocks) % 2 == 0)
        self.blocks.append(block)
        if len(self.blocks) > self.num_blocks:
            return
        if block.written:
            self.manager.save(copy(self.manager.spare()))
        else:
            # Otherwise `before_step` would wait for it.
            self.manager.written = step


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--blocks", type=int, default=8, help="blocks of 15 steps")
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=32, help="rows per step")
    parser.add_argument("--folder", help="parent of the temporary folder for checkpoints")
    arguments = parser.parse_args()
    size, batch = arguments.size, arguments.batch

    from benchmarks.photos import make_jpegs
    from benchmarks.shards import write_shards
    from ray_jobs.cluster.strategy import WorkerContext, set_devices
    from ray_jobs.config.spec import RunSpec
    from ray_jobs.storage.folder import Folder
    from ray_jobs.train.checkpoints.checkpoint_manager import CheckpointManager

    set_devices(os.cpu_count() or 1, use_gpu=False)

    from benchmarks.memory_loop import MemoryLoop

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        num_rows = {"train": batch * EVERY * (arguments.blocks + 2), "validation": 16, "test": 16}
        manifest = write_shards(Path(folder) / "prepared", num_rows, make_jpegs(size), size)
        spec = RunSpec.model_validate(
            {
                "data": {"prepared": f"{folder}/prepared"},
                "model": {"image": {"kind": "efficientnet_b5", "weights": None}},
                "train": {"global_batch_size": batch, "checkpoint_every_steps": EVERY},
            }
        )
        manager = CheckpointManager(Folder(f"{folder}/run"))
        callbacks = Checkpoints(manager, arguments.blocks)
        MemoryLoop(spec, manifest, WorkerContext(), num_batches=8).run(callbacks)
        manager.close()
        newest = Path(folder) / "run" / "checkpoints" / "steps" / f"{manager.steps()[-1]:08d}"
        num_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    blocks = callbacks.blocks[: arguments.blocks]
    print("\n| block | checkpoint | step, s | pause, s | wait, s | extra in first steps, s |")
    print("|---|---|---|---|---|---|")
    for number, block in enumerate(blocks, 1):
        print(
            f"| {number} | {'yes' if block.written else 'no'} | {block.step_s:.2f} "
            f"| {block.pause_s:.3f} | {block.waited_s:.3f} | {block.extra_s:.2f} |"
        )
    print(f"\nsize of a checkpoint: {num_bytes / 1e6:,.0f} MB\n")
    with_one, without = (
        [block.cost_s for block in blocks if block.written is written] for written in (True, False)
    )
    seconds = float(np.mean(with_one) - np.mean(without))
    block_s = float(np.mean([len(block.steps_s) * block.step_s for block in blocks]))
    result = {"seconds": seconds, "checkpoint_cost": seconds / (seconds + block_s)}
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
