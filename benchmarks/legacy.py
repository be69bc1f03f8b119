"""Trains with legacy Keras, as Ray's documentation recommends for TensorFlow; baseline for `loop`.

The model replicates the fusion model of `mm_model` in tf_keras, with the default settings but
without augmentation. Imports are inside the functions, which run on Ray workers.
"""

import json
import time
from pathlib import Path
from typing import Any

from mm_model.spec import ModelSpec
from mm_model.statistics import NumericStatistics


def train_legacy(config: dict[str, Any]) -> None:
    """Train on one Ray worker as in the guide "Get Started with Distributed Training".

    Args:
        config: `steps`, `size` in pixels, the global `batch` size, `learning_rate`, `model` and
            `statistics` as dicts, and `ends` as in `TimedLoop`.
    """
    import ray.train
    import tensorflow as tf
    import tf_keras

    from benchmarks.arrays import make_arrays

    # As many threads as `set_devices` gives a worker with one CPU.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    steps, batch = config["steps"], config["batch"]
    statistics = NumericStatistics.model_validate(config["statistics"])
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = _model(ModelSpec.model_validate(config["model"]), statistics, config["size"])
        model.compile(tf_keras.optimizers.Adam(config["learning_rate"]), _loss(3))
    arrays = make_arrays(steps * batch, config["size"], len(statistics.columns))
    share = batch // num_workers
    own = {
        name: a.reshape(steps, batch, *a.shape[1:])[:, rank * share : (rank + 1) * share].reshape(
            steps * share, *a.shape[1:]
        )
        for name, a in arrays.items()
    }
    inputs = {"image": own["image"], "numeric": own["numeric"]}
    options = tf.data.Options()
    # Each worker already has only its own rows; the strategy splits the global batch size.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    rows: Any = (inputs, own["label"])
    dataset = tf.data.Dataset.from_tensor_slices(rows).repeat()
    dataset = dataset.batch(batch, drop_remainder=True).prefetch(2).with_options(options)

    ends: list[tuple[float, float]] = []

    class Timer(tf_keras.callbacks.Callback):
        # Without it, Keras would convert the logs to numbers.
        _supports_tf_logs = True

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            ends.append((time.perf_counter(), time.process_time()))

    history = model.fit(dataset, steps_per_epoch=steps, epochs=1, verbose=0, callbacks=[Timer()])
    if rank == 0:
        loss = history.history["loss"][0]
        Path(config["ends"]).write_text(json.dumps({"ends": ends, "loss": loss}))


def _loss(num_heads: int) -> Any:
    """Return the summed loss of the output and all heads, as in our model."""
    import tensorflow as tf
    import tf_keras

    def loss(y_B1: Any, predicted_BX: Any) -> Any:
        entropy = tf_keras.losses.binary_crossentropy
        total = entropy(y_B1, predicted_BX[:, :1])
        for i in range(1, 1 + num_heads):
            total += entropy(y_B1, predicted_BX[:, i : i + 1], from_logits=True)
        return tf.cast(total, tf.float32)

    return loss


def _model(spec: ModelSpec, statistics: NumericStatistics, size: int) -> Any:
    """Return the model; its output (B, 4) is the probability and three logits."""
    import numpy as np
    import tensorflow as tf
    from tf_keras import Input, Model, applications, layers, regularizers

    def kernel(x: Any, units: int) -> Any:
        penalty = regularizers.L2(spec.l2)
        return layers.Dense(units, use_bias=False, kernel_regularizer=penalty)(x)

    def dense(x: Any, units: int, skip: bool = False) -> Any:
        y = layers.BatchNormalization()(kernel(x, units))
        y = layers.Dropout(spec.dropout)(layers.Activation("relu")(y))
        if not skip:
            return y
        return layers.Add()([x if x.shape[-1] == units else kernel(x, units), y])

    class Encoding(layers.Layer):
        def call(self, numbers_BF: Any) -> Any:
            missing = tf.math.is_nan(numbers_BF)
            filled = tf.where(missing, median_F, numbers_BF)
            standard = tf.clip_by_value((filled - mean_F) / std_F, -10.0, 10.0)
            value = tf.gather(filled, column_K, axis=1)
            linear = tf.clip_by_value((value - lower_K) / width_K, 0.0, 1.0)
            return tf.concat([standard, linear], axis=1)

    class ModalityDropout(layers.Layer):
        def call(self, features: Any, training: bool = False) -> Any:
            if not training:
                return features
            shape: Any = (tf.shape(features[0])[0], 1)
            draw = tf.random.uniform(shape)
            rate = spec.fusion.modality_dropout
            keep = (draw >= rate / 2, draw < 1 - rate / 2)
            return [f * tf.cast(k, f.dtype) for f, k in zip(features, keep, strict=True)]

    columns = range(len(statistics.columns))
    mean_F, std_F = np.array(statistics.mean, "f4"), np.array(statistics.std, "f4")
    median_F = np.array([statistics.median(i) for i in columns], "f4")
    positions = np.linspace(0, len(statistics.quantiles[0]) - 1, spec.numeric.bins + 1).round()
    edges = np.array(statistics.quantiles, "f4")[:, positions.astype(int)]
    column_K = np.repeat(np.arange(len(columns)), spec.numeric.bins)
    lower_K, width_K = edges[:, :-1].reshape(-1), np.diff(edges, axis=1).reshape(-1)

    image, numeric = Input((size, size, 3), name="image"), Input((len(columns),), name="numeric")
    untrained: Any = None
    shape = (size, size, 3)
    backbone = applications.EfficientNetB0(False, weights=untrained, input_shape=shape)
    pooled = layers.GlobalAveragePooling2D()(backbone(image))
    image_features = dense(layers.Dropout(spec.dropout)(pooled), spec.image.units)
    numeric_features = Encoding()(numeric)
    for units in spec.numeric.units:
        numeric_features = dense(numeric_features, units, skip=True)
    one, other = ModalityDropout()([image_features, numeric_features])
    units = spec.fusion.units
    gate = layers.Dense(units, activation="sigmoid")(layers.Concatenate()([one, other]))
    one, other = dense(one, units, skip=True), dense(other, units, skip=True)
    joint = layers.Add()([other, layers.Multiply()([gate, layers.Subtract()([one, other])])])
    inputs = image_features, numeric_features, joint
    heads = [layers.Dense(1, kernel_initializer="zeros")(x) for x in inputs]
    probability = layers.Activation("sigmoid")(layers.Average()(heads))
    return Model({"image": image, "numeric": numeric}, layers.Concatenate()([probability, *heads]))
