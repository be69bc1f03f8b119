"""Trains a model in several scenarios on the workers of a trainer; see test_loop.

Each leaves what it saw in files: SCENARIO-EPOCH-WORKERS-RANK.npz with the model's variables after
each epoch, and SCENARIO-WORKERS-RANK.json with facts.
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
"""Dropout, modality dropout and augmentation as they come."""
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
"""With batch norm of each worker's own rows."""
SCENARIOS: dict[str, dict[str, Any]] = {
    # 20 steps on the same rows with the same draws, whatever the number of workers.
    "synchronised": {
        "model": {**RANDOM, "batch_norm": "sync"},
        "train": {"epochs": 4, "global_batch_size": 20, "checkpoint_every_steps": 3},
    },
    # Stopped, and gone on with.
    "random": EVERYTHING_RANDOM,
    # Resumed from checkpoints in the middle of an epoch, and at its end.
    "resumed": EVERYTHING_RANDOM,
    # What the first epoch is good for, and the next ones spoil: the labels' noise by heart.
    "patience": {
        "model": PLAIN,
        "train": {"epochs": 20, "global_batch_size": 20, "learning_rate": 0.05, "patience": 2},
    },
    # A backbone that is frozen at first.
    "stages": {"model": PLAIN, "train": STAGES},
    # One of keras.applications, whose variables are not all floats; its graphs take long.
    "application": {
        "model": {**PLAIN, "image": {"kind": "efficientnet_b0", "weights": None, "units": 8}},
        "train": STAGES,
    },
    # Nothing divides anything: 101 rows, 37 to validate, steps of 14.
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


class Kept(Callbacks):
    """Keeps every checkpoint and record; wishes to stop when it is time."""

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
        # Into the memory of the one before, as in a run, where that is written by then.
        self._spare = copy(self._spare)
        self.checkpoints.append(deepcopy(self._spare))

    def on_epoch(self, record: dict[str, Any], copy: CopyCheckpoint) -> None:
        self.on_checkpoint(0, copy)
        self.epochs.append(record)


def run_scenarios(config: dict[str, Any]) -> None:
    """Run some scenarios on one worker; leave what it saw in files for the test."""
    import ray.train

    from ray_jobs.cluster.strategy import WorkerContext, make_strategy, set_devices
    from ray_jobs.train import loop as module
    from ray_jobs.train.loop import Loop
    from ray_jobs.train.train_step import TrainStep

    context = ray.train.get_context()
    place = WorkerContext(context.get_world_rank(), context.get_world_size())
    output = Path(config["output"])
    set_devices(1, use_gpu=False)
    strategy = make_strategy(place.num_workers)

    class Counted(TrainStep):
        traces = 0

        def _one(self, *arguments: Any) -> Any:
            self.traces += 1
            return super()._one(*arguments)

    module.TrainStep = Counted

    class Watched(Loop):
        rows: list[list[int]]
        calls: list[Any]

        def _watched(self, tensors: Any) -> Any:
            real = tensors.weight_B1.numpy()[:, 0] > 0
            numbers = tensors.inputs["numeric"].numpy()
            self.rows.append(numbers[real, ROW].astype(int).tolist())
            return tensors

        def _steps(self, *arguments: Any) -> Any:
            for tensors in super()._steps(*arguments):
                self.calls.append((tensors.inputs, tensors.label_B1, tensors.weight_B1))
                yield self._watched(tensors)

        def _on_device(self, batches: Any) -> Any:
            yield from map(self._watched, super()._on_device(batches))

    for name in config["scenarios"]:
        spec = spec_of(name, config["prepared"], place.num_workers)
        manifest = read_manifest(Folder(spec.data.prepared))
        loop = Watched(spec, manifest, place, strategy)
        loop.rows, loop.calls, callbacks = [], [], Kept()
        outcome = loop.run(callbacks)
        after_epochs = [c for c in callbacks.checkpoints if not c.local]
        for epoch, saved in enumerate(after_epochs):
            np.savez(
                output / f"{name}-{epoch}-{place.num_workers}-{place.rank}.npz",
                **{k.replace("/", "|"): v for k, v in saved.model.items()},
            )
        graph = loop.stepper.call.get_concrete_function(*loop.calls[-1]).graph.as_graph_def()
        facts = {
            "rows": loop.rows,
            "epochs": callbacks.epochs,
            # In the graph and in every function that it calls.
            "collectives": str(graph).count('op: "CollectiveReduceV2"'),
            "traces": loop.stepper.traces,
            "variables": len(loop.model.trainable_variables),
            "history": [epoch["epoch"] for epoch in outcome.state.history],
            "best_epoch": outcome.state.best_epoch,
            "steps_of_checkpoints": [c.state.step for c in callbacks.checkpoints],
        }
        best = outcome.best
        if best is not None:
            own = after_epochs[outcome.state.best_epoch or 0].model
            facts["best_restored"] = same_arrays(own, best.model)
            facts["label"] = best.label_N.tolist()
        if name == "resumed":
            starts = (0, 1)
            facts["resumed_alike"] = [resumed_alike(loop, callbacks.checkpoints, i) for i in starts]
        if name == "random":
            if place.num_workers > 1:
                facts["stopped_alike"] = stopped_alike(loop, callbacks.checkpoints)
            else:
                facts["stopped_between"] = stopped_between_epochs(loop, callbacks.checkpoints)
        if name == "synchronised":
            facts["distance_of_resumed"] = distance_of_resumed(loop, output, callbacks.checkpoints)
        if name == "uneven":
            _, y_B1, weight_B1 = loop.calls[0]
            facts["weights"] = np.concatenate([y_B1, weight_B1], axis=1).tolist()
        path = output / f"{name}-{place.num_workers}-{place.rank}.json"
        path.write_text(json.dumps(facts))


def same_checkpoints(first: Checkpoint, second: Checkpoint) -> bool:
    """Whether two checkpoints are bitwise the same, but for times."""

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


def resumed_alike(loop: Any, undisturbed: list[Checkpoint], start: int) -> bool:
    """Go on from a checkpoint in a loop of its own; compare all later ones bit by bit."""
    from ray_jobs.train.loop import Loop

    callbacks = Kept()
    again = Loop(loop.spec, loop.manifest, loop.context, loop.replicas.strategy)
    again.run(callbacks, undisturbed[start])
    pairs = zip(undisturbed[start + 1 :], callbacks.checkpoints, strict=True)
    return all(same_checkpoints(a, b) for a, b in pairs)


def stopped(loop: Any, stop_at: int) -> tuple[Any, Kept]:
    """Train in a loop of its own until asked to stop; return how it ended, and the callbacks."""
    from ray_jobs.train import loop as module
    from ray_jobs.train.loop import Loop

    callbacks = Kept(stop_at)
    loop = Loop(loop.spec, loop.manifest, loop.context, loop.replicas.strategy)
    with patch.object(module, "_LOOK_UP_S", 0.0):
        return loop.run(callbacks), callbacks


def stopped_between_epochs(loop: Any, undisturbed: list[Checkpoint]) -> list[Any]:
    """Stop at the last step of an epoch, which ends as any other one."""
    outcome, callbacks = stopped(loop, 6)
    last = callbacks.checkpoints[-1]
    expected = next(saved for saved in undisturbed if saved.state.epoch == 1)
    alike = same_checkpoints(last, expected)
    return [not outcome.finished, outcome.state.step, outcome.state.epoch, alike]


def stopped_alike(loop: Any, undisturbed: list[Checkpoint]) -> list[Any]:
    """Stop where no checkpoint is due, go on from there; compare the end."""
    from ray_jobs.train.loop import Loop

    outcome, callbacks = stopped(loop, 8)
    last = callbacks.checkpoints[-1]
    rest = Kept()
    Loop(loop.spec, loop.manifest, loop.context, loop.replicas.strategy).run(rest, last)
    alike = same_checkpoints(undisturbed[-1], rest.checkpoints[-1])
    return [not outcome.finished, outcome.state.step, last.state.step, alike]


def distance_of_resumed(loop: Any, output: Path, undisturbed: list[Checkpoint]) -> float:
    """Go on from another number of workers' checkpoint; return the distance to their end."""
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
    callbacks = Kept()
    Loop(loop.spec, loop.manifest, loop.context, loop.replicas.strategy).run(callbacks, middle)
    end = read_checkpoint(output / f"end-{num_workers // 2}")
    return distance(callbacks.checkpoints[-1].model, end.model)
