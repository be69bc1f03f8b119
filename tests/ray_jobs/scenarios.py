"""Trains a model in several scenarios on the workers of a trainer; see test_loop.

Each scenario writes SCENARIO-EPOCH-WORKERS-RANK.npz with the model's variables after each epoch,
and SCENARIO-WORKERS-RANK.json with other results.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from mm_model.spec import NO_AUGMENTATION
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.callbacks import Callbacks, ControlRequest, CopyCheckpoint
from ray_jobs.train.checkpoints.checkpoint import Checkpoint, LoopState
from tests.ray_jobs.arrays import distance, same_arrays
from tests.ray_jobs.tiny import ROW

PLAIN = {
    "image": {"kind": "tiny", "weights": None, "units": 16},
    "numeric": {"units": [16, 16]},
    "fusion": {"units": 16, "modality_dropout": 0},
    "augmentation": NO_AUGMENTATION.model_dump(),
    "dropout": 0,
}
RANDOM = {"image": PLAIN["image"], "numeric": PLAIN["numeric"], "fusion": {"units": 16}}
"""With the default dropout, modality dropout and augmentation."""
STAGES = {
    "epochs": 2,
    "global_batch_size": 50,
    "stages": [{"epochs": 1, "backbone": 0}, {"epochs": 1, "backbone_rate": 0.1}],
}
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
    # 20 steps with the same rows and random numbers for any number of workers.
    "synchronised": {
        "model": {**RANDOM, "batch_norm": "sync"},
        "train": {"epochs": 4, "global_batch_size": 20, "checkpoint_every_steps": 3},
    },
    # Stopped and resumed.
    "random": EVERYTHING_RANDOM,
    # Resumed from checkpoints within an epoch and at its end.
    "resumed": EVERYTHING_RANDOM,
    # Overfits after the first epochs.
    "patience": {
        "model": PLAIN,
        "train": {"epochs": 20, "global_batch_size": 20, "learning_rate": 0.05, "patience": 2},
    },
    # A backbone that is frozen in the first epoch.
    "stages": {"model": PLAIN, "train": STAGES},
    # A backbone from keras.applications, with integer variables; slow to trace.
    "application": {
        "model": {**PLAIN, "image": {"kind": "efficientnet_b0", "weights": None, "units": 8}},
        "train": STAGES,
    },
    # No number divides another: 101 training rows, 37 validation rows, steps of 14 rows.
    "uneven": {"model": PLAIN, "train": {"epochs": 8, "global_batch_size": 14}},
}
FAST = ("synchronised", "random", "uneven")


def spec_of(scenario: str, prepared: str, num_workers: int) -> RunSpec:
    sections = SCENARIOS[scenario]
    train = {
        "learning_rate": 1e-3,
        "patience": 100,
        **sections["train"],
        "num_workers": num_workers,
    }
    return RunSpec.model_validate(
        {"data": {"prepared": prepared}, "model": sections["model"], "train": train}
    )


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


def run_scenarios(config: dict[str, Any]) -> None:
    """Run scenarios on one worker, and write their results for the test."""
    import ray.train

    from ray_jobs.cluster.strategy import WorkerContext, make_strategy, set_devices
    from ray_jobs.train import loop as module
    from ray_jobs.train.loop import Loop
    from ray_jobs.train.train_step import TrainStep

    context = ray.train.get_context()
    worker = WorkerContext(context.get_world_rank(), context.get_world_size())
    output = Path(config["output"])
    set_devices(1, use_gpu=False)
    strategy = make_strategy(worker.num_workers)

    class CountingTrainStep(TrainStep):
        traces = 0

        def _one(self, *arguments: Any) -> Any:
            self.traces += 1
            return super()._one(*arguments)

    module.TrainStep = CountingTrainStep

    rows: list[list[int]] = []
    calls: list[Any] = []

    def record(batcher: Any, is_training: bool) -> None:
        """Let a batcher record the rows and, in training, the tensors of its batches."""
        stream = batcher.stream

        def recorded(*arguments: Any) -> Any:
            for batch in stream(*arguments):
                real = batch.weight_B1.numpy()[:, 0] > 0
                numbers = batch.inputs["numeric"].numpy()
                rows.append(numbers[real, ROW].astype(int).tolist())
                if is_training:
                    calls.append((batch.inputs, batch.label_B1, batch.weight_B1))
                yield batch

        batcher.stream = recorded

    for name in config["scenarios"]:
        spec = spec_of(name, config["prepared"], worker.num_workers)
        manifest = read_manifest(Folder(spec.data.prepared))
        loop, callbacks = Loop(spec, manifest, worker, strategy), RecordingCallbacks()
        rows.clear()
        calls.clear()
        record(loop.train_batcher, is_training=True)
        record(loop.validation_batcher, is_training=False)
        state = loop.run(callbacks)
        after_epochs = [c for c in callbacks.checkpoints if not c.local]
        for epoch, saved in enumerate(after_epochs):
            np.savez(
                output / f"{name}-{epoch}-{worker.num_workers}-{worker.rank}.npz",
                **{k.replace("/", "|"): v for k, v in saved.model.items()},
            )
        graph = loop.train_step.call.get_concrete_function(*calls[-1]).graph.as_graph_def()
        results = {
            "rows": rows,
            "epochs": callbacks.epochs,
            # In the graph and in all functions that it calls.
            "collectives": str(graph).count('op: "CollectiveReduceV2"'),
            "traces": loop.train_step.traces,
            "variables": len(loop.model.trainable_variables),
            "history": [epoch["epoch"] for epoch in state.history],
            "best_epoch": state.best_epoch,
            "steps_of_checkpoints": [c.state.step for c in callbacks.checkpoints],
        }
        best = loop.best.get(int(state.best_epoch or 0))
        if best is not None:
            model = after_epochs[state.best_epoch or 0].model
            results["best_is_kept"] = same_arrays(model, best.model)
            results["label"] = best.label_N.tolist()
        if name == "resumed":
            starts = (0, 1)
            results["resumed_equal"] = [
                resumed_equal(loop, callbacks.checkpoints, i) for i in starts
            ]
        if name == "random":
            if worker.num_workers > 1:
                results["stopped_equal"] = stopped_equal(loop, callbacks.checkpoints)
            else:
                results["stopped_between"] = stopped_between_epochs(loop, callbacks.checkpoints)
        if name == "synchronised":
            results["distance_of_resumed"] = distance_of_resumed(
                loop, output, callbacks.checkpoints
            )
        if name == "uneven":
            _, y_B1, weight_B1 = calls[0]
            results["weights"] = np.concatenate([y_B1, weight_B1], axis=1).tolist()
        path = output / f"{name}-{worker.num_workers}-{worker.rank}.json"
        path.write_text(json.dumps(results))


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


def resumed_equal(loop: Any, undisturbed: list[Checkpoint], start: int) -> bool:
    """Resume from a checkpoint in a new loop; compare all later checkpoints bit by bit."""
    from ray_jobs.train.loop import Loop

    callbacks = RecordingCallbacks()
    again = Loop(loop.spec, loop.manifest, loop.context, loop.replicas.strategy)
    again.run(callbacks, undisturbed[start])
    pairs = zip(undisturbed[start + 1 :], callbacks.checkpoints, strict=True)
    return all(same_checkpoints(a, b) for a, b in pairs)


def stopped(loop: Any, stop_at: int) -> tuple[Any, RecordingCallbacks]:
    """Train in a new loop until a stop request; return the state and the callbacks."""
    from ray_jobs.train import loop as module
    from ray_jobs.train.loop import Loop

    callbacks = RecordingCallbacks(stop_at)
    loop = Loop(loop.spec, loop.manifest, loop.context, loop.replicas.strategy)
    with patch.object(module, "_POLL_S", 0.0):
        return loop.run(callbacks), callbacks


def stopped_between_epochs(loop: Any, undisturbed: list[Checkpoint]) -> list[Any]:
    """Stop at the last step of an epoch, which ends like any other epoch."""
    state, callbacks = stopped(loop, 6)
    last = callbacks.checkpoints[-1]
    expected = next(saved for saved in undisturbed if saved.state.epoch == 1)
    equal = same_checkpoints(last, expected)
    return [not state.is_finished(loop.spec.train), state.step, state.epoch, equal]


def stopped_equal(loop: Any, undisturbed: list[Checkpoint]) -> list[Any]:
    """Stop at a step without a checkpoint, resume there, and compare the end."""
    from ray_jobs.train.loop import Loop

    state, callbacks = stopped(loop, 8)
    last = callbacks.checkpoints[-1]
    rest = RecordingCallbacks()
    Loop(loop.spec, loop.manifest, loop.context, loop.replicas.strategy).run(rest, last)
    equal = same_checkpoints(undisturbed[-1], rest.checkpoints[-1])
    return [not state.is_finished(loop.spec.train), state.step, last.state.step, equal]


def distance_of_resumed(loop: Any, output: Path, undisturbed: list[Checkpoint]) -> float:
    """Resume from the checkpoint of half as many workers; return the distance to their end."""
    from ray_jobs.train.checkpoints.checkpoint import read_checkpoint, write_checkpoint
    from ray_jobs.train.loop import Loop

    num_workers = loop.context.num_workers
    if loop.context.rank == 0:
        for name, saved in (("middle", undisturbed[2]), ("end", undisturbed[-1])):
            folder = output / f"{name}-{num_workers}"
            folder.mkdir()
            saved.best = {}
            write_checkpoint(folder, saved)
    if num_workers == 1:
        return 0.0
    middle = read_checkpoint(output / f"middle-{num_workers // 2}")
    assert middle.local
    callbacks = RecordingCallbacks()
    Loop(loop.spec, loop.manifest, loop.context, loop.replicas.strategy).run(callbacks, middle)
    end = read_checkpoint(output / f"end-{num_workers // 2}")
    return distance(callbacks.checkpoints[-1].model, end.model)
