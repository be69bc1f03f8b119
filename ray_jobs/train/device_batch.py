"""Turns batches of arrays into tensors on the device, split over the replicas.

Shapes: B rows of a batch.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import tensorflow as tf

from ray_jobs.cluster.strategy import Replicas
from ray_jobs.config.spec import TrainSpec
from ray_jobs.data.batch import LABEL, TEXT_CUT, WEIGHT
from ray_jobs.data.decoder import ALIGNMENT_BYTES, Batch
from ray_jobs.data.prefetch import prefetch
from ray_jobs.data.sampler import TrainingSampler


@dataclass(frozen=True)
class DeviceBatch:
    """One worker's rows of one step or of several stacked steps, in one part per replica."""

    inputs: dict[str, Any]
    """Tensors by the names of the model's inputs, as in `ray_jobs.data.batch`."""
    label_B1: Any
    weight_B1: Any
    num_steps: int = 1
    """Number of real steps; the stack may be padded with copies of the last step."""
    num_texts_cut: int = 0
    """Number of texts that are longer than `data.text_length`."""


class DeviceBatcher:
    """Turns batches into device batches.

    Args:
        replicas: The replicas of this worker.
        input_names: Names of the model's inputs.
        class_weight: Factor of a row's weight, by label.
        stack: Steps per call; if above 1, the tensors have a leading axis of steps.
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
        """Combine at most `stack` batches into the device batch of one call."""
        steps = [self._step(batch) for batch in batches]
        if self.stack == 1:
            return steps[0]
        filled = [*steps, *[steps[-1]] * (self.stack - len(steps))]

        def stacked(values: Sequence[Any]) -> Any:
            copies = zip(*map(self.replicas.results, values), strict=True)
            return self.replicas.values([tf.stack(copy) for copy in copies])

        return DeviceBatch(
            {name: stacked([step.inputs[name] for step in filled]) for name in self.input_names},
            stacked([step.label_B1 for step in filled]),
            stacked([step.weight_B1 for step in filled]),
            len(steps),
            sum(step.num_texts_cut for step in steps),
        )

    def stream(
        self, batches: Generator[Batch], sizes: Iterable[int], depth: int
    ) -> Generator[DeviceBatch]:
        """Yield device batches; `sizes` gives the number of batches that each one combines.

        A thread prepares `depth` device batches in advance.
        """

        def device_batches() -> Iterator[DeviceBatch]:
            with closing(batches):
                for size in sizes:
                    if not (group := list(islice(batches, size))):
                        return
                    yield self(group)

        return prefetch(device_batches(), depth)

    def _step(self, batch: Batch) -> DeviceBatch:
        by_class = np.where(batch[LABEL] > 0.5, self.class_weight[1], self.class_weight[0])
        weight = (batch[WEIGHT] * by_class).astype(np.float32)
        split = self.replicas.split
        return DeviceBatch(
            {name: split(batch[name], as_tensor) for name in self.input_names},
            split(batch[LABEL], tf.convert_to_tensor),
            split(weight, tf.convert_to_tensor),
            num_texts_cut=int(batch[TEXT_CUT].sum()) if TEXT_CUT in batch else 0,
        )


def call_sizes(sampler: TrainingSampler, train: TrainSpec, start: int, stop: int) -> Iterator[int]:
    """Yield the number of steps of each call between the steps `start` and `stop` (exclusive).

    No call extends past the end of an epoch or past a step after which a checkpoint is due.
    """
    cadence, step = train.checkpoint_cadence, start
    while step < stop:
        ends = [step + train.steps_per_call, sampler.steps_before(sampler.epoch_of(step) + 1)]
        if cadence is not None:
            ends.append((step // cadence + 1) * cadence)
        yield min(ends) - step
        step = min(ends)


def as_tensor(array: np.ndarray) -> tf.Tensor:
    """Return an array as a tensor on the default device; do not write to the array afterwards.

    On the CPU, the tensor shares the memory of an aligned array, because copying a batch of pixels
    would add a fifth to the time of decoding it.
    """
    # DLPack cannot express Ray Data's read-only views of the object store.
    shareable = array.flags.writeable and array.ctypes.data % ALIGNMENT_BYTES == 0
    if not shareable or tf.config.list_logical_devices("GPU"):
        return tf.convert_to_tensor(array)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
