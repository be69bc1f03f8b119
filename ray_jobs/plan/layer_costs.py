"""What each layer of a run's model computes, moves and keeps.

The model is built as the run would build it, but for its weights, and its layers are asked for
their shapes and types; nothing is traced or computed. The size of a kernel times the positions that
it is applied to is the number of multiplications of any convolution, depthwise or not, and of any
dense layer, at two float operations each. TensorFlow's profiler counts the same and a few per cent
for what is element by element (tests compare them), but not by layer, and a backbone may be frozen
up to any of its layers.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import SPLITS, RunSpec
from ray_jobs.data.manifest import ImageInfo, Manifest, SplitInfo

if TYPE_CHECKING:
    from mm_model.model import FusionModel

_PROBE = 7
"""Numbers of a variable that an optimizer is asked what it keeps for."""


@dataclass(frozen=True)
class LayerCost:
    """One layer, forward, for one row."""

    flops: float
    moved_bytes: float
    """What it reads and writes, but for its weights."""
    kept_bytes: float
    """What it puts out."""
    weight_bytes: float
    learns: bool
    """Whether a gradient goes through it."""


@dataclass(frozen=True)
class ModelCosts:
    """A model in one stage of a training."""

    epochs: int
    layers: tuple[LayerCost, ...]
    num_weights: int
    """Numbers that make up the model."""
    num_learning: int
    """Those of them that learn in this stage."""
    num_variables: int
    """Variables that these are in."""
    num_slots: float
    """Numbers that the optimizer keeps in all."""
    input_bytes: float
    """Bytes of a row as the feed hands it over."""
    sync_norms: int
    """Batch norms whose replicas exchange their statistics."""


def planned_manifest(spec: RunSpec, num_rows: int, num_columns: int) -> Manifest:
    """Return a manifest as `prepare` might write it, without any data.

    Args:
        spec: of the run.
        num_rows: of the training split.
        num_columns: of numbers, where the spec does not name them.
    """
    from mm_model.statistics import Vocabulary, fit_numeric_statistics

    options = spec.prepare
    columns = options.numeric_columns
    if columns is None:
        columns = tuple(f"number_{i}" for i in range(num_columns))
    share = {"validation": options.validation_fraction, "test": options.test_fraction}
    total = num_rows / (1 - sum(share.values()))
    splits = {}
    for split in SPLITS:
        count = num_rows if split == "train" else round(total * share[split])
        counts = (count // 2, count - count // 2)
        splits[split] = SplitInfo(num_rows=count, class_counts=counts, shards=())
    numbers = np.random.default_rng(0).normal(size=(1000, len(columns))).astype(np.float32)
    return Manifest(
        prepare=options,
        seed=spec.run.seed,
        image=ImageInfo.of(options),
        numeric_columns=columns,
        vocabularies=tuple(Vocabulary(column=c, words=("a", "b")) for c in spec.data.categorical),
        negative_label="0",
        positive_label="1",
        splits=splits,
        cuts=None,
        statistics=fit_numeric_statistics(numbers, columns) if columns else None,
        quarantine={},
    )


def model_costs(spec: RunSpec, manifest: Manifest) -> list[ModelCosts]:
    """Return what the model of a run takes, by stage of its training.

    Raises:
        JobError: if it cannot be built.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    with suppress(RuntimeError):  # TensorFlow has started already.
        tf.config.set_visible_devices([], "GPU")
    from mm_model.freezing import NO_STAGES, apply_stage
    from ray_jobs.train.model_factory import new_model

    # What the weights are is all the same, and where they are from may be far away.
    untrained = spec.overlay({"model.image.weights": None})
    train = spec.train
    try:
        model = new_model(untrained, manifest, train.precision)
        num_slots = _slots(spec) * _count(model.trainable_variables)
        found = []
        left = train.epochs
        for i, stage in enumerate(train.stages or (NO_STAGES,)):
            apply_stage(model, stage)
            last = i == len(train.stages) - 1 or not train.stages
            epochs = left if last else stage.epochs
            left -= epochs
            found.append(_of_stage(model, manifest, spec, epochs, num_slots))
    except (ValueError, OSError) as error:
        raise JobError(f"the model cannot be built: {error}") from error
    return found


def _of_stage(
    model: "FusionModel", manifest: Manifest, spec: RunSpec, epochs: int, num_slots: float
) -> ModelCosts:
    from mm_model.layers.blocks import SynchronizedBatchNormalization
    from ray_jobs.data.reader import RowDecoder

    decoder = RowDecoder(manifest, with_image=True, size=spec.data.image_size)
    num_images = len(manifest.image.columns)
    inside = {layer.name for layer in _image_layers(model)}
    layers, sync_norms = [], 0
    # Bottom to top, so that below the first layer of the backbone that learns nothing has to.
    learns_below = False
    for layer in _flat(model.network):
        in_image = layer.name in inside
        learns_below |= in_image and bool(layer.trainable_weights)
        layers.append(_cost(layer, num_images if in_image else 1, learns_below or not in_image))
        sync_norms += isinstance(layer, SynchronizedBatchNormalization)
    columns = len(manifest.numeric_columns) + len(manifest.vocabularies)
    return ModelCosts(
        epochs=epochs,
        layers=tuple(layers),
        num_weights=_count(model.weights),
        num_learning=_count(model.trainable_variables),
        num_variables=len(model.trainable_variables),
        num_slots=num_slots,
        input_bytes=decoder.row_bytes + 4 * columns,
        sync_norms=sync_norms,
    )


def _image_layers(model: "FusionModel") -> list[Any]:
    """Return the layers that see each image of a row, from augmentation to the pooled backbone."""
    from mm_model.model import backbone_model

    try:
        return list(_flat(backbone_model(model)))
    except ValueError:  # A model of numbers alone, or of features.
        return []


def _flat(model: Any) -> Iterator[Any]:
    """Yield the layers of a functional model and of those in it, bottom to top."""
    import keras

    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _flat(layer)
        elif not isinstance(layer, keras.layers.InputLayer):
            yield layer


def _cost(layer: Any, times: int, learns: bool) -> LayerCost:
    """Return what a layer takes that is called so many times a row."""
    kernel = getattr(layer, "kernel", None)
    positions = 0.0
    if kernel is not None:
        positions = _numbers(layer.output) / layer.output.shape[-1]
    out_bytes = _bytes(layer.output)
    return LayerCost(
        flops=2.0 * times * positions * (0 if kernel is None else int(np.prod(kernel.shape))),
        moved_bytes=times * (_bytes(layer.input) + out_bytes),
        kept_bytes=times * out_bytes,
        weight_bytes=4.0 * _count(layer.weights),
        learns=learns,
    )


def _slots(spec: RunSpec) -> float:
    """Return how many numbers the run's optimizer keeps for each that learns."""
    import keras

    from mm_model.optimizer import make_optimizer

    optimizer: Any = make_optimizer(spec.train, total_steps=1)
    optimizer.build([keras.Variable(np.zeros(_PROBE, np.float32))])
    return sum(tuple(v.shape) == (_PROBE,) for v in optimizer.variables)


def _tensors(nested: Any) -> list[Any]:
    import keras

    return keras.tree.flatten(nested)


def _numbers(nested: Any) -> int:
    return sum(int(np.prod(x.shape[1:])) for x in _tensors(nested))


def _bytes(nested: Any) -> float:
    import keras

    def width(x: Any) -> int:
        # NumPy does not know bfloat16.
        name = keras.backend.standardize_dtype(x.dtype)
        return 2 if name == "bfloat16" else np.dtype(name).itemsize

    return float(sum(int(np.prod(x.shape[1:])) * width(x) for x in _tensors(nested)))


def _count(variables: Any) -> int:
    return sum(int(np.prod(v.shape)) for v in variables)
