"""Dense blocks, which the branches, the fusion and the heads are made of.

Shapes: B rows, F features.
"""

from dataclasses import dataclass

from keras import KerasTensor, layers

from mm_model.layers.batch_norm import SynchronizedBatchNormalization
from mm_model.layers.dropout import RowDropout
from mm_model.spec import ModelSpec
from mm_model.tunable import l2_regularizer


@dataclass(frozen=True)
class Blocks:
    """Builds blocks with the activation, dropout, L2 penalty and batch norm of one model."""

    activation: str
    dropout: float
    l2: float
    synchronized: bool

    @classmethod
    def from_spec(cls, spec: ModelSpec) -> "Blocks":
        """Return the blocks of a spec."""
        return cls(spec.activation, spec.dropout, spec.l2, spec.batch_norm == "sync")

    def dense(self, x_BF: KerasTensor, units: int, name: str, skip: bool = False) -> KerasTensor:
        """Apply a linear map, batch norm, activation and dropout.

        With `skip`, adds the input, projected to `units` features if it has another number.
        """
        y_BF = self.linear(x_BF, units, f"{name}_dense")
        y_BF = self.batch_norm(f"{name}_bn")(y_BF)
        y_BF = layers.Activation(self.activation, name=f"{name}_activation")(y_BF)
        y_BF = RowDropout(self.dropout, name=f"{name}_dropout")(y_BF)
        if not skip:
            return y_BF
        if x_BF.shape[-1] != units:
            x_BF = self.linear(x_BF, units, f"{name}_skip")
        return layers.Add(name=f"{name}_add")([x_BF, y_BF])

    def linear(self, x_BF: KerasTensor, units: int, name: str) -> KerasTensor:
        """Apply a linear map without bias, which a batch norm would cancel."""
        regularizer = l2_regularizer(self.l2)
        return layers.Dense(units, use_bias=False, kernel_regularizer=regularizer, name=name)(x_BF)

    def batch_norm(self, name: str) -> layers.Layer:
        """Return a batch-norm layer with local or synchronized statistics."""
        if self.synchronized:
            return SynchronizedBatchNormalization(synchronized=True, name=name)
        return layers.BatchNormalization(name=name)

    def logit(self, x_BF: KerasTensor, name: str) -> KerasTensor:
        """Return one logit per row, which is 0 before training."""
        return layers.Dense(1, kernel_initializer="zeros", name=name, dtype="float32")(x_BF)
