"""Dropout whose random numbers for a row do not depend on the number of replicas.

Shapes: B rows, F features.
"""

from typing import Any

import keras
from keras import layers, ops

from mm_model import per_row_random
from mm_model.tunable import Tunable, current_value


@keras.saving.register_keras_serializable("mm_model")
class RowDropout(layers.Dropout):
    """`keras.layers.Dropout`, made to draw the same mask for a row on any number of replicas.

    With one replica, the mask equals that of Keras. The rate must be below 1. The first entry of
    `noise_shape` must be None: each row has its own mask. Random numbers are float32 even in mixed
    precision, because with fewer bits the fraction of dropped values would differ from `rate`.
    """

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Apply dropout in training."""
        if not training or not self.rate:
            return inputs
        noise_shape = self.noise_shape or (None,) * len(inputs.shape)
        sizes: Any = ops.shape(inputs)
        shape = [n if size is None else size for size, n in zip(noise_shape, sizes, strict=True)]
        draw = per_row_random.uniform(shape, self.seed_generator)
        scale = 1 / (1 - current_value(self.rate))
        if isinstance(self.rate, Tunable):
            scale = ops.cast(scale, inputs.dtype)
        return ops.where(draw >= current_value(self.rate), inputs * scale, 0)


@keras.saving.register_keras_serializable("mm_model")
class ModalityDropout(layers.Layer):
    """Hides one branch from the joint network in a random fraction of the training rows.

    Draws one number from [0, 1) per row. With M branches, the last one is set to zero from
    1 - `rate` / M, and branch i, counted from 0, between i × `rate` / M and (i + 1) × `rate` / M
    (ModDrop: Neverova et al. 2016, arXiv 1501.00102). With two branches and a mask, rows whose
    first branch has no input never lose the second.

    Input: M tensors (B, F), optionally a mask (B, N) of the first branch's inputs.
    Output: M tensors (B, F).

    Args:
        rate: Fraction of the rows.
        num_branches: M.
        seed: Seed for the draws.
    """

    def __init__(
        self, rate: float, num_branches: int = 2, seed: int | None = None, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        self.rate, self.num_branches = rate, num_branches
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, features: Any, training: bool = False) -> Any:
        """Hide branches in training."""
        count = self.num_branches
        branches, mask = features[:count], features[count:]
        if not training or not self.rate:
            return tuple(branches)
        shape: Any = ops.shape(branches[0])
        draw_B1: Any = per_row_random.uniform((shape[0], 1), self.seed_generator)
        part = current_value(self.rate) / count
        keep: list[Any] = [
            ops.logical_or(draw_B1 < i * part, draw_B1 >= (i + 1) * part) for i in range(count - 1)
        ]
        keep.append(draw_B1 < 1 - part)
        if count == 2:
            for mask_BN in mask:
                is_alone_B1 = ops.logical_not(ops.any(mask_BN > 0, axis=1, keepdims=True))
                keep[1] = ops.logical_or(keep[1], is_alone_B1)
        return tuple(
            branch_BF * ops.cast(keep_B1, branch_BF.dtype)
            for branch_BF, keep_B1 in zip(branches, keep, strict=True)
        )
