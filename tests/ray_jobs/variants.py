"""Trains variants of one model in a process with four CPU devices; see test_train_step.

Run:   python -m tests.ray_jobs.variants FOLDER REPLICAS [fast|slow]
Writes: for each fast or slow variant with that number of replicas, NAME.npz with the model's
variables after the last step; and results-REPLICAS.json.
"""

import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mm_model.losses import make_loss
from mm_model.optimizer import make_optimizer
from mm_model.spec import NO_AUGMENTATION
from ray_jobs.cluster.strategy import WorkerContext, set_devices
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.loader import FeedOptions, TrainingFeed
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.callbacks import Callbacks
from ray_jobs.train.loop import Loop
from ray_jobs.train.model_factory import new_model
from tests.ray_jobs.arrays import arrays_of
from tests.ray_jobs.tiny import write_prepared

MODEL: dict[str, Any] = {
    "image": {"kind": "tiny", "weights": None, "units": 8},
    "numeric": {"units": [8]},
    "fusion": {"kind": "skip_concat", "units": 8},
    "batch_norm": "sync",
}
DETERMINISTIC = {
    "dropout": 0,
    "fusion": {"kind": "skip_concat", "units": 8, "modality_dropout": 0},
    "augmentation": NO_AUGMENTATION.model_dump(),
}
"""Without random operations."""
RANDOM = {"augmentation": {"rand_augment": 0.3}}
TRAIN: dict[str, Any] = {"global_batch_size": 20, "epochs": 3, "learning_rate": 1e-3}
ALL = {"optimizer": "adamw", "ema_momentum": 0.9, "loss": "focal", "label_smoothing": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "fifty": {**ALL, "epochs": 10, "model": RANDOM, "keep_best": 10},
    "plain": {},
    "one": {**ALL, "model": RANDOM},
    "two": {**ALL, "model": RANDOM, "replicas": 2, "steps_per_call": 4},
    "four": {**ALL, "model": RANDOM, "replicas": 4, "slow": True},
    "bfloat16": {"precision": "mixed_bfloat16", "slow": True},
    "float16": {"precision": "mixed_float16"},
    "float16_two": {"precision": "mixed_float16", "replicas": 2},
    "float16_high": {**ALL, "precision": "mixed_float16", "epochs": 6, "scale": 2.0**40},
    "float16_high_two": {
        "precision": "mixed_float16",
        "epochs": 6,
        "scale": 2.0**40,
        "replicas": 2,
    },
    "xla": {"jit_compile": True, "slow": True},
    "copies": {"copies": 4},
    "accumulated": {"copies": 4, "accumulate_steps": 4, "slow": True},
    "accumulated_two": {"copies": 4, "accumulate_steps": 2, "replicas": 2},
    "accumulated_random": {
        **ALL,
        "model": {**RANDOM, "batch_norm": "local"},
        "accumulate_steps": 2,
        "slow": True,
    },
    "exchanged_bfloat16": {"replicas": 2, "all_reduce_dtype": "bfloat16", "slow": True},
    "exchanged_in_parts": {"replicas": 2, "all_reduce_bytes": 1000},
    "clipped": {"clip_norm": 0.1},
    "clipped_two": {"clip_norm": 0.1, "replicas": 2},
}
FITTED = "fifty"
"""Also trained by Keras' `Model.fit`."""


class RepeatingFeed(TrainingFeed):
    """Fills each step with copies of the first part of its rows."""

    def __init__(self, count: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.count = count

    def batches(self, start: int, stop: int) -> Any:
        for batch in super().batches(start, stop):
            first = {k: v[: len(v) // self.count] for k, v in batch.items()}
            yield {k: np.concatenate([v] * self.count) for k, v in first.items()}


class VariantLoop(Loop):
    copies = 1

    def _feeds(self) -> Any:
        train, validation = super()._feeds()
        if self.copies > 1:
            arguments = (self.folder, self.manifest, self.sampler, 0, 1, FeedOptions())
            return RepeatingFeed(self.copies, *arguments), validation
        return train, validation


class EpochCallbacks(Callbacks):
    """Keeps the checkpoint of every epoch."""

    def __init__(self) -> None:
        self.epochs: list[Any] = []

    def on_epoch(self, record: dict[str, Any], copy: Any) -> None:
        self.epochs.append(copy())


def spec_of(prepared: Path, variant: dict[str, Any]) -> RunSpec:
    own = ("model", "replicas", "copies", "scale", "slow")
    train = {k: v for k, v in variant.items() if k not in own}
    return RunSpec.model_validate(
        {
            "data": {"prepared": str(prepared)},
            "model": {**MODEL, **variant.get("model", DETERMINISTIC)},
            "train": {**TRAIN, **train},
        }
    )


def train(folder: Path, prepared: Path, name: str, strategy: Any) -> dict[str, Any]:
    variant = VARIANTS[name]
    replicas = strategy.num_replicas_in_sync
    manifest = read_manifest(Folder(prepared))
    loop = VariantLoop(spec_of(prepared, variant), manifest, WorkerContext(), strategy)
    loop.copies = variant.get("copies", 1)
    if "scale" in variant:
        loop.train_step.scale.assign(variant["scale"])
    start = arrays_of(loop.trainable)
    callbacks = EpochCallbacks()
    state = loop.run(callbacks)
    saved = callbacks.epochs[-1]
    # Keras' fit ends with the averaged weights, which the loop uses for validation.
    last = saved.best[saved.state.epoch - 1] if name == FITTED else saved
    save(folder / f"{name}.npz", last.model)
    results = {
        "losses": [record["train/loss"] for record in saved.state.history],
        "traces": loop.train_step.call.experimental_get_tracing_count(),
        "steps": state.step,
    }
    results["iterations"] = int(loop.optimizer.iterations.numpy())
    if loop.train_step.scale is not None:
        results["scale"] = float(loop.train_step.scale.numpy())
        paths = {variable.path for variable in loop.trainable}
        results["unchanged_after_epochs"] = [
            all(
                a.tobytes() == b.tobytes()
                for a, b in zip(
                    start.values(),
                    (w for k, w in epoch.model.items() if k.split(" ", 1)[1] in paths),
                    strict=True,
                )
            )
            for epoch in callbacks.epochs
        ]
        floats = [w for w in saved.optimizer.values() if w.dtype.kind == "f"]
        results["finite"] = all(np.isfinite(w).all() for w in floats)
    if replicas > 1:
        results["replicas_equal"] = replicas_equal(loop)
    return results


def replicas_equal(loop: Loop) -> bool:
    """Whether all variables are bitwise equal on all replicas."""
    for variable in [*loop.model.variables, *loop.train_step.variables]:
        first, *rest = (copy.numpy() for copy in loop.replicas.results(variable.value))
        if any(first.tobytes() != copy.tobytes() for copy in rest):
            return False
    return True


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    named: dict[str, Any] = {k.replace("/", "|"): v for k, v in arrays.items()}
    np.savez(path, **named)


def fit(folder: Path, prepared: Path, name: str) -> None:
    """Train by Keras' `Model.fit` with the same rows per step."""
    spec, manifest = spec_of(prepared, VARIANTS[name]), read_manifest(Folder(prepared))
    keras.utils.set_random_seed(spec.run.seed)
    model = new_model(spec, manifest)
    loop = Loop(spec, manifest, WorkerContext())
    num_steps = loop.sampler.steps_before(spec.train.epochs)
    optimizer = make_optimizer(spec.train, num_steps)
    model.compile(optimizer, make_loss(spec.train), jit_compile=False)
    feed, _ = loop._feeds()

    def batches() -> Any:
        for batch in feed.batches(0, num_steps):
            tensors = loop.validation_batcher([batch])
            yield tensors.inputs, tensors.label_B1, tensors.weight_B1

    model.fit(batches(), steps_per_epoch=num_steps, shuffle=False, verbose=0)
    save(folder / f"{name}_by_fit.npz", arrays_of(model.variables))


def main() -> None:
    folder, replicas = Path(sys.argv[1]), int(sys.argv[2])
    set_devices(1, use_gpu=False)
    # Each replica waits in a thread for the other replicas.
    tf.config.threading.set_inter_op_parallelism_threads(8)
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
    prepared = folder / f"prepared-{replicas}"
    write_prepared(prepared, {"train": 100, "validation": 20, "test": 5})
    strategy: Any = tf.distribute.get_strategy()
    if replicas > 1:
        # One for all variants: the collectives of two strategies in a process mix up.
        kind: Any = tf.distribute.MultiWorkerMirroredStrategy
        strategy = kind._from_local_devices([f"CPU:{i}" for i in range(replicas)])
    slow = sys.argv[3:] == ["slow"]
    names = [
        name
        for name, variant in VARIANTS.items()
        if variant.get("replicas", 1) == replicas and variant.get("slow", False) == slow
    ]
    results = {name: train(folder, prepared, name, strategy) for name in names}
    if FITTED in names:
        fit(folder, prepared, FITTED)
    Folder(folder).write_json(f"results-{replicas}.json", results)


if __name__ == "__main__":
    main()
