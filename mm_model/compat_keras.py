"""Every private or undocumented part of Keras that the project relies on, with the reason.

`tests/mm_model/test_compat_keras.py` fails when a Keras upgrade changes one of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from mm_model.tunable import current_value

# Standard deviation of ImageNet's channels, as stored in the EfficientNet files.
_EFFICIENTNET_FILE_VARIANCE = np.asarray([0.229, 0.224, 0.225], np.float32)


class BatchNormalizationWithMoments(layers.BatchNormalization):
    """Batch normalization whose subclass computes the batch statistics in `batch_moments`.

    Overrides the private `_moments`: Keras has no other way to change how the mean and variance are
    computed without rewriting `call`.
    """

    def batch_moments(self, inputs: Any, axes: Any) -> tuple[Any, Any]:
        """Return the mean and variance over some axes, which the results no longer have."""
        raise NotImplementedError

    def _moments(self, inputs: Any, mask: Any) -> Any:
        if mask is not None:
            return super()._moments(inputs, mask)
        return self.batch_moments(inputs, self._reduction_axes)


def convert_layer(layer: layers.Layer, subclass: type[layers.Layer]) -> None:
    """Turn a layer into an instance of its subclass, in place.

    Cloning a backbone with other layer classes would take as long as building it, and would need
    its weights twice. This relies on `rate`, `noise_shape` and `seed_generator` of a Dropout, and
    `synchronized` of a BatchNormalization, being attributes that `call` reads.
    """
    layer.__class__ = subclass


def fold_imagenet_scale(backbone: keras.Model) -> None:
    """Correct the variance of an EfficientNet backbone whose weights were loaded from a file.

    The EfficientNet files of `keras.applications` store standard deviations in place of variances.
    `weights="imagenet"` adds a layer that compensates for this; loading a file by path does not.
    `adapt_variance` and `finalize_state` of Normalization are undocumented.
    """
    normalization = next(x for x in backbone.layers if isinstance(x, layers.Normalization))
    variance = np.asarray(normalization.adapt_variance)
    if variance.shape == (3,) and np.allclose(variance, _EFFICIENTNET_FILE_VARIANCE, atol=1e-3):
        normalization.adapt_variance.assign(variance**2)
        normalization.finalize_state()


def all_layers(layer: layers.Layer) -> list[layers.Layer]:
    """Return the layers inside a model or layer, at any depth.

    The private `_flatten_layers` is the only way to reach layers inside layers.
    """
    return layer._flatten_layers(include_self=False)


def child_layers(layer: layers.Layer) -> list[layers.Layer]:
    """Return the layers directly inside a layer, in the order in which it created them."""
    return layer._flatten_layers(include_self=False, recursive=False)


def store_position_embeddings(model: keras.Model) -> None:
    """Prepare the position embeddings of DINOv2 for saving.

    KerasHub saves the trained ones only if the sum of their changes is positive, and interpolates
    them back to the shape of `position_embeddings`, which is the same in the models of this
    package.
    """
    for layer in all_layers(model):
        trained: Any = getattr(layer, "interpolated_position_embeddings", None)
        if trained is not None:
            layer.position_embeddings.assign(trained)


def finalize_normalization(model: keras.Model) -> None:
    """Make a model's Normalization layers use the statistics that were just assigned to them.

    The layers use constants that only the undocumented `finalize_state` updates.
    """
    for layer in model._flatten_layers():
        if isinstance(layer, layers.Normalization):
            layer.finalize_state()


def logits_of_probability(probability: Any) -> Any:
    """Return the logits that `keras.activations.sigmoid` attached to its output, or None.

    Keras' own cross-entropy reads this attribute to avoid overflow; custom losses need it as well.
    """
    return getattr(probability, "_keras_logits", None)


def batch_norm_statistics(model: keras.Model) -> list[keras.Variable]:
    """Return the moving statistics of a model's batch norms, in the order of `model.variables`.

    The private `_flatten_layers` is the only way to reach layers inside layers.
    """
    norms = [x for x in model._flatten_layers() if isinstance(x, layers.BatchNormalization)]
    statistics = {id(v) for x in norms for v in (x.moving_mean, x.moving_variance)}
    return [variable for variable in model.variables if id(variable) in statistics]


def update_locally(optimizer: keras.Optimizer) -> Any:
    """Make an optimizer apply gradients without exchange, because they are equal on all replicas.

    By default, Keras sums the gradients over all replicas and merges the replicas for each update,
    and `tf.cond` cannot contain a merge. Returns the same object with the attributes of
    `_LocalUpdate`.
    """
    kind = type(optimizer)
    # In place, because an optimizer's config does not contain all of its settings.
    object.__setattr__(optimizer, "__class__", type(kind.__name__, (_LocalUpdate, kind), {}))
    return optimizer


class _LocalUpdate:
    """Overrides the private methods of Keras' optimizers that update variables."""

    rate_factors: Mapping[int, float] = {}
    """Factor of the learning rate, by the `id` of a variable; 1 for variables not listed."""
    gradients_finite: Any = None
    """Boolean tensor; if it is false, `apply` changes nothing. None counts as true."""

    def apply(self: Any, grads: Any, trainable_variables: Any = None) -> None:
        """Update the variables, the optimizer's state and its step counter."""
        keras_optimizer: Any = super()
        keras_optimizer.apply(grads, trainable_variables)
        if self.gradients_finite is not None:
            # The counter's update merges the replicas, so it cannot be skipped; it is undone here.
            skipped = tf.cast(~self.gradients_finite, self._iterations.dtype)
            self._iterations.assign_sub(skipped)

    def _backend_update_step(
        self: Any, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        def update() -> None:
            for gradient, variable in zip(grads, trainable_variables, strict=True):
                rate = learning_rate * self.rate_factors.get(id(variable), 1.0)
                if self.weight_decay and self._use_weight_decay(variable):
                    variable.assign(variable - variable * current_value(self.weight_decay) * rate)
                self.update_step(gradient, variable, rate)

        self._if_finite(update)

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        """Do nothing, because the update step decays each variable at its own learning rate."""

    def _update_model_variables_moving_average(self: Any, trainable_variables: Any) -> None:
        keras_optimizer: Any = super()
        average = keras_optimizer._update_model_variables_moving_average
        self._if_finite(lambda: average(trainable_variables))

    def _if_finite(self, update: Callable[[], None]) -> None:
        if self.gradients_finite is None:
            update()
        else:
            tf.cond(self.gradients_finite, update, lambda: None)
