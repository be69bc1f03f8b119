"""Trains variants of one model on one or two devices of a process; see test_train_step.

Run:   python -m tests.ray_jobs.variants FOLDER fast|slow
Writes: two.pickle with the results of the fast or slow variants with two replicas.
"""

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mm_model.spec import NO_AUGMENTATION
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.decoder import Batch
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.callbacks import Callbacks
from tests.ray_jobs.arrays import arrays_of

LINEAR = {"image": {"kind": "none"}, "numeric": {"units": []}}
"""Without batch norms, so that the parts of a step add up to the whole."""
NUMERIC = {"image": {"kind": "none"}, "numeric": {"units": [8]}}
SYNC: dict[str, Any] = {
    "image": {"kind": "tiny", "weights": None, "units": 8},
    "numeric": {"units": [8]},
    "fusion": {"kind": "skip_concat", "units": 8},
    "batch_norm": "sync",
}
RANDOM = {**SYNC, "augmentation": {"rand_augment": 0.3}}
DETERMINISTIC = {
    **SYNC,
    "dropout": 0,
    "fusion": {**SYNC["fusion"], "modality_dropout": 0},
    "augmentation": NO_AUGMENTATION.model_dump(),
}
TRANSFORMERS: dict[str, Any] = {
    "image": {"kind": "vit_tiny", "weights": None, "units": 8},
    "numeric": {"units": [8]},
    "text": {"kind": "bert_tiny", "units": 8},
    "fusion": {"kind": "cross_attention", "units": 32},
    "batch_norm": "sync",
}
# SGD, since Adam ignores the scale of the gradients.
EXACT = {"model": LINEAR, "optimizer": "sgd", "learning_rate": 0.1}
OVERFLOWING = {
    "model": NUMERIC,
    "precision": "mixed_float16",
    "scale": 2.0**40,
    "epochs": 6,
}
TRAIN: dict[str, Any] = {"global_batch_size": 20, "epochs": 3, "learning_rate": 1e-3}
ALL = {"optimizer": "adamw", "ema_momentum": 0.9, "loss": "focal", "label_smoothing": 0.1}
FITTED = "fifty"
"""Also trained by Keras' `Model.fit`, with the same rows per step."""
FAST: dict[str, dict[str, Any]] = {
    FITTED: {**ALL, "model": RANDOM, "epochs": 10, "keep_best": 10},
    "whole": EXACT,
    "weighted": {**EXACT, "rows": "weighted"},
    "weighted_parts": {**EXACT, "rows": "weighted", "replicas": 2, "accumulate_steps": 2},
    "clipped": {**EXACT, "clip_norm": 0.1},
    "parts": {
        **EXACT,
        "model": {**LINEAR, "batch_norm": "sync"},
        "replicas": 2,
        "accumulate_steps": 2,
        "all_reduce_bytes": 100,
    },
    "clipped_parts": {
        **EXACT,
        "clip_norm": 0.1,
        "replicas": 2,
        "accumulate_steps": 2,
        "steps_per_call": 4,
    },
    "overflowing": {**OVERFLOWING, **ALL},
    "overflowing_two": {**OVERFLOWING, **ALL, "replicas": 2},
}
SLOW: dict[str, dict[str, Any]] = {
    "plain": {"model": DETERMINISTIC},
    "bfloat16": {"model": DETERMINISTIC, "precision": "mixed_bfloat16"},
    "float16": {"model": DETERMINISTIC, "precision": "mixed_float16"},
    "xla": {"model": DETERMINISTIC, "jit_compile": True},
    "float16_two": {"model": DETERMINISTIC, "precision": "mixed_float16", "replicas": 2},
    "exchanged_bfloat16": {
        "model": DETERMINISTIC,
        "replicas": 2,
        "all_reduce_dtype": "bfloat16",
    },
    "exchanged_in_parts": {"model": DETERMINISTIC, "replicas": 2, "all_reduce_bytes": 1000},
    "copies": {"model": DETERMINISTIC, "copies": 4},
    "accumulated_copies": {"model": DETERMINISTIC, "copies": 4, "accumulate_steps": 4},
    "accumulated_copies_two": {
        "model": DETERMINISTIC,
        "copies": 4,
        "accumulate_steps": 2,
        "replicas": 2,
    },
    "transformers": {"model": TRANSFORMERS, "rows": "texts"},
    "transformers_two": {"model": TRANSFORMERS, "rows": "texts", "replicas": 2},
    "transformers_bfloat16": {
        "model": TRANSFORMERS,
        "rows": "texts",
        "precision": "mixed_bfloat16",
    },
    "one": {**ALL, "model": RANDOM},
    "two": {**ALL, "model": RANDOM, "replicas": 2, "steps_per_call": 4},
    "accumulated": {**ALL, "model": {**RANDOM, "batch_norm": "local"}, "accumulate_steps": 2},
}


class RepeatingFeed:
    """Fills each step with copies of the first part of its rows."""

    def __init__(self, feed: Any, count: int) -> None:
        self.feed, self.count = feed, count

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        for batch in self.feed.batches(start, stop):
            first = {k: v[: len(v) // self.count] for k, v in batch.items()}
            yield {k: np.concatenate([v] * self.count) for k, v in first.items()}


class EpochWeights(Callbacks):
    """Keeps the weights before the first and after each epoch."""

    def __init__(self, loop: Any) -> None:
        self.loop, self.weights = loop, [arrays_of(loop.trainable)]

    def on_epoch(self, record: dict[str, Any], copy: Any) -> None:
        self.weights.append(arrays_of(self.loop.trainable))


def train_variants(folder: Path, speed: str, strategy: Any) -> dict[str, dict[str, Any]]:
    """Train the variants with as many replicas as the strategy has."""
    replicas = strategy.num_replicas_in_sync
    return {
        name: train(folder, variant, strategy)
        for name, variant in (SLOW if speed == "slow" else FAST).items()
        if variant.get("replicas", 1) == replicas
    }


def train(folder: Path, variant: dict[str, Any], strategy: Any) -> dict[str, Any]:
    from ray_jobs.cluster.strategy import WorkerContext
    from ray_jobs.train.loop import Loop

    own = ("model", "replicas", "scale", "copies", "rows")
    settings = {k: v for k, v in variant.items() if k not in own}
    prepared = folder / variant.get("rows", "prepared")
    spec = RunSpec.model_validate(
        {
            "data": {"prepared": str(prepared)},
            "model": variant["model"],
            "train": {**TRAIN, **settings},
        }
    )
    loop: Any = Loop(spec, read_manifest(Folder(prepared)), WorkerContext(), strategy)
    if "copies" in variant:
        feed, validation = loop._feeds()
        loop._feeds = lambda: (RepeatingFeed(feed, variant["copies"]), validation)
    scale: Any = loop.train_step.scale
    if "scale" in variant:
        scale.assign(variant["scale"])
        for variable in loop.trainable:
            # Heads are initialized with zeros, behind which no gradient overflows.
            variable.assign(variable + 0.1)
    callbacks = EpochWeights(loop)
    state = loop.run(callbacks)
    averaged = loop.best.get(state.epoch - 1)
    floats = [w for v in loop.train_step.variables if (w := v.numpy()).dtype.kind == "f"]
    return {
        "weights": callbacks.weights,
        # Keras' fit ends with the averaged weights, which the loop uses for validation.
        "averaged": None if averaged is None else averaged.model,
        "fitted": fitted(loop) if variant in (FAST[FITTED], FAST["weighted"]) else None,
        "losses": [record["train/loss"] for record in state.history],
        "traces": loop.train_step.call.experimental_get_tracing_count(),
        "steps": state.step,
        "iterations": int(loop.optimizer.iterations.numpy()),
        "scale": None if scale is None else float(scale.numpy()),
        "finite": all(np.isfinite(w).all() for w in floats),
        "replicas_equal": replicas_equal(loop) if "replicas" in variant else None,
    }


def fitted(loop: Any) -> dict[str, np.ndarray]:
    """Train another model by Keras' `Model.fit`; return its variables."""
    import keras

    from mm_model.losses import make_loss
    from mm_model.optimizer import make_optimizer
    from ray_jobs.train.device_batch import DeviceBatcher
    from ray_jobs.train.model_factory import new_model

    train, num_steps = loop.spec.train, loop.sampler.steps_before(loop.spec.train.epochs)
    keras.utils.set_random_seed(loop.spec.run.seed)
    model = new_model(loop.spec, loop.manifest)
    optimizer = make_optimizer(train, num_steps)
    # Otherwise the first step creates its variables, and Keras traces the step twice.
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, make_loss(train), jit_compile=False)
    feed, _ = loop._feeds()
    batcher = DeviceBatcher(loop.replicas, model.input_names, loop.train_batcher.class_weight)

    def batches() -> Any:
        for batch in feed.batches(0, num_steps):
            tensors = batcher([batch])
            yield tensors.inputs, tensors.label_B1, tensors.weight_B1

    model.fit(batches(), steps_per_epoch=num_steps, shuffle=False, verbose=0)
    return arrays_of(model.variables)


def replicas_equal(loop: Any) -> bool:
    """Whether all variables are bitwise equal on all replicas."""
    for variable in [*loop.model.variables, *loop.train_step.variables]:
        first, *rest = (copy.numpy() for copy in loop.replicas.results(variable.value))
        if any(first.tobytes() != copy.tobytes() for copy in rest):
            return False
    return True


def main() -> None:
    import tensorflow as tf

    from ray_jobs.cluster.strategy import set_devices

    folder, speed = Path(sys.argv[1]), sys.argv[2]
    set_devices(1, use_gpu=False)
    # Each replica waits in a thread for the other one.
    tf.config.threading.set_inter_op_parallelism_threads(8)
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    # One for all variants: the collectives of two strategies in a process mix up.
    kind: Any = tf.distribute.MultiWorkerMirroredStrategy
    strategy = kind._from_local_devices(["CPU:0", "CPU:1"])
    results = train_variants(folder, speed, strategy)
    (folder / "two.pickle").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main()
