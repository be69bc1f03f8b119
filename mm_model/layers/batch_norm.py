"""Batch normalization with the statistics of the global batch."""

from typing import Any

import keras
from keras import ops

from mm_model.compat_keras import BatchNormalizationWithMoments


@keras.saving.register_keras_serializable("mm_model")
class SynchronizedBatchNormalization(BatchNormalizationWithMoments):
    """Batch normalization with statistics of the global batch, accurate to float32's last bits.

    Keras computes the variance as E[x²] - E[x]². Where the mean is large relative to the deviation,
    this loses most digits, and the remaining ones depend on the number of replicas. This layer
    first subtracts the mean of all replicas' means. This costs one more pass over the inputs and
    one more exchange of a few numbers per channel.
    """

    def batch_moments(self, inputs: Any, axes: Any) -> tuple[Any, Any]:
        """Return the mean and variance of the global batch."""
        moments: Any = ops.moments
        own: Any = ops.mean(inputs, axes, keepdims=True)
        near, _ = moments(own, axes, keepdims=True, synchronized=True)
        # The result does not depend on the shift, so the shift needs no gradient.
        shift = ops.stop_gradient(near)
        mean, variance = moments(inputs - shift, axes, synchronized=True)
        return mean + ops.squeeze(shift, axes), variance
