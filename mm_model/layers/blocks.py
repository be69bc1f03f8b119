"""Serialisable building blocks of the fusion model.

Shapes: B rows, N images a row, V views, T tokens, F features, M heads, H × W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import KerasTensor, layers, ops

from mm_model import per_row_random
from mm_model.spec import ModelSpec
from mm_model.tunable import Tunable, current_value

register = keras.saving.register_keras_serializable(package="mm_model")


@dataclass(frozen=True)
class Blocks:
    """Makes the blocks of one model: all have its activation, dropout, L2 and batch norm."""

    activation: str
    dropout: float
    l2: float
    synchronized: bool

    @classmethod
    def of(cls, spec: ModelSpec) -> "Blocks":
        """Return the blocks that a spec asks for."""
        return cls(spec.activation, spec.dropout, spec.l2, spec.batch_norm == "sync")

    def dense(self, x_BF: KerasTensor, units: int, name: str, skip: bool = False) -> KerasTensor:
        """Dense, batch norm, activation, dropout.

        With `skip` the input is added, projected if needed. The dense layer has no bias: batch norm
        would take it away again.
        """
        y_BF = self.kernel(x_BF, units, f"{name}_dense")
        y_BF = self.batch_norm(f"{name}_bn")(y_BF)
        y_BF = layers.Activation(self.activation, name=f"{name}_activation")(y_BF)
        y_BF = RowDropout(self.dropout, name=f"{name}_dropout")(y_BF)
        if not skip:
            return y_BF
        if x_BF.shape[-1] != units:
            x_BF = self.kernel(x_BF, units, f"{name}_skip")
        return layers.Add(name=f"{name}_add")([x_BF, y_BF])

    def kernel(self, x_BF: KerasTensor, units: int, name: str) -> KerasTensor:
        """Return a linear map without bias."""
        return layers.Dense(units, use_bias=False, kernel_regularizer=penalty(self.l2), name=name)(
            x_BF
        )

    def batch_norm(self, name: str) -> layers.Layer:
        """Return a batch-norm layer, synchronised only where the spec asks for it."""
        if self.synchronized:
            return SynchronizedBatchNormalization(synchronized=True, name=name)
        return layers.BatchNormalization(name=name)

    def logit(self, x_BF: KerasTensor, name: str) -> KerasTensor:
        """Return one logit a row, starting at the same for every row."""
        return layers.Dense(1, kernel_initializer="zeros", name=name, dtype="float32")(x_BF)


def penalty(l2: float) -> keras.Regularizer | None:
    """Return the L2 penalty of a kernel; none for 0."""
    if isinstance(l2, Tunable):
        return _TunableL2(l2)
    return keras.regularizers.L2(l2) if l2 else None


class _TunableL2(keras.regularizers.Regularizer):
    """Keras' L2 penalty with a tunable for its factor."""

    def __init__(self, tunable: Tunable) -> None:
        self.tunable = tunable

    def __call__(self, x: Any) -> Any:
        """Return the penalty of a kernel."""
        return current_value(self.tunable, x) * ops.sum(ops.square(x))


@register
class RowDropout(layers.Dropout):
    """Dropout whose draws for a row do not depend on how many replicas share the batch.

    Takes what `keras.layers.Dropout` takes and, with one replica, drops what that drops; draws are
    float32 under mixed precision too, where few bits would drop another share than `rate`. A
    `noise_shape` whose first entry is 1 drops the same of every row, on every replica.
    """

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Drop while training."""
        if not training or not self.rate:
            return inputs
        if self.rate == 1:
            return ops.zeros_like(inputs)
        given = self.noise_shape or (None,) * len(inputs.shape)
        of_inputs: Any = ops.shape(inputs)
        shape = [n if size is None else size for size, n in zip(given, of_inputs, strict=True)]
        if given[0] == 1:
            draw: Any = keras.random.uniform(shape, dtype="float32", seed=self.seed_generator)
        else:
            draw = per_row_random.uniform(shape, self.seed_generator)
        scale = 1 / (1 - current_value(self.rate))
        if isinstance(self.rate, Tunable):
            scale = ops.cast(scale, inputs.dtype)
        return ops.where(draw >= current_value(self.rate), inputs * scale, 0)


@register
class SynchronizedBatchNormalization(layers.BatchNormalization):
    """Batch norm by statistics of the global batch, to float32's last bits.

    Keras takes the variance as E[x²] - E[x]². Where the mean is large beside the deviation, little
    is left of its digits, and what is left depends on the number of replicas. Here the mean
    of all replicas' own means is taken off first, at the price of one more pass for these and one
    more exchange of a few numbers a channel.
    """

    def _moments(self, inputs: Any, mask: Any) -> Any:
        if mask is not None:
            return super()._moments(inputs, mask)
        axes: Any = self._reduction_axes
        moments: Any = ops.moments
        own: Any = ops.mean(inputs, axes, keepdims=True)
        near, _ = moments(own, axes, keepdims=True, synchronized=True)
        # A constant to the gradient, which by the rest is that of mean and variance.
        shift = ops.stop_gradient(near)
        mean, variance = moments(inputs - shift, axes, synchronized=True)
        return mean + ops.squeeze(shift, axes), variance


@register
class FoldImages(layers.Layer):
    """Several images a row to a batch of images, so that one branch looks at all of them.

    A missing image is replaced by the first of its row that is there, and left out again by
    `UnfoldImages`. What a missing image holds (black, as a rule) is like no photo: in training it
    would move the batch-norm statistics by which the real ones are scaled.

    Features that were computed before, (V, F) of an image, are folded likewise.

    Input: images (B, N, H, W, 3), mask (B, N), 0 where one is missing.  Output: (B × N, H, W, 3).
    """

    def __init__(self, **kwargs: Any) -> None:
        # Half precision holds no fraction of a pixel of 255.
        super().__init__(autocast=False, **kwargs)

    def call(self, images_and_mask: Any) -> Any:
        """Replace what is missing and fold."""
        images_BNHWC, mask_BN = images_and_mask
        num_images, *image_shape = images_BNHWC.shape[1:]
        there_BN = mask_BN > 0
        first_B1 = ops.argmax(ops.cast(there_BN, "int32"), axis=1, keepdims=True)
        chosen_BN: Any = ops.where(there_BN, ops.arange(num_images, dtype="int32"), first_B1)
        shape: Any = ops.shape(mask_BN)
        start_B1: Any = ops.expand_dims(ops.arange(shape[0], dtype="int32") * num_images, 1)
        folded = ops.reshape(images_BNHWC, (-1, *image_shape))
        return ops.take(folded, ops.reshape(start_B1 + chosen_BN, (-1,)), axis=0)

    def compute_output_shape(self, input_shape):
        """Return (B × N, H, W, 3)."""
        rows, num_images, *image_shape = input_shape[0]
        return (None if rows is None else rows * num_images, *image_shape)


@register
class UnfoldImages(layers.Layer):
    """Features of single images to features of rows.

    The pooled features of a row are the mean of those of its images that are there (zeros where
    none is), which neither their order nor a missing one changes; its tokens are all of theirs,
    zeros where an image is missing.

    Input: pooled (B × N, F), tokens (B × N, T, G), mask (B, N).
    Output: pooled (B, F), tokens (B, N × T, G).
    """

    def call(self, features_and_mask: Any) -> Any:
        """Unfold and pool."""
        pooled, tokens, mask_BN = features_and_mask
        num_images = mask_BN.shape[1]
        num_tokens, width = tokens.shape[1:]
        there_BN1: Any = ops.expand_dims(ops.cast(mask_BN > 0, pooled.dtype), 2)
        pooled_BNF: Any = ops.reshape(pooled, (-1, num_images, pooled.shape[-1]))
        sum_BF: Any = ops.sum(pooled_BNF * there_BN1, axis=1)
        pooled_BF = sum_BF / ops.maximum(ops.sum(there_BN1, axis=1), 1)
        tokens_BNX: Any = ops.reshape(tokens, (-1, num_images, num_tokens * width))
        tokens_BNX = tokens_BNX * ops.cast(there_BN1, tokens.dtype)
        return pooled_BF, ops.reshape(tokens_BNX, (-1, num_images * num_tokens, width))

    def compute_output_shape(self, input_shape):
        """Return (B, F) and (B, N × T, G)."""
        pooled, tokens, (rows, num_images) = input_shape
        return (rows, pooled[-1]), (rows, num_images * tokens[1], tokens[2])


@register
class PickView(layers.Layer):
    """The features of one view of each image, of several that were computed before.

    Inference takes the first, of the image as it is; training draws one of the others, which are of
    augmented images, for each image anew. Where there is one view alone, nothing is drawn.

    Input: (B, V, F).  Output: (B, F).
    """

    def __init__(self, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, features_BVF: Any, training: bool = False) -> Any:
        """Pick a view."""
        num_views, width = features_BVF.shape[1:]
        if not training or num_views == 1:
            return features_BVF[:, 0]
        shape: Any = ops.shape(features_BVF)
        draw_B: Any = per_row_random.uniform(
            (shape[0],), self.seed_generator, 1.0, float(num_views)
        )
        drawn_B: Any = ops.cast(ops.floor(draw_B), "int32")
        # What is drawn below the end may be rounded to it.
        view_B: Any = ops.minimum(drawn_B, num_views - 1)
        start_B: Any = ops.arange(shape[0], dtype="int32") * num_views
        return ops.take(ops.reshape(features_BVF, (-1, width)), start_B + view_B, axis=0)

    def compute_output_shape(self, input_shape):
        """Return (B, F)."""
        return (input_shape[0], input_shape[2])


@register
class ModalityDropout(layers.Layer):
    """Hides a whole branch from the joint network for a random share of the training rows.

    Draws one number a row: below `rate` / 2 the first branch is hidden, above 1 - `rate` / 2 the
    second, never both (ModDrop: Neverova et al. 2016, arXiv 1501.00102).

    Input: two tensors (B, F1), (B, F2).  Output: the same two.
    """

    def __init__(self, rate: float, seed: int | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.rate = rate
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, features: Any, training: bool = False) -> Any:
        """Hide branches while training."""
        first_BF, second_BF = features
        if not training or not self.rate:
            return first_BF, second_BF
        shape: Any = ops.shape(first_BF)
        draw_B1: Any = per_row_random.uniform((shape[0], 1), self.seed_generator)
        half = current_value(self.rate) / 2
        keep_first_B1 = ops.cast(draw_B1 >= half, first_BF.dtype)
        keep_second_B1 = ops.cast(draw_B1 < 1 - half, second_BF.dtype)
        return first_BF * keep_first_B1, second_BF * keep_second_B1

    def compute_output_shape(self, input_shape):
        """Return the shapes unchanged."""
        return input_shape[0], input_shape[1]

    def get_config(self) -> dict:
        """Return the rate."""
        return {**super().get_config(), "rate": self.rate}


@register
class AffineLogit(layers.Layer):
    """A weighted sum of logits plus a bias, fitted on the validation split, never by gradients.

    It serves as the blend of the heads (M logits, weights that sum to one, no bias) and as the
    calibration of their result (one logit, Platt's scale and bias).

    Input: (B, M).  Output: (B, 1).
    """

    def __init__(self, weights: list[float], **kwargs) -> None:
        super().__init__(trainable=False, dtype="float32", **kwargs)
        self.initial = [float(w) for w in weights]

    def build(self, input_shape):
        """Create weights and bias."""
        self.scale_M1 = self.add_weight(
            shape=(len(self.initial), 1), name="scale", initializer="zeros", trainable=False
        )
        self.scale_M1.assign(np.asarray(self.initial, np.float32)[:, None])
        self.bias = self.add_weight(shape=(), name="bias", initializer="zeros", trainable=False)

    def call(self, logits_BM: Any) -> Any:
        """Weigh and add."""
        # Spelled as a sum, since a matmul may run in bf16 or TF32 on GPUs.
        return ops.sum(logits_BM * self.scale_M1[:, 0], axis=1, keepdims=True) + self.bias

    def set(self, weights: Sequence[float] | np.ndarray, bias: float = 0.0) -> None:
        """Replace weights and bias."""
        self.scale_M1.assign(np.asarray(weights, np.float32)[:, None])
        self.bias.assign(np.float32(bias))

    def weights_M(self) -> np.ndarray:
        """Return the weights as float64."""
        return np.asarray(self.scale_M1, np.float64)[:, 0]

    def get_config(self) -> dict:
        """Return the weights it starts from."""
        return {**super().get_config(), "weights": self.initial}

    @classmethod
    def from_config(cls, config: dict) -> "AffineLogit":
        """Make it again; `trainable` and `dtype` are always the same."""
        return cls(**{k: v for k, v in config.items() if k not in ("trainable", "dtype")})
