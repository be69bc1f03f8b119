"""Losses of a probability or its logit: cross-entropy and focal loss.

Labels may be any number from 0 to 1. Both losses are linear in the label, so the loss of a mixed
label is the mixed loss of the labels.
"""

from typing import Any

import keras
from keras import ops

from mm_model.compat_keras import logits_of_probability
from mm_model.spec import LossSpec


def make_loss(spec: LossSpec, from_logits: bool = False) -> keras.losses.Loss:
    """Return the loss of a spec, for probabilities or, with `from_logits`, for logits."""
    smoothing = spec.label_smoothing
    if spec.loss == "focal":
        return FocalLoss(spec.focal_gamma, from_logits=from_logits, label_smoothing=smoothing)
    return keras.losses.BinaryCrossentropy(from_logits=from_logits, label_smoothing=smoothing)


def loss_from_logits(loss: Any) -> keras.losses.Loss:
    """Return the same loss computed from logits.

    Args:
        loss: Loss of probabilities, or its name.

    Raises:
        ValueError: If the loss cannot be computed from logits.
    """
    if loss in ("binary_crossentropy", "bce"):
        # Keras resolves these names to a function, which has no config.
        loss = keras.losses.BinaryCrossentropy()
    resolved: Any = keras.losses.get(loss)
    config = resolved.get_config() if isinstance(resolved, keras.losses.Loss) else {}
    if "from_logits" not in config:
        raise ValueError(
            f"loss={loss!r} cannot be computed from logits, which the loss of each head requires; "
            "compile with binary_crossentropy or a loss from make_loss"
        )
    return type(resolved).from_config({**config, "from_logits": True})


@keras.saving.register_keras_serializable("mm_model")
class FocalLoss(keras.losses.Loss):
    """Focal loss (Lin et al. 2017, arXiv 1708.02002, equation 4) without class weights.

    For the probability p of a label y:

        y × (1 - p)^gamma × -log(p)  +  (1 - y) × p^gamma × -log(1 - p)

    If y is 0 or 1, this is the paper's loss; if gamma is 0, it is cross-entropy. Unlike Keras'
    BinaryFocalCrossentropy, it is linear in y, as mixed and smoothed labels require. It is computed
    from the logit, also for a probability from `keras.activations.sigmoid`, so that neither the
    loss nor its gradient overflows.

    Args:
        gamma: Focusing parameter; the higher it is, the less confidently classified rows count.
        from_logits: Whether predictions are logits.
        label_smoothing: Fraction by which labels are moved toward 0.5.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        name: str = "focal_loss",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.gamma, self.from_logits = gamma, from_logits
        self.label_smoothing = label_smoothing

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each row; labels are (N, 1) or, as Keras' own losses allow, (N,)."""
        if len(y_true.shape) < len(y_pred.shape):
            y_true = ops.expand_dims(y_true, -1)
        y = y_true * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing
        logit = y_pred if self.from_logits else logits_of_probability(y_pred)
        positive: Any
        negative: Any
        if logit is not None:
            positive, negative = ops.softplus(-logit), ops.softplus(logit)
        else:
            epsilon = keras.config.epsilon()
            p: Any = ops.clip(y_pred, epsilon, 1.0 - epsilon)
            positive, negative = ops.log(1.0 / p), ops.log(1.0 / (1.0 - p))
        # 1 - p is exp(-negative), whose powers have a finite gradient at 0.
        loss = y * positive * ops.exp(-self.gamma * negative)
        loss += (1.0 - y) * negative * ops.exp(-self.gamma * positive)
        return ops.mean(loss, axis=-1)

    def get_config(self) -> dict:
        """Return the settings."""
        config = {
            "gamma": self.gamma,
            "from_logits": self.from_logits,
            "label_smoothing": self.label_smoothing,
        }
        return {**super().get_config(), **config}
