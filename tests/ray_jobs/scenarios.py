"""Trains a model in several scenarios, alone or on the workers of a trainer; see test_loop."""

import pickle
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

from mm_model.spec import NO_AUGMENTATION
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.callbacks import Callbacks, ControlRequest, CopyCheckpoint
from ray_jobs.train.checkpoints.checkpoint import (
    Checkpoint,
    LoopState,
    read_checkpoint,
    write_checkpoint,
)
from tests.ray_jobs.arrays import same_arrays
from tests.ray_jobs.tiny import ROW

if TYPE_CHECKING:
    from ray_jobs.train.loop import Loop

PLAIN = {
    "image": {"kind": "tiny", "weights": None, "units": 16},
    "numeric": {"units": [16, 16]},
    "fusion": {"units": 16, "modality_dropout": 0},
    "augmentation": NO_AUGMENTATION.model_dump(),
    "dropout": 0,
}
RANDOM = {"image": PLAIN["image"], "numeric": PLAIN["numeric"], "fusion": {"units": 16}}
"""With the default dropout, modality dropout and augmentation."""
EVERYTHING_RANDOM = {
    "model": {**RANDOM, "augmentation": {**PLAIN["augmentation"], "flip": "horizontal"}},
    "train": {
        "epochs": 3,
        "global_batch_size": 16,
        "schedule": "plateau",
        "plateau_patience": 1,
        "checkpoint_every_steps": 4,
        "ema_momentum": 0.9,
        "mixup_alpha": 0.2,
    },
}
"""With all random operations, and batch norm of each worker's own rows."""
SCENARIOS: dict[str, dict[str, Any]] = {
    # 20 steps with the same rows and random numbers for any number of workers. Neither the 101
    # training rows nor the 37 validation rows are a multiple of the 20 rows of a step.
    "synchronised": {
        "model": {**RANDOM, "batch_norm": "sync"},
        "train": {"epochs": 4, "global_batch_size": 20, "checkpoint_every_steps": 3},
    },
    # Stopped and resumed.
    "random": EVERYTHING_RANDOM,
    # Resumed by new loops.
    "resumed": EVERYTHING_RANDOM,
    # Resumed by new loops; the lower blocks of both transformers are frozen.
    "transformers": {
        "model": {
            "image": {"kind": "vit_tiny", "weights": None, "units": 8},
            "numeric": {"units": [8]},
            "text": {"kind": "bert_tiny", "units": 8},
            "fusion": {"kind": "cross_attention", "units": 32},
        },
        "train": {
            "epochs": 2,
            "global_batch_size": 20,
            "checkpoint_every_steps": 4,
            "stages": [{"epochs": 2, "backbone": 0.5, "layer_decay": 0.5}],
        },
        "prepared": "texts",
    },
    # Overfits after the first epochs.
    "patience": {
        "model": PLAIN,
        "train": {"epochs": 20, "global_batch_size": 20, "learning_rate": 0.05, "patience": 2},
    },
    # A backbone from keras.applications, with integer variables, frozen in the first epoch.
    "stages": {
        "model": {**PLAIN, "image": {"kind": "efficientnet_b0", "weights": None, "units": 8}},
        "train": {
            "epochs": 2,
            "global_batch_size": 50,
            "stages": [{"epochs": 1, "backbone": 0}, {"epochs": 1, "backbone_rate": 0.1}],
        },
    },
}


class RecordingCallbacks(Callbacks):
    """Keeps every checkpoint and record, and requests a stop after a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.checkpoints: list[Checkpoint] = []
        self._spare: Checkpoint | None = None
        self.epochs: list[dict[str, Any]] = []
        self.step, self.stop_at = 0, stop_at

    def after_step(self, step: int) -> None:
        self.step = step

    def poll_control(self) -> ControlRequest:
        return ControlRequest(stop=self.stop_at is not None and self.step >= self.stop_at)

    def on_checkpoint(self, step: int, copy: CopyCheckpoint) -> None:
        # Reuses memory, as a run does for a checkpoint that is written.
        self._spare = copy(self._spare)
        self.checkpoints.append(deepcopy(self._spare))

    def on_epoch(self, record: dict[str, Any], copy: CopyCheckpoint) -> None:
        self.on_checkpoint(0, copy)
        self.epochs.append(record)


def loop_of(scenario: str, folder: Path, worker: Any, strategy: Any = None) -> "Loop":
    """Return a new loop with the settings of a scenario."""
    from ray_jobs.train.loop import Loop

    sections = SCENARIOS[scenario]
    train = {"learning_rate": 1e-3, "patience": 100, "num_workers": worker.num_workers}
    spec = RunSpec.model_validate(
        {
            "data": {"prepared": str(folder / sections.get("prepared", "prepared"))},
            "model": sections["model"],
            "train": {**train, **sections["train"]},
        }
    )
    return Loop(spec, read_manifest(Folder(spec.data.prepared)), worker, strategy)


def run_scenarios(config: dict[str, Any]) -> None:
    """Run scenarios on one worker, and pickle their results for the test."""
    import ray.train

    from ray_jobs.cluster.strategy import WorkerContext, make_strategy, set_devices

    context = ray.train.get_context()
    worker = WorkerContext(context.get_world_rank(), context.get_world_size())
    folder = Path(config["folder"])
    set_devices(1, use_gpu=False)
    strategy = make_strategy(worker.num_workers)
    for name in config["scenarios"]:
        results = run_scenario(name, loop_of(name, folder, worker, strategy), folder)
        path = folder / f"{name}-{worker.num_workers}-{worker.rank}.pickle"
        path.write_bytes(pickle.dumps(results))


def run_scenario(name: str, loop: "Loop", folder: Path) -> dict[str, Any]:
    """Train without a disturbance; some scenarios are also stopped and resumed."""
    initial = loop.snapshots.take(LoopState(), {}, {})
    num_workers, first = loop.context.num_workers, None
    if name == "random":
        # Within an epoch, at a step without a checkpoint.
        first = train(loop, stop_at=8)
    elif name == "synchronised" and num_workers == 1:
        # At the last step of an epoch.
        first = train(loop, stop_at=10)
    elif name == "synchronised":
        first = train(loop, read_checkpoint(folder / f"middle-{num_workers // 2}"))
    rows, batches = recorded(loop)
    state, undisturbed = train(loop, initial)
    graph = loop.train_step.call.get_concrete_function(*batches[0]).graph.as_graph_def()
    results: dict[str, Any] = {
        "rows": rows[:],
        "records": undisturbed.epochs,
        "models": [saved.model for saved in undisturbed.checkpoints if not saved.local],
        "best": {epoch: best.model for epoch, best in loop.best.items()},
        "label": [best.label_N.tolist() for best in loop.best.values()],
        "weights": np.concatenate(batches[0][1:], axis=1).tolist(),
        # In the graph and in all functions that it calls.
        "collectives": str(graph).count('op: "CollectiveReduceV2"'),
        "traces": loop.train_step.call.experimental_get_tracing_count(),
        "history": [record["epoch"] for record in state.history],
        "best_epoch": state.best_epoch,
        "steps_of_checkpoints": [saved.state.step for saved in undisturbed.checkpoints],
    }
    if first is not None:
        first_state, disturbed = first
        last = disturbed.checkpoints[-1]
        results["first"] = {
            "finished": first_state.is_finished(loop.spec.train),
            "step": first_state.step,
            "model": last.model,
            "undisturbed": any(same_checkpoints(last, saved) for saved in undisturbed.checkpoints),
        }
        if name == "random":
            end_of_epoch = next(c for c in undisturbed.checkpoints if c.state.epoch == 1)
            starts = (last, end_of_epoch)
            results["resumed_equal"] = [resumed_equal(loop, undisturbed, c) for c in starts]
    if name in ("resumed", "transformers"):
        # Within an epoch and at its end.
        results["resumed_equal"] = [
            resumed_equal(new_loop(loop), undisturbed, c) for c in undisturbed.checkpoints[:2]
        ]
    if name == "synchronised" and loop.context.rank == 0:
        middle = undisturbed.checkpoints[2]
        assert middle.local
        middle.best = {}
        (folder / f"middle-{num_workers}").mkdir()
        write_checkpoint(folder / f"middle-{num_workers}", middle)
    return results


def train(
    loop: "Loop", checkpoint: Checkpoint | None = None, stop_at: int | None = None
) -> tuple[LoopState, RecordingCallbacks]:
    """Train like a new loop until a stop request, which is exchanged after every step."""
    from ray_jobs.train import loop as module

    callbacks = RecordingCallbacks(stop_at)
    loop._next_poll = 0
    with patch.object(module, "_POLL_S", 0.0):
        return loop.run(callbacks, checkpoint), callbacks


def recorded(loop: "Loop") -> tuple[list[list[int]], list[tuple[Any, ...]]]:
    """Return lists that fill with the rows of all batches and the tensors of training batches."""
    rows: list[list[int]] = []
    batches: list[tuple[Any, ...]] = []

    def record(batcher: Any, is_training: bool) -> None:
        stream = batcher.stream

        def recording(*arguments: Any) -> Any:
            for batch in stream(*arguments):
                real = batch.weight_B1.numpy()[:, 0] > 0
                numbers = batch.inputs["numeric"].numpy()
                rows.append(numbers[real, ROW].astype(int).tolist())
                if is_training:
                    batches.append((batch.inputs, batch.label_B1, batch.weight_B1))
                yield batch

        batcher.stream = recording

    record(loop.train_batcher, is_training=True)
    record(loop.validation_batcher, is_training=False)
    return rows, batches


def same_checkpoints(first: Checkpoint, second: Checkpoint) -> bool:
    """Whether two checkpoints are bitwise equal, except for times."""

    def untimed(record: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in record.items() if not k.startswith(("time/", "data/"))}

    def state(saved: Checkpoint) -> LoopState:
        history = tuple(map(untimed, saved.state.history))
        return saved.state.model_copy(update={"history": history})

    return (
        state(first) == state(second)
        and same_arrays(first.model, second.model)
        and same_arrays(first.optimizer, second.optimizer)
        and same_arrays(first.local, second.local)
        and first.best.keys() == second.best.keys()
        and all(same_arrays(first.best[e].model, second.best[e].model) for e in first.best)
    )


def new_loop(loop: "Loop") -> "Loop":
    return type(loop)(loop.spec, loop.manifest, loop.context, loop.replicas.strategy)


def resumed_equal(loop: "Loop", undisturbed: RecordingCallbacks, start: Checkpoint) -> bool:
    """Resume from a checkpoint; compare all later checkpoints bit by bit."""
    _, resumed = train(loop, start)
    later = [saved for saved in undisturbed.checkpoints if saved.state.step > start.state.step]
    pairs = zip(later, resumed.checkpoints, strict=True)
    return all(same_checkpoints(a, b) for a, b in pairs)
