"""The fusion model: inputs → branches → fusion → heads → blend → calibration → probability.

    image    (B, H, W, 3), 0-255 ─ augmentation ─ image branch ──┬─ image head ───┐
                                                                 ├─ fusion, joint ┼─ blend ─ p
    numeric  (B, F), NaN missing ─ encoding ──┬── numeric branch ┴─ numeric head ─┘
    category (B, C), codes ────── embedding ──┘

Several images a row (B, N, H, W, 3), with image_mask (B, N), become a batch of B × N images before
augmentation, and their features those of B rows after the image branch.

A frozen backbone gives the same features again and again. A network can be built on them: its input
`features` (B, V, F), or (B, N, V, F), stands for image, augmentation and backbone. All above these
has the same names in both, so that weights can be carried over by their paths.

Every head learns from the label, so that each branch can stand alone; `blend` weighs their logits
(evenly while training, as the validation split shows afterwards), `calibration` then gives the sum
its scale and bias, and a sigmoid makes it p.
"""

import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import keras
from keras import KerasTensor, layers, ops

from mm_model.branches import IMAGE_BRANCHES, IMAGE_TOPS, NUMERIC_BRANCHES, Builder
from mm_model.fusion import FUSIONS
from mm_model.layers.augmentation import augmentation
from mm_model.layers.blocks import (
    AffineLogit,
    Blocks,
    FoldImages,
    ModalityDropout,
    PickView,
    UnfoldImages,
    register,
)
from mm_model.layers.encodings import CategoryEmbedding, NumericEncoding
from mm_model.losses import of_logits
from mm_model.optimizer import make_optimizer
from mm_model.spec import ModelSpec, OptimizerSpec
from mm_model.statistics import NumericStatistics, Vocabulary
from mm_model.tunable import current_value

Shape = Sequence[int]

INPUT_DTYPES = {
    "image": "float32",
    "features": "float32",
    "image_mask": "float32",
    "numeric": "float32",
    "category": "int32",
}
"""Every input that a network may have, in order, and what it is cast to."""
_POSITIONAL = ("image", "numeric", "category")
_FOLDED, _POOLED = "image_fold", "image_pool"
"""Layers between which one image goes through augmentation and backbone."""


@register
class FusionModel(keras.Model):
    """Images and numbers in, one probability (B, 1) out.

    Takes `{"image": …, "numeric": …, "category": …}` or a list in this order, or those of them that
    it was built with: pixels 0-255 of any number type, raw numbers with NaN where one is missing,
    codes of the vocabularies. With several images a row the dict may hold `image_mask`, 0 where an
    image is missing; without it all are there. `features` take the place of `image` where the
    network was built on them.

    Args:
        network: functional model from the named inputs to the logits (B, M) of its heads.
        heads: name of each head; the last is the one that sees everything.
        head_weights: weight of each head's own loss.
        blend: whether the output is all heads' vote, or the last head's logit alone.
        backbone: names of the network's layers that make up the image backbone, bottom to top; a
            nested model stands for its layers.
    """

    def __init__(
        self,
        network: keras.Model,
        heads: Sequence[str],
        head_weights: Sequence[float],
        blend: bool,
        backbone: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        # Each layer casts for itself; the raw numbers must reach their encoding as they are.
        super().__init__(autocast=False, **kwargs)
        self.network = network
        self.heads = list(heads)
        self.head_weights = list(head_weights)
        self.blends = blend
        self.backbone = list(backbone)
        self.backbone_trainable = any(layer.trainable for layer in self.backbone_layers())
        """Whether the backbone was built to learn, wholly or in part."""
        count = len(self.heads)
        start = [1.0 / count] * count if blend else [0.0] * (count - 1) + [1.0]
        self.blend = AffineLogit(start, name="blend")
        self.blend.build((None, count))
        self.calibration = AffineLogit([1.0], name="calibration")
        self.calibration.build((None, 1))
        self.built = True

    @property
    def input_names(self) -> list[str]:
        """Names of the network's inputs, in the order of `INPUT_DTYPES`."""
        return [name for name in INPUT_DTYPES if name in self.network.input]

    def backbone_layers(self) -> list[layers.Layer]:
        """Return the image backbone's layers that have weights to learn, bottom to top."""

        def inside(layer: Any) -> list[layers.Layer]:
            if isinstance(layer, keras.Model):
                return [deep for inner in layer.layers for deep in inside(inner)]
            # The statistics of a normalization of pixels are given, not learnt.
            learns = layer.weights and not isinstance(layer, layers.Normalization)
            return [layer] if learns else []

        return [deep for name in self.backbone for deep in inside(self.network.get_layer(name))]

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
        """Return the loss of the output, of each head while training, and the L2 penalty.

        The loss of a head is the one that was compiled for the output, computed from its logit.
        Means are over the rows of the global batch, which Keras' losses see to under a strategy.
        """
        loss: Any = super().compute_loss(x, y, y_pred, sample_weight, training=training)
        logits_BM = getattr(y_pred, "_head_logits", None)
        if not training or not any(self.head_weights):
            return loss
        if logits_BM is None:
            raise ValueError("y_pred is not what this model returned: its head logits are gone")
        of_head = of_logits(self.loss)
        y_B1 = ops.reshape(y, (-1, 1))
        for i, weight in enumerate(self.head_weights):
            if weight:
                head_B1 = logits_BM[:, i : i + 1]
                head_loss: Any = of_head(y_B1, head_B1, sample_weight)
                loss = loss + current_value(weight) * head_loss
        return loss

    def get_config(self) -> dict:
        """Return the network layer by layer: a saved model does not need its builders again."""
        return {
            "network": keras.saving.serialize_keras_object(self.network),
            "heads": self.heads,
            "head_weights": self.head_weights,
            "blend": self.blends,
            "backbone": self.backbone,
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
    shape_image: Shape | None,
    shape_numeric: Shape | None = None,
    vocabularies: Sequence[Vocabulary] = (),
    shape_features: Shape | None = None,
) -> FusionModel:
    """Return the uncompiled model that a spec describes.

    Args:
        spec: what it is made of.
        statistics: of the training split's numbers; without them numbers are taken as given.
        shape_image: height, width, channels; before them the number of images of a row that has
            several.
        shape_numeric: (columns,); by default as many as `statistics` names.
        vocabularies: of the categorical columns.
        shape_features: views, width of what the backbone gave before, on which the model is built
            in place of images; likewise with several.

    Raises:
        ValueError: if the shapes do not fit, the backbone cannot take them, or a branch is left
            without an input.
        OSError: if weights cannot be had.
    """
    blocks = Blocks.of(spec)
    inputs: dict[str, Any] = {}
    branches: dict[str, dict] = {}
    backbone: list[str] = []
    if spec.image.kind != "none":
        if shape_features is not None:
            branches["image"] = _features_branch(inputs, spec, shape_features, blocks)
        else:
            branches["image"], backbone = _image_branch(inputs, spec, shape_image or (), blocks)
    if spec.numeric.kind != "none":
        x = _encoded(inputs, spec, statistics, shape_numeric, vocabularies)
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
        backbone=backbone,
        name="fusion_model",
    )


def create_model(
    input_shape_image: Shape,
    input_shape_numeric: Shape,
    numeric_statistics: NumericStatistics | None = None,
    *,
    vocabularies: Sequence[Vocabulary] = (),
    learning_rate: float = OptimizerSpec().learning_rate,
    **options: Any,
) -> FusionModel:
    """Return a compiled model for `fit` on arrays in one process.

    Args:
        input_shape_image: height, width, channels of the images, such as (456, 456, 3); of several
            images a row their number first, such as (4, 456, 456, 3).
        input_shape_numeric: number of columns, such as (12,); (0,) with categories alone.
        numeric_statistics: from `fit_numeric_statistics(X_numeric_of_the_training_rows)`; without
            them the numbers are taken as given, without imputation, scaling or encoding.
        vocabularies: of categorical columns, each from `fit_vocabulary(texts_of_the_training_rows,
            column)`; the input `category` is `np.stack([v.codes(texts[v.column]) for v in
            vocabularies], axis=1)`.
        learning_rate: of Adam.
        **options: the fields of `ModelSpec`, nested ones as a dict, such as
            `image={"kind": "resnet50", "weights": None}`, `dropout=0.5`, `l2=0`.

    Raises:
        ValueError: if an option or a shape is wrong (`pydantic.ValidationError` is one).
        OSError: if weights cannot be had.
    """
    spec = ModelSpec.model_validate(options)
    model = build_model(
        spec, numeric_statistics, input_shape_image, input_shape_numeric, vocabularies
    )
    model.compile(
        optimizer=make_optimizer(OptimizerSpec(learning_rate=learning_rate, schedule="constant")),
        loss="binary_crossentropy",
        metrics=["accuracy", keras.metrics.AUC(name="auc")],
        # XLA compiles a large backbone for minutes, and again for an epoch's last, smaller batch.
        jit_compile=cast(Any, False),
    )
    # Else `fit` would make its variables in the graph, which takes a quarter longer to trace.
    model.optimizer.build(model.trainable_variables)
    return model


def backbone_model(model: FusionModel) -> keras.Model:
    """Return the part of a model from single images (B, H, W, 3) to its pooled backbone (B, F).

    It shares the model's layers. Called with `training=True` it augments; its batch norms then keep
    their statistics only if the backbone was built frozen.

    Raises:
        ValueError: if the model takes no images, or its branch has no layer `image_pool`.
    """
    network: Any = model.network
    if "image" not in network.input:
        raise ValueError(f"a model of {model.input_names} has no image backbone")
    pooled = [layer.output for layer in network.layers if layer.name == _POOLED]
    if not pooled:
        raise ValueError(f"the image branch has no layer {_POOLED!r}, which ends its backbone")
    start = network.input["image"]
    if "image_mask" in network.input:
        start = network.get_layer(_FOLDED).output
    return keras.Model(start, pooled[0], name="image_backbone")


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


def _image_branch(
    inputs: dict[str, Any], spec: ModelSpec, shape: Shape, blocks: Blocks
) -> tuple[dict[str, KerasTensor], list[str]]:
    """Return the image branch's features of a row and the names of its backbone's layers.

    What it takes is put among the inputs.
    """
    several = len(shape) == 4
    inputs["image"] = x = keras.Input(_image_shape(shape), name="image")
    if several:
        inputs["image_mask"] = keras.Input((int(shape[0]),), name="image_mask")
        x = FoldImages(name=_FOLDED)([x, inputs["image_mask"]])
    for layer in augmentation(spec.augmentation):
        x = layer(x)
    build_image = _resolve(IMAGE_BRANCHES[spec.image.kind])
    features = build_image(x, spec.image.kind, spec.image, blocks)
    # Tokens are what the backbone gives, before any layer on top of it.
    below = keras.Model(list(inputs.values()), features["tokens"], name="image_backbone").layers
    backbone = [layer.name for layer in below if layer.weights]
    return _of_rows(features, inputs), backbone


def _features_branch(
    inputs: dict[str, Any], spec: ModelSpec, shape: Shape, blocks: Blocks
) -> dict[str, KerasTensor]:
    """Return the image branch's features of a row from those that its backbone gave before.

    Their one token is the pooled backbone; it gave others, but they were not kept.
    """
    kind = spec.image.kind
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(
            "features are (views, width), of several images a row (images, views, width), got "
            f"shape {tuple(shape)}"
        )
    if kind not in IMAGE_TOPS:
        raise ValueError(
            f"image branch {kind!r} cannot be built on features: IMAGE_TOPS does not say what it "
            "puts on its backbone"
        )
    inputs["features"] = x = keras.Input(tuple(map(int, shape)), name="features")
    if len(shape) == 3:
        inputs["image_mask"] = keras.Input((int(shape[0]),), name="image_mask")
        x = FoldImages(name=_FOLDED)([x, inputs["image_mask"]])
    picked_BF = PickView(name="image_view")(x)
    tokens_BTF = layers.Reshape((1, int(shape[-1])), name="image_tokens")(picked_BF)
    pooled_BF = _resolve(IMAGE_TOPS[kind])(picked_BF, kind, spec.image, blocks)
    return _of_rows({"pooled": pooled_BF, "tokens": tokens_BTF}, inputs)


def _of_rows(features: dict[str, KerasTensor], inputs: dict[str, Any]) -> dict[str, KerasTensor]:
    """Return the features of rows from those of single images."""
    if "image_mask" not in inputs:
        return features
    unfold = UnfoldImages(name="image_unfold")
    pooled_BF, tokens_BTF = unfold([features["pooled"], features["tokens"], inputs["image_mask"]])
    return {"pooled": pooled_BF, "tokens": tokens_BTF}


def _encoded(
    inputs: dict[str, Any],
    spec: ModelSpec,
    statistics: NumericStatistics | None,
    shape: Shape | None,
    vocabularies: Sequence[Vocabulary],
) -> KerasTensor:
    """Return what the numeric branch takes, and put what that is made from among the inputs."""
    parts: list[Any] = []
    num_columns = _num_columns(statistics, shape, vocabularies)
    if num_columns:
        inputs["numeric"] = x = keras.Input((num_columns,), name="numeric")
        if statistics is not None:
            bins = spec.numeric.bins if spec.numeric.encoding == "piecewise_linear" else None
            x = NumericEncoding(statistics, bins, name="numeric_encoding")(x)
        parts.append(x)
    if vocabularies:
        inputs["category"] = x = keras.Input((len(vocabularies),), dtype="int32", name="category")
        embed = CategoryEmbedding(
            vocabularies, spec.numeric.category_dropout, spec.l2, name="category_embedding"
        )
        parts.append(embed(x))
    return layers.Concatenate(name="numeric_concat")(parts) if len(parts) > 1 else parts[0]


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
    """Return the network's inputs by name, cast, from a dict or a list of what users give."""
    given = inputs if isinstance(inputs, Mapping) else _by_name(inputs, names)
    image = "features" if "features" in names else "image"
    if "image_mask" in names and image in given and "image_mask" not in given:
        shape: Any = ops.shape(given[image])
        given = {**given, "image_mask": ops.ones(shape[:2])}
    absent = [name for name in names if name not in given]
    if absent:
        raise ValueError(f"the model takes {names}; {absent} missing from {list(given)}")
    return {name: ops.cast(given[name], INPUT_DTYPES[name]) for name in names}


def _by_name(inputs: Any, names: list[str]) -> dict[str, Any]:
    """Return inputs by name of a list, in which those of a branch that is left out may stand."""
    given = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    positional = _POSITIONAL
    if "features" in names:
        positional = ("features", *_POSITIONAL[1:])
    wanted = [name for name in positional if name in names]
    if len(given) == len(wanted):
        return dict(zip(wanted, given, strict=True))
    all_names = positional[: len(given)]
    more = len(wanted) < len(given) <= len(positional)
    if more and set(wanted) <= set(all_names):
        return dict(zip(all_names, given, strict=True))
    raise ValueError(f"the model takes {wanted}; got {len(given)} inputs")


def _image_shape(shape: Shape) -> tuple[int, ...]:
    if len(shape) not in (3, 4) or shape[-1] != 3 or min(shape) < 1:
        raise ValueError(
            "images are (height, width, 3), several a row (images, height, width, 3), "
            f"got shape {tuple(shape)}"
        )
    return tuple(int(size) for size in shape)


def _num_columns(
    statistics: NumericStatistics | None, shape: Shape | None, vocabularies: Sequence[Vocabulary]
) -> int:
    if shape is not None and len(shape) != 1:
        raise ValueError(f"numbers are (columns,), got {tuple(shape)}")
    if statistics is not None:
        num_columns = len(statistics.columns)
        if shape is not None and shape[0] != num_columns:
            raise ValueError(
                f"the numeric shape {tuple(shape)} does not fit the statistics' {num_columns} "
                "columns"
            )
    else:
        num_columns = int(shape[0]) if shape is not None else 0
    if not num_columns and not vocabularies:
        raise ValueError(
            "there are no numbers and no categories for the numeric branch; give the numeric "
            "statistics, the numeric shape or vocabularies, or set model.numeric.kind=none"
        )
    return num_columns
