"""Dense blocks used by the branches, the fusion and the heads.

Shapes: B rows, F features.
"""

from dataclasses import dataclass

from keras import KerasTensor, layers

from mm_model.layers.batch_norm import SynchronizedBatchNormalization
from mm_model.layers.dropout import RowDropout
from mm_model.spec import ModelSpec
from mm_model.tunable import l2_regularizer


@dataclass(frozen=True)
class BlockBuilder:
    """Builds dense blocks with the activation, dropout, L2 penalty and batch norm of one model."""

    spec: ModelSpec

    def dense(self, x_BF: KerasTensor, units: int, name: str, skip: bool = False) -> KerasTensor:
        """Apply a linear map, batch norm, activation and dropout.

        With `skip`, adds the input, which is first projected if it does not have `units` features.
        """
        y_BF = self.linear(x_BF, units, f"{name}_dense")
        y_BF = self.batch_norm(f"{name}_bn")(y_BF)
        y_BF = layers.Activation(self.spec.activation, name=f"{name}_activation")(y_BF)
        y_BF = RowDropout(self.spec.dropout, name=f"{name}_dropout")(y_BF)
        if not skip:
            return y_BF
        if x_BF.shape[-1] != units:
            x_BF = self.linear(x_BF, units, f"{name}_skip")
        return layers.Add(name=f"{name}_add")([x_BF, y_BF])

    def linear(self, x_BF: KerasTensor, units: int, name: str) -> KerasTensor:
        """Apply a linear map without a bias."""
        regularizer = l2_regularizer(self.spec.l2)
        return layers.Dense(units, use_bias=False, kernel_regularizer=regularizer, name=name)(x_BF)

    def batch_norm(self, name: str) -> layers.Layer:
        """Return a batch-norm layer with local or synchronized statistics."""
        if self.spec.batch_norm == "sync":
            return SynchronizedBatchNormalization(synchronized=True, name=name)
        return layers.BatchNormalization(name=name)

    def logit(self, x_BF: KerasTensor, name: str) -> KerasTensor:
        """Return one logit per row; it is 0 before training."""
        return layers.Dense(1, kernel_initializer="zeros", name=name, dtype="float32")(x_BF)
