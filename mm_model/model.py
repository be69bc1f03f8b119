"""The fusion model: inputs → branches → fusion → heads → blend → calibration → probability.

    image   (B, H, W, 3), 0-255 ─ augmentation ─ image branch ──┬─ image head ───┐
                                                                ├─ fusion, joint ┼─ blend ─ p
    numeric (B, F), NaN missing ─ encoding ───── numeric branch ┴─ numeric head ─┘

Every head learns from the label, so that each branch can stand alone; `blend` weighs their logits
(evenly while training, as the validation split shows afterwards), `calibration` then gives the sum
its scale and bias, and a sigmoid makes it p.
"""

import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import keras
from keras import KerasTensor, layers, ops

from mm_model.branches import IMAGE_BRANCHES, NUMERIC_BRANCHES, Builder
from mm_model.fusion import FUSIONS
from mm_model.layers import (
    AffineLogit,
    Blocks,
    ModalityDropout,
    NumericEncoding,
    augmentation,
    register,
)
from mm_model.optimizer import make_optimizer
from mm_model.spec import ModelSpec, OptimizerSpec
from mm_model.statistics import NumericStatistics

Shape = Sequence[int]


@register
class FusionModel(keras.Model):
    """Image and numbers in, one probability (B, 1) out.

    Takes `[image, numeric]` or `{"image": …, "numeric": …}` (or the one input that it was built
    with): pixels 0-255 of any number type, raw numbers with NaN where one is missing.

    Args:
        network: functional model from the named inputs to the logits (B, M) of its heads.
        heads: name of each head; the last is the one that sees everything.
        head_weights: weight of each head's own loss.
        blend: whether the output is all heads' vote, or the last head's logit alone.
    """

    def __init__(
        self,
        network: keras.Model,
        heads: Sequence[str],
        head_weights: Sequence[float],
        blend: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.network = network
        self.heads = list(heads)
        self.head_weights = [float(weight) for weight in head_weights]
        self.blends = blend
        count = len(self.heads)
        start = [1.0 / count] * count if blend else [0.0] * (count - 1) + [1.0]
        self.blend = AffineLogit(start, name="blend")
        self.blend.build((None, count))
        self.calibration = AffineLogit([1.0], name="calibration")
        self.calibration.build((None, 1))
        self.built = True

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs that this model takes: image, numeric or both."""
        return list(self.network.input)

    def head_logits(self, inputs: Any, training: bool = False) -> Any:
        """Return the logits (B, M) of all heads, before blend and calibration."""
        return self.network(_named(inputs, self.input_names), training=training)

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Return the calibrated probability (B, 1)."""
        logits_BM = self.head_logits(inputs, training=training)
        calibrated_B1 = self.calibration(self.blend(logits_BM))
        probability_B1: Any = keras.activations.sigmoid(calibrated_B1)
        # The heads are no outputs, yet their loss needs them: they travel with the probability, as
        # Keras' own `_keras_logits` does for a loss that is computed from logits.
        probability_B1._head_logits = logits_BM
        return probability_B1

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return cross-entropy of the output, of each head while training, and the L2 penalty.

        Means are over the rows of the global batch, which Keras' losses see to under a strategy.
        """
        loss: Any = super().compute_loss(x, y, y_pred, sample_weight, training=training)
        logits_BM = getattr(y_pred, "_head_logits", None)
        if not training or not any(self.head_weights):
            return loss
        if logits_BM is None:
            raise ValueError("y_pred is not what this model returned: its head logits are gone")
        cross_entropy = keras.losses.BinaryCrossentropy(from_logits=True)
        y_B1 = ops.reshape(y, (-1, 1))
        for i, weight in enumerate(self.head_weights):
            if weight:
                head_B1 = logits_BM[:, i : i + 1]
                head_loss: Any = cross_entropy(y_B1, head_B1, sample_weight)
                loss = loss + weight * head_loss
        return loss

    def get_config(self) -> dict:
        """Return the network layer by layer: a saved model does not need its builders again."""
        return {
            "network": keras.saving.serialize_keras_object(self.network),
            "heads": self.heads,
            "head_weights": self.head_weights,
            "blend": self.blends,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict, custom_objects: Any = None) -> "FusionModel":
        """Make the model again, untrained."""
        network = keras.saving.deserialize_keras_object(
            config["network"], custom_objects=custom_objects
        )
        return cls(**{**config, "network": network})

    def get_build_config(self) -> None:
        """Return nothing: the model is built as soon as it is made."""
        return None

    def get_compile_config(self) -> None:
        """Return nothing: a saved model is for serving."""
        return None


def build_model(
    spec: ModelSpec,
    statistics: NumericStatistics | None,
    shape_image: Shape,
    shape_numeric: Shape | None = None,
) -> FusionModel:
    """Return the uncompiled model that a spec describes.

    Args:
        spec: what it is made of.
        statistics: of the training split's numbers; without them numbers are taken as given.
        shape_image: height, width, channels.
        shape_numeric: (columns,); by default as many as `statistics` names.

    Raises:
        ValueError: if the shapes do not fit, or the backbone cannot take them.
        OSError: if weights cannot be had.
    """
    blocks = Blocks.of(spec)
    inputs: dict[str, Any] = {}
    branches: dict[str, dict] = {}
    if spec.image.kind != "none":
        inputs["image"] = x = keras.Input(_image_shape(shape_image), name="image")
        for layer in augmentation(spec.augmentation):
            x = layer(x)
        build_image = _resolve(IMAGE_BRANCHES[spec.image.kind])
        branches["image"] = build_image(x, spec.image.kind, spec.image, blocks)
    if spec.numeric.kind != "none":
        num_columns = _num_columns(statistics, shape_numeric)
        inputs["numeric"] = x = keras.Input((num_columns,), name="numeric")
        if statistics is not None:
            bins = spec.numeric.bins if spec.numeric.encoding == "piecewise_linear" else None
            x = NumericEncoding(statistics, bins, name="numeric_encoding")(x)
        build_numeric = _resolve(NUMERIC_BRANCHES[spec.numeric.kind])
        branches["numeric"] = build_numeric(x, spec.numeric.kind, spec.numeric, blocks)
    logits = {
        name: blocks.logit(branch["pooled"], f"{name}_head") for name, branch in branches.items()
    }
    if len(branches) == 2:
        logits["joint"] = blocks.logit(_joint(branches, spec, blocks), "joint_head")
    heads = list(logits)
    together = list(logits.values())
    logits_BM = layers.Concatenate(name="heads")(together) if len(together) > 1 else together[0]
    # A single head is the output itself, whose loss is the main one.
    auxiliary = spec.fusion.auxiliary_weight if len(heads) > 1 else 0.0
    return FusionModel(
        keras.Model(inputs, logits_BM, name="network"),
        heads=heads,
        head_weights=[auxiliary] * len(heads),
        blend=spec.fusion.blend,
        name="fusion_model",
    )


def create_model(
    input_shape_image: Shape,
    input_shape_numeric: Shape,
    numeric_statistics: NumericStatistics | None = None,
    *,
    learning_rate: float = OptimizerSpec().learning_rate,
    **options: Any,
) -> FusionModel:
    """Return a compiled model for `fit` on arrays in one process.

    Args:
        input_shape_image: height, width, channels of the images, such as (456, 456, 3).
        input_shape_numeric: number of columns, such as (12,).
        numeric_statistics: from `fit_numeric_statistics(X_numeric_of_the_training_rows)`; without
            them the numbers are taken as given, without imputation, scaling or encoding.
        learning_rate: of Adam.
        **options: the fields of `ModelSpec`, nested ones as a dict, such as
            `image={"kind": "resnet50", "weights": None}`, `dropout=0.5`, `l2=0`.

    Raises:
        ValueError: if an option or a shape is wrong (`pydantic.ValidationError` is one).
        OSError: if weights cannot be had.
    """
    spec = ModelSpec.model_validate(options)
    model = build_model(spec, numeric_statistics, input_shape_image, input_shape_numeric)
    model.compile(
        optimizer=make_optimizer(OptimizerSpec(learning_rate=learning_rate, schedule="constant")),
        loss="binary_crossentropy",
        metrics=["accuracy", keras.metrics.AUC(name="auc")],
    )
    return model


def load_model(path: str | Path) -> FusionModel:
    """Return a saved model, loaded in Keras' safe mode: no code of the file's is run.

    Raises:
        ValueError: if the file is missing or is no fusion model.
    """
    with warnings.catch_warnings():
        # The optimizer is not in the file, and is not wanted.
        warnings.simplefilter("ignore")
        model = keras.saving.load_model(str(path), compile=False, safe_mode=True)
    if not isinstance(model, FusionModel):
        raise ValueError(f"{path} holds a {type(model).__name__}, no FusionModel")
    return model


def _joint(branches: dict[str, dict], spec: ModelSpec, blocks: Blocks) -> KerasTensor:
    image, numeric = dict(branches["image"]), dict(branches["numeric"])
    if spec.fusion.modality_dropout:
        hide = ModalityDropout(spec.fusion.modality_dropout, name="modality_dropout")
        image["pooled"], numeric["pooled"] = hide([image["pooled"], numeric["pooled"]])
    return _resolve(FUSIONS[spec.fusion.kind])(image, numeric, spec.fusion, blocks)


def _resolve(builder: Builder) -> Any:
    if isinstance(builder, str):
        module, function = builder.split(":")
        return getattr(import_module(module), function)
    return builder


def _named(inputs: Any, names: list[str]) -> dict[str, Any]:
    if isinstance(inputs, Mapping):
        absent = [name for name in names if name not in inputs]
        if absent:
            raise ValueError(f"the model takes {names}; {absent} missing from {list(inputs)}")
        chosen = {name: inputs[name] for name in names}
    else:
        given = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        if len(given) == 2 and len(names) == 1:
            given = [given[["image", "numeric"].index(names[0])]]
        if len(given) != len(names):
            raise ValueError(f"the model takes {names}; got {len(given)} inputs")
        chosen = dict(zip(names, given, strict=True))
    return {name: ops.cast(value, "float32") for name, value in chosen.items()}


def _image_shape(shape: Shape) -> tuple[int, int, int]:
    if len(shape) != 3 or shape[2] != 3:
        raise ValueError(f"images are (height, width, 3), got shape {tuple(shape)}")
    return (int(shape[0]), int(shape[1]), 3)


def _num_columns(statistics: NumericStatistics | None, shape: Shape | None) -> int:
    if statistics is None and shape is None:
        raise ValueError("give the numeric statistics or the numeric shape")
    if shape is not None and (len(shape) != 1 or shape[0] < 1):
        raise ValueError(f"numbers are (columns,) with at least one column, got {tuple(shape)}")
    num_columns = len(statistics.columns) if statistics is not None else int(shape[0])  # type: ignore[index]
    if shape is not None and shape[0] != num_columns:
        raise ValueError(
            f"the numeric shape {tuple(shape)} does not fit the statistics' {num_columns} columns"
        )
    return num_columns
