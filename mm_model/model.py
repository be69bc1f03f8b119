"""The fusion model: inputs → branches → fusion → heads → blend → calibration → probability.

    image    (B, H, W, 3), 0-255 ─ augmentation ─ image branch ──┬─ image head ───┐
    numeric  (B, F), NaN missing ─ encoding ──┬── numeric branch ┼─ numeric head ─┤
    category (B, C), codes ────── embedding ──┘                  │                ├─ blend ─ p
    text     (B, C, L), token ids ─────────────── text branch ───┼─ text head ────┤
                                                                 └─ fusion, joint ┘

Several images per row (B, N, H, W, 3), with image_mask (B, N), become a batch of B × N images
before augmentation; after the image branch, their features are combined into features of B rows.
With `image_optional`, rows may lack all images: the joint network then gets zeros in place of image
features, as from modality dropout, and the joint head replaces the image head in the blend.

A frozen backbone returns the same features in every epoch. Therefore, a network can also be built
on precomputed features: the input `features` (B, V, F), or (B, N, V, F), replaces image,
augmentation and backbone. The layers above have the same names, so weights can be copied by path.
With a fusion that uses tokens, the features include them (B, V, 1 + T, F).

Each head learns from the label, so each branch can predict alone. `blend` computes a weighted sum
of the heads' logits (with equal weights in training, with weights fitted on the validation split
afterwards), `calibration` applies a scale and a bias, and a sigmoid returns p.

Shapes: B rows, N images per row, H × W pixels, V views, F features or columns, C categories or text
columns, L tokens per text, M heads.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import keras
from keras import KerasTensor, layers, ops

from mm_model.branches import load_builder
from mm_model.branches.image_inputs import IMAGE_FOLD, IMAGE_POOL, IMAGE_TOKENS, build_image_branch
from mm_model.branches.numeric_inputs import build_numeric_branch
from mm_model.branches.text_inputs import TextShape, build_text_branch
from mm_model.compat_keras import child_layers, store_position_embeddings
from mm_model.fusion import FUSIONS
from mm_model.layers.affine_logit import AffineLogit
from mm_model.layers.blocks import BlockBuilder
from mm_model.layers.dropout import ModalityDropout
from mm_model.layers.image_stack import JointWithoutImage
from mm_model.losses import loss_from_logits
from mm_model.model_inputs import INPUT_DTYPES, ExportedModel, inputs_by_name
from mm_model.optimizer import make_optimizer
from mm_model.spec import ModelSpec, OptimizerSpec
from mm_model.statistics import NumericStatistics, Vocabulary
from mm_model.tunable import current_value

Shape = Sequence[int]


@keras.saving.register_keras_serializable("mm_model")
class FusionModel(ExportedModel):
    """Takes images, numbers, categories and texts and returns a probability (B, 1).

    The inputs are a dict `{"image": …, "numeric": …, "category": …}` or a list in this order:
    pixels 0-255 of any dtype, raw numbers with NaN for missing, and codes of the vocabularies. The
    dict may also contain `text` and `text_mask`, the token ids of texts and 0 for padding. Inputs
    of a branch that the model lacks are ignored. With several images per row, the dict may
    contain `image_mask`, 0 for a missing image; by default, all images are present. A network built
    on precomputed features takes `features` in place of `image`.

    Args:
        network: Functional model from the named inputs to the logits (B, M) of its heads.
        heads: Names of the heads; the last one sees all inputs.
        head_weights: Weight of each head's own loss.
        blend: Whether the output is the blend of all heads; if false, it is the last head alone.
        backbone: Names of the network's layers that form the image backbone, bottom to top; a
            nested model stands for its layers.
        text_backbone: The same for the text backbone.
        inference_views: Number of views of each image whose logits are averaged at inference.
    """

    def __init__(
        self,
        network: keras.Model,
        heads: Sequence[str],
        head_weights: Sequence[float],
        blend: bool,
        backbone: Sequence[str] = (),
        text_backbone: Sequence[str] = (),
        inference_views: int = 1,
        **kwargs: Any,
    ) -> None:
        # Layers cast their own inputs; the numeric encoding needs the numbers in full precision.
        super().__init__(autocast=False, **kwargs)
        self.network = network
        self.heads = list(heads)
        self.head_weights = list(head_weights)
        self.blends = blend
        self.backbone, self.text_backbone = list(backbone), list(text_backbone)
        self.inference_views = inference_views
        self.backbone_trainable = any(layer.trainable for layer in self.backbone_layers())
        """Whether any layer of the image backbone was built trainable."""
        self.text_trainable = any(layer.trainable for layer in self.text_backbone_layers())
        """Whether any layer of the text backbone was built trainable."""
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
        """Return the layers of the image backbone that can train, bottom to top.

        A transformer block counts as one layer.
        """
        return self._trainable_parts(self.backbone)

    def text_backbone_layers(self) -> list[layers.Layer]:
        """Return the layers of the text backbone that can train, bottom to top."""
        return self._trainable_parts(self.text_backbone)

    def _trainable_parts(self, names: Sequence[str]) -> list[layers.Layer]:
        def flatten(layer: Any) -> list[layers.Layer]:
            parts = layer.layers if isinstance(layer, keras.Model) else _stacked_blocks(layer)
            if parts:
                return [leaf for inner in parts for leaf in flatten(inner)]
            # The statistics of a pixel normalization are constants.
            can_train = layer.weights and not isinstance(layer, layers.Normalization)
            return [layer] if can_train else []

        return [leaf for name in names for leaf in flatten(self.network.get_layer(name))]

    def head_logits(self, inputs: Any, training: bool = False) -> Any:
        """Return the logits (B, M) of all heads, before blending and calibration."""
        named = inputs_by_name(inputs, self.input_names)
        if training or self.inference_views == 1 or "image" not in named:
            return self.network(named, training=training)
        views = _views(named["image"], self.inference_views)
        logits = [self.network({**named, "image": view}, training=False) for view in views]
        return ops.mean(ops.stack(logits), axis=0)

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Return the calibrated probability (B, 1)."""
        logits_BM = self.head_logits(inputs, training=training)
        probability_B1: Any = self.probability(logits_BM)
        # Keras passes only the output to `compute_loss`, so the heads' logits are attached to it.
        probability_B1._head_logits = logits_BM
        return probability_B1

    def probability(self, logits_BM: Any) -> Any:
        """Return the calibrated probability (B, 1) of the logits of all heads."""
        return keras.activations.sigmoid(self.calibration(self.blend(logits_BM)))

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return the loss of the output plus the L2 penalty and, in training, the heads' losses.

        The loss of a head is the compiled loss computed from its logit. Keras' losses average over
        the rows of the global batch, also under a distribution strategy.
        """
        loss: Any = super().compute_loss(x, y, y_pred, sample_weight, training=training)
        logits_BM = getattr(y_pred, "_head_logits", None)
        if not training or not any(self.head_weights):
            return loss
        if logits_BM is None:
            raise ValueError(
                "y_pred has no head logits; pass the tensor that this model returned, unchanged"
            )
        head_loss = loss_from_logits(self.loss)
        y_B1 = ops.reshape(y, (-1, 1))
        for i, weight in enumerate(self.head_weights):
            if weight:
                one: Any = head_loss(y_B1, logits_BM[:, i : i + 1], sample_weight)
                loss = loss + current_value(weight) * one
        return loss

    def save_own_variables(self, store: Any) -> None:
        """Save the variables outside of all layers, before Keras saves the layers."""
        store_position_embeddings(self.network)
        super().save_own_variables(store)

    def get_config(self) -> dict:
        """Return the network layer by layer, so that loading needs no branch builders."""
        return {
            "network": keras.saving.serialize_keras_object(self.network),
            "heads": self.heads,
            "head_weights": self.head_weights,
            "blend": self.blends,
            "backbone": self.backbone,
            "text_backbone": self.text_backbone,
            "inference_views": self.inference_views,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict, custom_objects: Any = None) -> "FusionModel":
        """Return the untrained model that a config describes."""
        network = keras.saving.deserialize_keras_object(
            config["network"], custom_objects=custom_objects
        )
        return cls(**{**config, "network": network})

    def get_build_config(self) -> None:
        """Return None, because the constructor builds the model."""


def build_model(
    spec: ModelSpec,
    statistics: NumericStatistics | None,
    shape_image: Shape | None,
    shape_numeric: Shape | None = None,
    vocabularies: Sequence[Vocabulary] = (),
    shape_features: Shape | None = None,
    image_optional: bool = False,
    text: TextShape | None = None,
) -> FusionModel:
    """Return the uncompiled model that a spec describes.

    Args:
        spec: Branches, fusion and regularization.
        statistics: Statistics of the training split's numbers, or None to use numbers unchanged.
        shape_image: (H, W, 3), or (N, H, W, 3) for several images per row.
        shape_numeric: (columns,); by default, the number of columns in `statistics`.
        vocabularies: Vocabularies of the categorical columns.
        shape_features: (V, F) of precomputed backbone features, or (N, V, F); the model then takes
            these in place of images. With a fusion that uses tokens, (V, 1 + T, F) or
            (N, V, 1 + T, F): the pooled features, then those of each token.
        image_optional: Whether rows may lack all images; requires the shape of several images,
            such as (1, H, W, 3), and another branch.
        text: Shape of the texts, or None without texts.

    Raises:
        ValueError: If the shapes do not match, the backbone does not support them, a branch has no
            input, rows may lack their images but there is no other branch, or images to rotate are
            not square.
        OSError: If weights cannot be downloaded or read.
    """
    blocks = BlockBuilder(spec)
    inputs: dict[str, Any] = {}
    branches: dict[str, dict] = {}
    backbone: list[str] = []
    if spec.image.kind != "none":
        if spec.image.inference_views == 8 and shape_image and shape_image[-3] != shape_image[-2]:
            raise ValueError(
                f"model.image.inference_views=8 rotates images, but those of shape "
                f"{tuple(shape_image)} are not square; set it to 4"
            )
        branches["image"], backbone = build_image_branch(
            inputs, spec, shape_image, shape_features, blocks
        )
    if spec.numeric.kind != "none":
        branches["numeric"] = build_numeric_branch(
            inputs, spec, statistics, shape_numeric, vocabularies, blocks
        )
    text_backbone: list[str] = []
    if spec.text.kind != "none" and text is not None:
        branches["text"], text_backbone = build_text_branch(inputs, spec, text, blocks)
    optional = image_optional and "image" in branches
    if optional and not ("image_mask" in inputs and len(branches) > 1):
        raise ValueError(
            "rows without an image need another branch and an image shape such as (1, H, W, 3)"
        )
    logits = {
        name: blocks.logit(branch["pooled"], f"{name}_head") for name, branch in branches.items()
    }
    mask = [inputs["image_mask"]] if optional else []
    if len(branches) > 1:
        joint = _joint_features(branches, spec, blocks, mask)
        logits["joint"] = blocks.logit(joint, "joint_head")
    if optional:
        choose = JointWithoutImage(name="image_vote", dtype="float32")
        logits["image"] = choose([logits["image"], logits["joint"], *mask])
    heads, logits_M = list(logits), list(logits.values())
    logits_BM = layers.Concatenate(name="heads")(logits_M) if len(heads) > 1 else logits_M[0]
    # A single head is the output itself, which has the main loss already.
    auxiliary = spec.fusion.auxiliary_weight if len(heads) > 1 else 0.0
    return FusionModel(
        keras.Model(inputs, logits_BM, name="network"),
        heads=heads,
        head_weights=[auxiliary] * len(heads),
        blend=spec.fusion.blend,
        backbone=backbone,
        text_backbone=text_backbone,
        inference_views=spec.image.inference_views,
        name="fusion_model",
    )


def create_model(
    input_shape_image: Shape,
    input_shape_numeric: Shape,
    numeric_statistics: NumericStatistics | None = None,
    *,
    vocabularies: Sequence[Vocabulary] = (),
    text: TextShape | None = None,
    learning_rate: float = OptimizerSpec().learning_rate,
    **options: Any,
) -> FusionModel:
    """Return a compiled model for `fit` on arrays in one process.

    Args:
        input_shape_image: Height, width and channels, such as (456, 456, 3); for several images per
            row, their number comes first, such as (4, 456, 456, 3).
        input_shape_numeric: Number of columns, such as (12,); (0,) for categories only.
        numeric_statistics: `fit_numeric_statistics(X_numeric_of_the_training_rows)`; without them,
            numbers are neither imputed, scaled nor encoded.
        vocabularies: `fit_vocabulary(texts_of_the_training_rows, column)` of each categorical
            column; the input `category` is `np.stack([v.codes(texts[v.column]) for v in
            vocabularies], axis=1)`.
        text: Number of text columns, tokens per text, and token ids.
        learning_rate: Learning rate of Adam.
        **options: Fields of `ModelSpec`; nested ones are dicts, such as
            `image={"kind": "resnet50", "weights": None}`, `dropout=0.5`, `l2=0`.

    Raises:
        ValueError: If an option or a shape is invalid (including `pydantic.ValidationError`).
        OSError: If weights cannot be downloaded or read.
    """
    spec = ModelSpec.model_validate(options)
    model = build_model(
        spec,
        numeric_statistics,
        input_shape_image,
        input_shape_numeric,
        vocabularies,
        text=text,
    )
    model.compile(
        optimizer=make_optimizer(OptimizerSpec(learning_rate=learning_rate, schedule="constant")),
        loss="binary_crossentropy",
        metrics=["accuracy", keras.metrics.AUC(name="auc")],
        # XLA needs minutes to compile a large backbone, and compiles it again for an epoch's last,
        # smaller batch.
        jit_compile=cast(Any, False),
    )
    # Otherwise `fit` creates the variables in the graph, which makes tracing 25 % slower.
    model.optimizer.build(model.trainable_variables)
    return model


def backbone_model(model: FusionModel, with_tokens: bool = False) -> keras.Model:
    """Return the part of a model from images (B, H, W, 3) to pooled backbone features (B, F).

    With tokens, its output is (B, 1 + T, F): the pooled features, then those of each token.

    It shares the model's layers. Called with `training=True`, it augments the images; its batch
    norms keep their statistics only if the backbone was built frozen.

    Raises:
        ValueError: If the model takes no images, or its image branch has no layer `image_pool`.
    """
    network: Any = model.network
    if "image" not in network.input:
        raise ValueError(f"a model with inputs {model.input_names} has no image backbone")
    pooled = [layer.output for layer in network.layers if layer.name == IMAGE_POOL]
    if not pooled:
        raise ValueError(
            f"the image branch has no layer {IMAGE_POOL!r}; give this name to the layer that pools "
            "its backbone"
        )
    start = network.input["image"]
    if "image_mask" in network.input:
        start = network.get_layer(IMAGE_FOLD).output
    features: Any = pooled[0]
    if with_tokens:
        tokens = network.get_layer(IMAGE_TOKENS).output
        features = ops.concatenate([ops.expand_dims(features, 1), tokens], axis=1)
    return keras.Model(start, features, name="image_backbone")


def _joint_features(
    branches: dict[str, dict], spec: ModelSpec, blocks: BlockBuilder, mask: list[KerasTensor]
) -> KerasTensor:
    rate = spec.fusion.modality_dropout

    def hide(tensors: list[KerasTensor]) -> list[KerasTensor]:
        if not rate:
            return tensors
        dropout = ModalityDropout(rate, len(tensors), name="modality_dropout")
        return list(dropout([*tensors, *mask]))

    return load_builder(FUSIONS[spec.fusion.kind])(branches, hide, spec.fusion, blocks)


def _views(images: Any, count: int) -> list[Any]:
    """Return mirrored and rotated views of images (…, H, W, 3), of which the first is unchanged."""
    views = [images]
    for num_views, view in (
        (2, lambda x: ops.flip(x, axis=-2)),
        (4, lambda x: ops.flip(x, axis=-3)),
        (8, lambda x: ops.swapaxes(x, -3, -2)),
    ):
        if count >= num_views:
            views += [view(x) for x in views]
    return views


def _stacked_blocks(layer: layers.Layer) -> list[layers.Layer]:
    """Return the parts of a layer that is a stack of blocks, such as a transformer encoder."""
    parts = child_layers(layer)
    blocks = Counter(type(part) for part in parts if child_layers(part))
    return parts if max(blocks.values(), default=0) > 1 else []
