"""Settings of model, optimizer and loss, each with its type, default and help text.

Imports neither Keras nor TensorFlow, so `--help` and the head of a cluster start quickly.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    model_validator,
)

from mm_model.branches import IMAGE_BRANCHES, KERAS_APPLICATIONS, NUMERIC_BRANCHES
from mm_model.fusion import FUSIONS
from mm_model.nearest_match import require_one_of

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]


def _key_of(registry: Mapping[str, Any], what: str, *extra: str) -> AfterValidator:
    """Return a validator of a registry's keys, which may be added later."""
    return AfterValidator(lambda value: require_one_of(value, (*extra, *registry), what))


class Spec(BaseModel):
    """A frozen section of settings that rejects unknown keys; attribute docstrings are the help."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _none_by_name(cls, values: Any) -> Any:
        """Read `none` as None in optional fields, in YAML and flags alike."""
        if not isinstance(values, dict):
            return values
        optional = {n for n, f in cls.model_fields.items() if type(None) in get_args(f.annotation)}
        none = ("none", "null")
        return {k: None if k in optional and v in none else v for k, v in values.items()}


class ImageSpec(Spec):
    """The image branch."""

    kind: Annotated[str, _key_of(IMAGE_BRANCHES, "image branch", "none")] = "efficientnet_b5"
    """Backbone, a key of `mm_model.branches.IMAGE_BRANCHES`; `none` ignores images."""
    weights: str | None = "imagenet"
    """Initial weights of the backbone: `imagenet`, the path or URI of a `.weights.h5` file, or
    `none`."""
    trainable: bool = True
    """Whether to train the backbone; a frozen one also keeps its batch-norm statistics."""
    units: PositiveInt = 256
    """Width of the dense layer on the pooled backbone."""

    @model_validator(mode="after")
    def _imagenet_weights_exist(self) -> Self:
        if self.weights == "imagenet" and self.kind not in ("none", *KERAS_APPLICATIONS):
            raise ValueError(
                f"image branch {self.kind!r} has no imagenet weights; "
                "set weights to none or to a file"
            )
        return self


class AugmentationSpec(Spec):
    """Random changes of the training images on the training device; none at inference."""

    flip: Literal["none", "horizontal", "vertical", "horizontal_and_vertical"] = "horizontal"
    """Axes along which images are randomly flipped."""
    rotation: Fraction = 0.05
    """Largest rotation in either direction, as a share of a full turn."""
    zoom: Fraction = 0.1
    """Largest zoom in or out, as a share of the image."""
    translation: Fraction = 0.1
    """Largest shift along each axis, as a share of the image."""
    contrast: Fraction = 0.2
    """Largest relative change of contrast."""
    brightness: Fraction = 0.2
    """Largest shift of brightness, as a share of the 0-255 range."""
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
    """Encoding of numbers: standardized, or also piecewise linear between quantiles."""
    bins: Annotated[int, Field(ge=2, le=1023)] = 32
    """Largest number of bins per column, between quantiles of the training split."""
    category_dropout: Fraction = 0.05
    """Probability that a category of a training row is replaced by unknown or, equally often, by
    missing; prepares the model for both if training has none."""
    units: tuple[PositiveInt, ...] = (256, 128)
    """Width of each hidden layer."""


class FusionSpec(Spec):
    """The fusion of the two branches."""

    kind: Annotated[str, _key_of(FUSIONS, "fusion")] = "gated"
    """Joint network over both branches, a key of `mm_model.fusion.FUSIONS`."""
    units: PositiveInt = 128
    """Width of the joint network."""
    auxiliary_weight: NonNegative = 1.0
    """Weight of each branch's own loss, so that it can predict alone."""
    modality_dropout: Fraction = 0.1
    """Probability that the joint network gets a training row without its image, or its numbers."""
    blend: bool = True
    """Whether to average the heads of branches and fusion, with weights fitted on the validation
    split; otherwise uses the fusion's head alone."""


class ModelSpec(Spec):
    """The fusion model: image branch, numeric branch, fusion, head."""

    image: ImageSpec = ImageSpec()
    augmentation: AugmentationSpec = AugmentationSpec()
    numeric: NumericSpec = NumericSpec()
    fusion: FusionSpec = FusionSpec()
    activation: Literal["relu", "silu", "gelu"] = "relu"
    """Activation of every dense block and of the image branch `tiny`. With a smooth one, runs on
    different numbers of workers diverge later, because ReLU's kink amplifies rounding errors."""
    dropout: Fraction = 0.3
    """Dropout rate of every dense block."""
    l2: NonNegative = 1e-3
    """L2 penalty on the kernels of the dense layers."""
    batch_norm: Literal["local", "sync"] = "local"
    """Batch statistics of each replica's rows, or of the global batch (more communication); with
    `train.accumulate_steps`, of one part of these rows."""

    @model_validator(mode="after")
    def _at_least_one_branch(self) -> "ModelSpec":
        if self.image.kind == "none" and self.numeric.kind == "none":
            raise ValueError("image.kind and numeric.kind are both none; set at least one of them")
        return self


class OptimizerSpec(Spec):
    """The optimizer and its learning rate over time."""

    optimizer: Literal["adam", "adamw", "sgd", "lamb"] = "adam"
    """Adam, AdamW, SGD with Nesterov momentum, or LAMB for large batches."""
    learning_rate: Positive = 1e-4
    """Peak learning rate."""
    weight_decay: NonNegative = 0.01
    """Weight decay of `adamw` and `lamb`, of kernels only."""
    momentum: Fraction = 0.9
    """Momentum of `sgd`."""
    schedule: Literal["constant", "cosine", "exponential", "polynomial", "plateau"] = "cosine"
    """Learning rate over time: constant; warm-up, then cosine, exponential or polynomial decay; or
    reduced at a plateau."""
    warmup_fraction: Fraction = 0.05
    """Share of all steps in which a decaying schedule rises to the peak."""
    end_fraction: Fraction | None = None
    """Final learning rate of a decaying schedule, as a share of the peak; by default 0, or 0.01 for
    an exponential one."""
    power: Positive = 1.0
    """Exponent of the polynomial schedule; 1 is linear."""
    plateau_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    """Factor of the learning rate at a plateau."""
    plateau_patience: PositiveInt = 3
    """Epochs without a better validation metric before the learning rate is reduced."""
    ema_momentum: Fraction | None = None
    """Momentum of an exponential moving average of the weights, such as 0.999, which is then
    validated and saved; `none` disables it."""

    @model_validator(mode="after")
    def _exponential_ends_above_zero(self) -> Self:
        if self.schedule == "exponential" and self.end_fraction == 0:
            raise ValueError(
                "end_fraction=0 is impossible with schedule=exponential; set it above 0"
            )
        return self


class LossSpec(Spec):
    """The loss, to which training adds the L2 penalty of the model."""

    loss: Literal["binary_crossentropy", "focal"] = "binary_crossentropy"
    """Loss of the output and of each head; `focal` down-weights easy rows."""
    focal_gamma: NonNegative = 2.0
    """Strength of this down-weighting; 0 is cross-entropy."""
    label_smoothing: Fraction = 0.0
    """Share by which labels are moved toward one half."""
    mixup_alpha: NonNegative = 0.0
    """Mixup alpha: mixes pairs of rows, both images and numbers, by shares from Beta(alpha, alpha);
    0 disables it. Pairs are of one replica, so the result depends on the number of replicas."""
    cutmix_alpha: NonNegative = 0.0
    """CutMix alpha: pastes a box of another row's image, with an area from Beta(alpha, alpha), and
    mixes the labels accordingly; 0 disables it. If `mixup_alpha` is set too, each step uses one of
    both."""


class StageSpec(Spec):
    """A number of epochs in which a part of the backbone is frozen."""

    epochs: PositiveInt
    """Epochs of the stage; the last stage lasts to the end of the training."""
    backbone: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Share of the backbone's layers, from the top, to train; the others are frozen together with
    their batch norms."""
    backbone_rate: Positive = 1.0
    """Factor of the backbone's learning rate."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Additional factor at the bottom of the backbone; in between, it falls in equal ratios."""
