"""Computes the operations, traffic and memory of each layer of a run's model.

The model is built like the run's, except for its weights; only shapes and dtypes are read, and
nothing is traced or computed. A convolution (depthwise or not) or a dense layer has as many
multiplications as its kernel has weights, times the positions that the kernel is applied to, and
two float operations per multiplication. TensorFlow's profiler includes element-wise operations and
counts a few percent more (tests compare both). It does not count per layer, as is necessary here: a
backbone can be frozen up to any of its layers.
"""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_model.backbones import HUB_TEXTS
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import SPLITS
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import ImageInfo, Manifest, SplitInfo

if TYPE_CHECKING:
    from mm_model.model import FusionModel

_HEAD_WIDTH = 64
"""Width of an attention head, used if a layer does not expose its number of heads."""
_NUM_WORDS = 8000
"""Number of words in the texts of data that is not prepared yet."""
_PRETRAINED_WORDS = {
    "BertBackbone": 30_522,
    "DistilBertBackbone": 30_522,
    "RobertaBackbone": 50_265,
}
"""Number of words that the published weights of a text backbone have."""
_PROBE_SIZE = 7
"""Size of a variable for which an optimizer is built to count its slots."""


@dataclass(frozen=True)
class LayerCost:
    """The forward pass of one layer for one row."""

    flops: float
    moved_bytes: float
    """Size of the inputs and outputs."""
    kept_bytes: float
    """Size of the outputs."""
    weight_bytes: float
    learns: bool
    """Whether the layer has a gradient."""


@dataclass(frozen=True)
class ModelCosts:
    """Costs of a model in one stage of a run."""

    epochs: int
    layers: tuple[LayerCost, ...]
    num_weights: int
    num_learning: int
    """Number of weights that are trainable in this stage."""
    num_variables: int
    """Number of trainable variables in this stage."""
    num_slots: float
    """Size of the optimizer state."""
    input_bytes: float
    """Size of a decoded row."""
    sync_norms: int
    """Number of batch norms that exchange their statistics between replicas."""


def planned_manifest(spec: RunSpec, num_rows: int, num_columns: int) -> Manifest:
    """Return the manifest that `prepare` would write, for data that is not prepared yet.

    Args:
        spec: The run.
        num_rows: Number of rows of the training split.
        num_columns: Number of numeric columns if the spec does not name them.
    """
    from mm_model.statistics import Vocabulary, fit_numeric_statistics

    options = spec.prepare
    columns = options.numeric_columns
    if columns is None:
        columns = tuple(f"number_{i}" for i in range(num_columns))
    fractions = {"validation": options.validation_fraction, "test": options.test_fraction}
    total = num_rows / (1 - sum(fractions.values()))
    splits = {}
    for split in SPLITS:
        count = num_rows if split == "train" else round(total * fractions[split])
        counts = (count // 2, count - count // 2)
        splits[split] = SplitInfo(num_rows=count, class_counts=counts, shards=())
    numbers = np.random.default_rng(0).normal(size=(1000, len(columns))).astype(np.float32)
    return Manifest(
        prepare=options,
        seed=spec.run.seed,
        image=ImageInfo.of(options),
        numeric_columns=columns,
        vocabularies=tuple(Vocabulary(column=c, words=("a", "b")) for c in spec.data.categorical),
        text_columns=spec.data.text,
        text_words=tuple(map(str, range(_NUM_WORDS if spec.data.text else 0))),
        negative_label="0",
        positive_label="1",
        splits=splits,
        cuts=None,
        statistics=fit_numeric_statistics(numbers, columns) if columns else None,
        quarantine={},
    )


def model_costs(spec: RunSpec, manifest: Manifest) -> list[ModelCosts]:
    """Return the costs of a run's model in each stage of its training.

    Raises:
        JobError: If the model cannot be built.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    with suppress(RuntimeError):  # TensorFlow is already running.
        tf.config.set_visible_devices([], "GPU")
    from mm_model.freezing import NO_STAGES, apply_stage
    from ray_jobs.train.model_factory import new_model

    # The weights do not matter here, and loading them could start a download.
    untrained = spec.overlay({"model.image.weights": None, "model.text.weights": None})
    if spec.model.text.weights is not None:
        num_words = _PRETRAINED_WORDS[HUB_TEXTS[spec.model.text.kind].backbone]
        manifest = manifest.model_copy(update={"text_words": tuple(map(str, range(num_words)))})
    train = spec.train
    costs, remaining = [], train.epochs
    try:
        model = new_model(untrained, manifest, train.precision)
        num_slots = _slots_per_weight(spec) * _count(model.trainable_variables)
        stages = train.stages or (NO_STAGES,)
        for stage in stages:
            apply_stage(model, stage)
            epochs = remaining if stage is stages[-1] else stage.epochs
            remaining -= epochs
            costs.append(_stage_costs(model, manifest, spec, epochs, num_slots))
    except (ValueError, OSError) as error:
        raise JobError(f"the model cannot be built: {error}") from error
    return costs


def _stage_costs(
    model: "FusionModel", manifest: Manifest, spec: RunSpec, epochs: int, num_slots: float
) -> ModelCosts:
    from mm_model.layers.batch_norm import SynchronizedBatchNormalization
    from mm_model.model import backbone_model
    from ray_jobs.data.decoder import RowDecoder

    decoder = RowDecoder(manifest, with_image=True, size=spec.data.image_size)
    num_images = len(manifest.image.columns)
    try:
        backbone = {layer.name for layer in _flat(backbone_model(model))}
    except ValueError:  # The model has no image branch, or takes features instead of images.
        backbone = set()
    texts = [model.network.get_layer(name) for name in model.text_backbone]
    encoder = {layer.name for nested in texts for layer in _flat(nested)}
    num_texts = len(manifest.text_columns)
    layers, sync_norms = [], 0
    # Bottom to top: a backbone has gradients from its first trainable layer on.
    has_gradient = {"image": False, "text": False}
    for layer in _flat(model.network):
        times, learns = 1, True
        for name, members, count in (("image", backbone, num_images), ("text", encoder, num_texts)):
            if layer.name in members:
                has_gradient[name] |= bool(layer.trainable_weights)
                times, learns = count, has_gradient[name]
        layers.append(_layer_cost(layer, times, learns, spec.data.text_length))
        sync_norms += isinstance(layer, SynchronizedBatchNormalization)
    columns = len(manifest.numeric_columns) + len(manifest.vocabularies)
    columns += 2 * num_texts * spec.data.text_length
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


def _flat(model: Any) -> Iterator[Any]:
    """Yield the layers of a functional model and of its nested models, bottom to top."""
    import keras

    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _flat(layer)
        elif not isinstance(layer, keras.layers.InputLayer):
            yield layer


def _layer_cost(layer: Any, times: int, learns: bool, length: int) -> LayerCost:
    """Return the cost of a layer that is called `times` times per row.

    Text backbones accept texts of any length; `length` is that of the run.
    """
    kernel, multiplications, inner_bytes = getattr(layer, "kernel", None), 0.0, 0.0
    if kernel is not None:
        multiplications = _num_positions(layer.output, length) * math.prod(kernel.shape)
    else:
        multiplications, inner_bytes = _inner_cost(layer, length)
    out_bytes = _row_bytes(layer.output, length)
    return LayerCost(
        flops=2.0 * times * multiplications,
        moved_bytes=times * (_row_bytes(layer.input, length) + 2 * inner_bytes + out_bytes),
        kept_bytes=times * (inner_bytes + out_bytes),
        weight_bytes=4.0 * _count(layer.weights),
        learns=learns,
    )


def _inner_cost(layer: Any, length: int) -> tuple[float, float]:
    """Return multiplications and bytes of the results of the layers inside a layer, per row.

    Layers such as transformer blocks apply each dense layer to each token. Attention also
    multiplies each pair of tokens, twice.
    """
    import keras
    import tensorflow as tf

    from mm_model.compat_keras import all_layers

    parts = [part for part in all_layers(layer) if getattr(part, "kernel", None) is not None]
    if not parts:
        return 0.0, 0.0
    first = keras.tree.flatten(layer.input)[0]
    # Images become patches inside the layer.
    outputs = keras.tree.flatten(layer.output)[0]
    num_tokens = _num_positions(first if len(first.shape) == 3 else outputs, length)
    multiplications = numbers = 0.0
    for part in parts:
        kernel = tuple(part.kernel.shape)
        multiplications += num_tokens * math.prod(kernel)
        width = math.prod(part.bias.shape) if part.bias is not None else kernel[-1]
        # The result, and that of the activation, dropout or normalization that follows.
        numbers += 2 * num_tokens * width
        if "query" in part.name:
            num_heads = kernel[1] if len(kernel) == 3 else max(width // _HEAD_WIDTH, 1)
            multiplications += 2 * num_tokens**2 * width
            numbers += 2 * num_heads * num_tokens**2
    return multiplications, numbers * tf.as_dtype(layer.compute_dtype).size


def _slots_per_weight(spec: RunSpec) -> int:
    """Return how many numbers the run's optimizer stores per trainable weight."""
    import keras

    from mm_model.optimizer import make_optimizer

    optimizer: Any = make_optimizer(spec.train, total_steps=1)
    optimizer.build([keras.Variable(np.zeros(_PROBE_SIZE, np.float32))])
    return sum(tuple(v.shape) == (_PROBE_SIZE,) for v in optimizer.variables)


def _row_bytes(tensors: Any, length: int) -> float:
    """Return the bytes per row of one or several symbolic tensors."""
    import keras
    import tensorflow as tf

    return float(
        sum(
            _num_positions(x, length) * (x.shape[-1] or length) * tf.as_dtype(x.dtype).size
            for x in keras.tree.flatten(tensors)
            if len(x.shape) > 1
        )
    )


def _num_positions(tensor: Any, length: int) -> int:
    """Return the number of positions per row, such as pixels or tokens."""
    return math.prod(size or length for size in tensor.shape[1:-1])


def _count(variables: Any) -> int:
    return sum(math.prod(v.shape) for v in variables)
