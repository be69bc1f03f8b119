"""What the model is made of, as data: every setting once, with its type, default and help text.

Imports neither Keras nor TensorFlow, so that `--help` and the cluster's head stay light.
"""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from mm_model.branches import IMAGE_BRANCHES, NUMERIC_BRANCHES, has_imagenet_weights
from mm_model.fusion import FUSIONS
from mm_model.nearest_match import require_one_of

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]


class Spec(BaseModel):
    """A frozen section of settings that refuses unknown keys; attribute docstrings are the help."""

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
        """Read the word `none` as no value, in YAML and flags alike, where a field allows that."""
        if not isinstance(values, dict):
            return values
        optional = {n for n, f in cls.model_fields.items() if type(None) in get_args(f.annotation)}
        none = ("none", "null")
        return {k: None if k in optional and v in none else v for k, v in values.items()}


class ImageSpec(Spec):
    """The image branch."""

    kind: str = "efficientnet_b5"
    """Backbone, a key of `mm_model.branches.IMAGE_BRANCHES`; `none` leaves images out."""
    weights: str | None = "imagenet"
    """Start of the backbone: `imagenet`, a path or URI of a `.weights.h5` file, or `none`."""
    trainable: bool = True
    """Whether the backbone learns; a frozen one also keeps its batch-norm statistics."""
    units: PositiveInt = 256
    """Width of the dense layer above the pooled backbone."""

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, value: str) -> str:
        return require_one_of(value, ("none", *IMAGE_BRANCHES), "image branch")

    @model_validator(mode="after")
    def _kind_has_these_weights(self) -> "ImageSpec":
        if self.weights == "imagenet" and self.kind not in ("none", *has_imagenet_weights()):
            raise ValueError(
                f"image branch {self.kind!r} has no imagenet weights; "
                "set weights to none or to a file"
            )
        return self


class AugmentationSpec(Spec):
    """Random changes of the training images, drawn on the device; never at inference."""

    flip: Literal["none", "horizontal", "vertical", "horizontal_and_vertical"] = "horizontal"
    """Mirror at random along these axes."""
    rotation: Fraction = 0.05
    """Largest rotation to either side, as a share of a full turn."""
    zoom: Fraction = 0.1
    """Largest zoom in or out, as a share of the image."""
    translation: Fraction = 0.1
    """Largest shift in both directions, as a share of the image."""
    contrast: Fraction = 0.2
    """Largest relative change of contrast."""
    brightness: Fraction = 0.2
    """Largest shift of brightness, as a share of the 0-255 range."""
    rand_augment: Fraction = 0.0
    """Magnitude of RandAugment's two further operations an image; 0 leaves them out."""


NO_AUGMENTATION = AugmentationSpec(
    flip="none", rotation=0, zoom=0, translation=0, contrast=0, brightness=0
)


class NumericSpec(Spec):
    """The numeric branch: numbers and categories."""

    kind: str = "mlp"
    """Network over the encoded numbers and categories, a key of `NUMERIC_BRANCHES`; `none` leaves
    both out."""
    encoding: Literal["piecewise_linear", "standard"] = "piecewise_linear"
    """How numbers enter: standardised, or standardised and piecewise-linear over quantiles."""
    bins: Annotated[int, Field(ge=2, le=1023)] = 32
    """Most bins a column, between quantiles of the training split."""
    category_dropout: Fraction = 0.05
    """Chance that a category of a training row is hidden: taken for unknown or, as often, missing,
    so that the model knows what to make of either where training has none."""
    units: tuple[PositiveInt, ...] = (256, 128)
    """Width of each hidden layer."""

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, value: str) -> str:
        return require_one_of(value, ("none", *NUMERIC_BRANCHES), "numeric branch")


class FusionSpec(Spec):
    """How the two branches become one logit."""

    kind: str = "gated"
    """Joint network over both branches, a key of `mm_model.fusion.FUSIONS`."""
    units: PositiveInt = 128
    """Width of the joint network."""
    auxiliary_weight: NonNegative = 1.0
    """Weight of each branch's own loss, which keeps it able to stand alone."""
    modality_dropout: Fraction = 0.1
    """Chance that a training row reaches the joint network without its image, or its numbers."""
    blend: bool = True
    """Let branch heads and joint head vote, weighted as the validation split shows; else joint
    alone."""

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, value: str) -> str:
        return require_one_of(value, tuple(FUSIONS), "fusion")


class ModelSpec(Spec):
    """The fusion model: image branch, numeric branch, fusion, head."""

    image: ImageSpec = ImageSpec()
    augmentation: AugmentationSpec = AugmentationSpec()
    numeric: NumericSpec = NumericSpec()
    fusion: FusionSpec = FusionSpec()
    activation: Literal["relu", "silu", "gelu"] = "relu"
    """Of every dense block and of the image branch `tiny`. With a smooth one, runs on different
    numbers of workers stay alike for longer: ReLU's kink makes rounding grow."""
    dropout: Fraction = 0.3
    """Dropout rate of every dense block."""
    l2: NonNegative = 1e-3
    """L2 penalty on the kernels of the dense layers."""
    batch_norm: Literal["local", "sync"] = "local"
    """Batch statistics of each replica's rows, or of the global batch (more exchanges a step); with
    `train.accumulate_steps`, of one part of them."""

    @model_validator(mode="after")
    def _something_enters(self) -> "ModelSpec":
        if self.image.kind == "none" and self.numeric.kind == "none":
            raise ValueError("image.kind and numeric.kind are both none; the model needs one")
        return self


class OptimizerSpec(Spec):
    """The optimizer and its learning rate over time."""

    optimizer: Literal["adam", "adamw", "sgd", "lamb"] = "adam"
    """Adam; with decoupled weight decay; SGD with Nesterov momentum; or LAMB, for large batches."""
    learning_rate: Positive = 1e-4
    """Peak learning rate."""
    weight_decay: NonNegative = 0.01
    """Decoupled decay of `adamw` and `lamb`, of kernels alone."""
    momentum: Fraction = 0.9
    """Momentum of `sgd`."""
    schedule: Literal["constant", "cosine", "exponential", "polynomial", "plateau"] = "cosine"
    """Learning rate over time: constant; warm-up, then cosine, exponential or polynomial decay; or
    less at a plateau."""
    warmup_fraction: Fraction = 0.05
    """Share of all steps in which a decaying schedule first climbs to the peak."""
    end_fraction: Fraction | None = None
    """What a decaying schedule leaves of the peak in the end; by default 0, of an exponential one
    0.01."""
    power: Positive = 1.0
    """Exponent of the polynomial schedule; 1 is a straight line."""
    plateau_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    """What the plateau schedule multiplies the learning rate by."""
    plateau_patience: PositiveInt = 3
    """Epochs without a better validation metric before the plateau schedule acts."""
    ema_momentum: Fraction | None = None
    """Validate and keep an exponential moving average of the weights, such as 0.999; its
    momentum."""

    @model_validator(mode="after")
    def _exponential_ends_above_zero(self) -> Self:
        if self.schedule == "exponential" and self.end_fraction == 0:
            raise ValueError("schedule=exponential never reaches 0; set end_fraction above it")
        return self


class LossSpec(Spec):
    """What training minimises, beside the L2 penalty of the model."""

    loss: Literal["binary_crossentropy", "focal"] = "binary_crossentropy"
    """Loss of the output and of each head; focal counts rows that are easy less."""
    focal_gamma: NonNegative = 2.0
    """How much less the focal loss counts them; 0 is cross-entropy."""
    label_smoothing: Fraction = 0.0
    """Share by which labels are drawn to one half."""
    mixup_alpha: NonNegative = 0.0
    """Mix pairs of rows, images and numbers alike, by shares from Beta(alpha, alpha); 0: do not.
    Pairs are of one replica, so that what is learnt depends on their number."""
    cutmix_alpha: NonNegative = 0.0
    """Put a box of another row's image in, its area from Beta(alpha, alpha), and mix the labels
    likewise; 0: do not. With `mixup_alpha`, too, each step does one of them."""


class StageSpec(Spec):
    """Some epochs in which a part of the backbone stands still."""

    epochs: PositiveInt
    """Epochs of the stage; the last stage lasts to the end of the training."""
    backbone: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Share of the backbone's layers, from the top, that learn; the others are frozen, with their
    batch norms."""
    backbone_rate: Positive = 1.0
    """Learning rate of the backbone, as a multiple of the others'."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Multiplies the backbone's rate once more from its top to its bottom, in equal ratios."""
