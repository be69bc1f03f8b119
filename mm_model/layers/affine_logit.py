"""Weighted sum of logits, whose weights are fitted on the validation split.

Shapes: B rows, M logits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import layers, ops


class AffineLogit(layers.Layer):
    """Computes a weighted sum of logits plus a bias; gradients change neither weights nor bias.

    `FusionModel` uses one to blend its heads (M logits, weights that sum to one, no bias) and one
    to calibrate the result (one logit, Platt's scale and bias).

    Input: (B, M).  Output: (B, 1).
    """

    def __init__(self, weights: list[float], **kwargs) -> None:
        super().__init__(**{**kwargs, "trainable": False, "dtype": "float32"})
        self.initial = [float(w) for w in weights]

    def build(self, input_shape):
        """Create the weights and the bias."""
        self.scale_M1 = self.add_weight(
            shape=(len(self.initial), 1), name="scale", initializer="zeros", trainable=False
        )
        self.bias = self.add_weight(shape=(), name="bias", initializer="zeros", trainable=False)
        self.set(self.initial)

    def call(self, logits_BM: Any) -> Any:
        """Return the weighted sum plus the bias."""
        # Not a matmul, which GPUs may compute in bf16 or TF32.
        return ops.sum(logits_BM * self.scale_M1[:, 0], axis=1, keepdims=True) + self.bias

    def set(self, weights: Sequence[float] | np.ndarray, bias: float = 0.0) -> None:
        """Replace the weights and the bias."""
        self.scale_M1.assign(np.asarray(weights, np.float32)[:, None])
        self.bias.assign(np.float32(bias))

    def weights_M(self) -> np.ndarray:
        """Return the weights as float64."""
        return np.asarray(self.scale_M1, np.float64)[:, 0]
