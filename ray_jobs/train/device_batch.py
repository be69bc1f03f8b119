"""Batches of arrays → what a step takes: tensors on the device, shared out among the replicas."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from ray_jobs.cluster.strategy import Replicas
from ray_jobs.data.batch import LABEL, WEIGHT
from ray_jobs.data.reader import ALIGNMENT, Batch


@dataclass(frozen=True)
class DeviceBatch:
    """One worker's rows of a step, or of several steps, stacked; of each replica its own."""

    inputs: dict[str, Any]
    """By the names of the model's inputs, which are those of `ray_jobs.data.batch`."""
    label_B1: Any
    weight_B1: Any
    num_steps: int = 1
    """Steps that are real; further ones only fill the stack."""


class DeviceBatcher:
    """Makes tensors of batches.

    Args:
        replicas: that they are for.
        input_names: of the model.
        class_weight: by label what a row's weight is multiplied by.
        stack: steps that are taken by one call; above 1, tensors have them as a first axis.
    """

    def __init__(
        self,
        replicas: Replicas,
        input_names: Sequence[str],
        class_weight: Mapping[int, float],
        stack: int = 1,
    ) -> None:
        self.replicas, self.input_names = replicas, list(input_names)
        self.class_weight, self.stack = class_weight, stack

    def __call__(self, batches: Sequence[Batch]) -> DeviceBatch:
        """Return the batches of one call."""
        steps = [self._of(batch) for batch in batches]
        if self.stack == 1:
            return steps[0]
        fill = [steps[-1]] * (self.stack - len(steps))

        def stacked(values: Sequence[Any]) -> Any:
            copies = zip(*map(self.replicas.results, values), strict=True)
            return self.replicas.values([tf.stack(copy) for copy in copies])

        return DeviceBatch(
            {name: stacked([s.inputs[name] for s in (*steps, *fill)]) for name in self.input_names},
            stacked([s.label_B1 for s in (*steps, *fill)]),
            stacked([s.weight_B1 for s in (*steps, *fill)]),
            len(steps),
        )

    def _of(self, batch: Batch) -> DeviceBatch:
        by_class = np.where(batch[LABEL] > 0.5, self.class_weight[1], self.class_weight[0])
        weight = (batch[WEIGHT] * by_class).astype(np.float32)
        share = self.replicas.shares
        return DeviceBatch(
            {name: share(batch[name], as_tensor) for name in self.input_names},
            share(batch[LABEL], tf.convert_to_tensor),
            share(weight, tf.convert_to_tensor),
        )


def as_tensor(array: np.ndarray) -> tf.Tensor:
    """Return an array as a tensor on the device that computes; nobody may write to it any more.

    On the CPU an aligned array is taken as it is: TensorFlow's own copy of a batch of pixels, into
    memory that is new each time, costs as much as decoding a fifth of it.
    """
    # Ray Data hands over views of its store that nobody may write to, which DLPack cannot say.
    shareable = array.flags.writeable and array.ctypes.data % ALIGNMENT == 0
    if not shareable or tf.config.list_logical_devices("GPU"):
        return tf.convert_to_tensor(array)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
