"""What training minimises: cross-entropy or focal loss of a probability or its logit.

Labels may be anything from 0 to 1; both losses are linear in them, so that the loss of a mixed
label is the mixed loss of the labels.
"""

from typing import Any

import keras
from keras import ops

from mm_model.layers.blocks import register
from mm_model.spec import LossSpec


def make_loss(spec: LossSpec, from_logits: bool = False) -> keras.losses.Loss:
    """Return the loss that a spec asks for; its mean is over the rows of the global batch.

    Args:
        spec: kind of loss and label smoothing.
        from_logits: whether predictions are logits, as a head's are, not probabilities.
    """
    smoothing = spec.label_smoothing
    if spec.loss == "focal":
        return FocalLoss(spec.focal_gamma, from_logits=from_logits, label_smoothing=smoothing)
    return keras.losses.BinaryCrossentropy(from_logits=from_logits, label_smoothing=smoothing)


def of_logits(loss: Any) -> keras.losses.Loss:
    """Return the same loss for logits, of a loss for probabilities or its name.

    Raises:
        ValueError: if it cannot be computed from logits.
    """
    if isinstance(loss, str):
        # By name Keras knows a function, whose class carries the settings.
        loss = {"binary_crossentropy": "BinaryCrossentropy", "bce": "BinaryCrossentropy"}.get(
            loss, loss
        )
    found: Any = keras.losses.get(loss)
    config = found.get_config() if isinstance(found, keras.losses.Loss) else {}
    if "from_logits" not in config:
        raise ValueError(
            f"the heads' loss is computed from logits, which {loss!r} cannot be; compile with "
            "binary_crossentropy or what make_loss returns"
        )
    return type(found).from_config({**config, "from_logits": True})


@register
class FocalLoss(keras.losses.Loss):
    """Focal loss (Lin et al. 2017, arXiv 1708.02002, equation 4), without the weights of classes.

    For the probability p of a label y

        y × (1 - p)^gamma × -log(p)  +  (1 - y) × p^gamma × -log(1 - p)

    which for y of 0 or 1 is the paper's, and cross-entropy for gamma 0. Unlike Keras'
    BinaryFocalCrossentropy it is linear in y, as mixed and smoothed labels need it. Computed from
    the logit, which is found by a probability that `keras.activations.sigmoid` made, so that
    neither loss nor gradient overflows.

    Args:
        gamma: how much less rows count that the model is sure and right about.
        from_logits: whether predictions are logits.
        label_smoothing: share by which labels are drawn to one half.
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
        """Return the loss of each row."""
        y = y_true * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing
        logit = y_pred if self.from_logits else getattr(y_pred, "_keras_logits", None)
        of_yes: Any
        of_no: Any
        if logit is not None:
            of_yes, of_no = ops.softplus(-logit), ops.softplus(logit)
        else:
            epsilon = keras.config.epsilon()
            p: Any = ops.clip(y_pred, epsilon, 1.0 - epsilon)
            of_yes, of_no = ops.log(1.0 / p), ops.log(1.0 / (1.0 - p))
        # 1 - p is exp(-of_no): a power of it has no infinite gradient at 0.
        loss = y * of_yes * ops.exp(-self.gamma * of_no)
        loss += (1.0 - y) * of_no * ops.exp(-self.gamma * of_yes)
        return ops.mean(loss, axis=-1)

    def get_config(self) -> dict:
        """Return the settings."""
        config = {
            "gamma": self.gamma,
            "from_logits": self.from_logits,
            "label_smoothing": self.label_smoothing,
        }
        return {**super().get_config(), **config}
