"""What one worker does: strategy, build, step, epoch, and the finished model at the end.

Enters: spec, manifest, and the worker's place among the others.  Leaves: a checkpoint and a record
an epoch; from rank 0 at the end the trained, calibrated model.

Every decision that another worker must share (validate, stop, be best, lower the learning rate)
follows from numbers that all workers hold alike, since a collective that one of them skips hangs
the others.
"""

import hashlib
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from mm_model.calibrate import sigmoid
from mm_model.fit import balanced_weights
from mm_model.model import FusionModel, build_model
from mm_model.optimizer import make_optimizer
from ray_jobs import report
from ray_jobs.ahead import ahead
from ray_jobs.batch import LABEL, WEIGHT
from ray_jobs.checkpoint import (
    Arrays,
    LoopState,
    assign,
    is_random_state,
    model_arrays,
    optimizer_arrays,
)
from ray_jobs.dataset import EvaluationFeed, FeedOptions, TrainingFeed
from ray_jobs.manifest import Manifest
from ray_jobs.metrics import validation_metrics
from ray_jobs.order import TrainingOrder
from ray_jobs.rows import ALIGNMENT, Batch, RowDecoder
from ray_jobs.spec import RunSpec
from ray_jobs.storage import Folder

if TYPE_CHECKING:
    from ray_jobs.report import Poster

_STEP_EVENT_S = 1.0


@dataclass(frozen=True)
class Place:
    """A worker's place among the others."""

    rank: int = 0
    num_workers: int = 1


@dataclass
class Saved:
    """A checkpoint in memory."""

    state: LoopState
    model: Arrays
    optimizer: Arrays
    best: Arrays


@dataclass(frozen=True)
class Tensors:
    """One worker's batch as the steps take it."""

    inputs: dict[str, tf.Tensor]
    """By the names of the model's inputs, which are those of `ray_jobs.batch`."""
    label_B1: tf.Tensor
    weight_B1: tf.Tensor


OnEpoch = Callable[[dict[str, Any], Callable[[], Saved]], None]
"""Takes the epoch's record and a function that copies out a checkpoint; every rank calls it."""


@dataclass
class Outcome:
    """What training ends with; the same on every worker."""

    state: LoopState
    best_model: Arrays
    """Variables of the model at the best epoch."""
    head_logits_NM: np.ndarray
    """Validation logits of every head at the best epoch, rows in stored order."""
    label_N: np.ndarray
    """Labels of the same rows."""


def set_devices(num_cpus: float, use_gpu: bool) -> None:
    """Let TensorFlow compute with what Ray gave the process; call before TensorFlow starts.

    As many threads as it has CPUs (two at least run operations, since a collective waits in one of
    them), and GPUs only where it has one: Ray does not hide the others.
    """
    if not use_gpu:
        tf.config.set_visible_devices([], "GPU")
    threads = max(int(num_cpus), 1)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(max(threads, 2))


class Loop:
    """One worker's model and its steps.

    Args:
        spec: of the run.
        manifest: of the prepared data.
        place: of this worker.
        strategy: to compute under; a `MultiWorkerMirroredStrategy` by default, which reads
            `TF_CONFIG`.
        feeding: how rows are fed; by default decoded in this process, without a cache.

    Raises:
        ValueError: if the strategy has other than one replica a worker, or the data is too small.
    """

    def __init__(
        self,
        spec: RunSpec,
        manifest: Manifest,
        place: Place,
        strategy: tf.distribute.Strategy | None = None,
        feeding: FeedOptions | None = None,
    ) -> None:
        self.spec, self.manifest, self.place = spec, manifest, place
        self.feeding = feeding or FeedOptions(data=spec.data)
        self.folder = Folder(spec.data.prepared)
        self.order = TrainingOrder.of(
            manifest.splits["train"],
            spec.train.global_batch_size,
            spec.run.seed,
            spec.data,
        )
        self.strategy = strategy or tf.distribute.MultiWorkerMirroredStrategy()
        if self.strategy.num_replicas_in_sync != place.num_workers:
            raise ValueError(
                f"{place.num_workers} workers hold {self.strategy.num_replicas_in_sync} replicas; "
                "give each worker one GPU, or none"
            )
        keras.utils.set_random_seed(spec.run.seed)
        total_steps = self.order.steps_before(spec.train.epochs)
        with self.strategy.scope():
            self.model = new_model(spec, manifest)
            self.optimizer = make_optimizer(spec.train, total_steps)
            self.model.compile(optimizer=self.optimizer, loss="binary_crossentropy")
            self.optimizer.build(self.model.trainable_variables)
        self.class_weight = {0: 1.0, 1: 1.0}
        if spec.train.class_weight == "balanced":
            self.class_weight = balanced_weights(*manifest.splits["train"].class_counts)
        self.logit_shift = float(np.log(self.class_weight[1] / self.class_weight[0]))
        """What the class weights add to every logit, and no probability should hold."""
        self.train_step = tf.function(self._train_step)
        self.evaluate_step = tf.function(self._evaluate_step)
        self._agree = tf.function(self._agree_in_replica)
        self._sum = tf.function(self._sum_in_replica)

    # -- steps ------------------------------------------------------------------------------------

    def _train_step(self, inputs: dict[str, tf.Tensor], y_B1: Any, weight_B1: Any) -> tf.Tensor:
        """Take one step; return this worker's part of the loss of the global batch."""

        def replica(inputs: dict[str, tf.Tensor], y_B1: Any, weight_B1: Any) -> tf.Tensor:
            with tf.GradientTape() as tape:
                p_B1 = self.model(inputs, training=True)
                # Divided by the number of workers already: Keras' losses see the strategy.
                loss = self.model.compute_loss(inputs, y_B1, p_B1, weight_B1, training=True)
            variables = self.model.trainable_variables
            # Sums the gradients over the workers, in one packed collective; a sum of our own
            # before it would double them.
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            return loss

        return self.strategy.run(replica, args=(inputs, y_B1, weight_B1))

    def _evaluate_step(self, inputs: dict[str, tf.Tensor]) -> tf.Tensor:
        """Return the head logits (B, M) of one batch; no worker waits for another in it."""
        return self.strategy.run(
            lambda x: self.model.head_logits(x, training=False), args=(inputs,)
        )

    def _agree_in_replica(self, loss: tf.Tensor) -> tf.Tensor:
        """Average batch-norm statistics over all workers; return the sum of their losses."""

        def replica(loss: tf.Tensor) -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            flat = [tf.reshape(loss, [1])] + [tf.reshape(v.value, [-1]) for v in self._local]
            # One collective for all of them: hundreds of small ones would cost seconds.
            mean = context.all_reduce(tf.distribute.ReduceOp.MEAN, tf.concat(flat, axis=0))
            sizes: Any = [part.shape[0] for part in flat]
            parts = tf.split(mean, sizes)
            for variable, part in zip(self._local, parts[1:], strict=True):
                variable.assign(tf.reshape(part, variable.shape))
            return parts[0][0] * self.place.num_workers

        return self.strategy.run(replica, args=(loss,))

    def _sum_in_replica(self, rows: tf.Tensor) -> tf.Tensor:
        def replica(rows: tf.Tensor) -> tf.Tensor:
            # An argument of a tf.function has no device, and a collective goes by its input's.
            rows = tf.identity(rows)
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, rows)

        return self.strategy.run(replica, args=(rows,))

    @property
    def _local(self) -> list[Any]:
        """Batch-norm statistics, which each worker updates from its own rows."""
        moving = ("moving_mean", "moving_variance")
        return [v for v in self.model.non_trainable_variables if v.path.endswith(moving)]

    # -- epochs -----------------------------------------------------------------------------------

    def run(self, on_epoch: OnEpoch, post: "Poster", saved: Saved | None = None) -> Outcome:
        """Train until the last epoch, or until patience ends; return the best epoch's model.

        Args:
            on_epoch: called after each epoch, on every rank.
            post: takes progress events.
            saved: checkpoint to go on from.
        """
        train = self.spec.train
        state, best = LoopState(), Arrays()
        if saved is not None:
            assign(self.model.variables, saved.model, "model weights")
            assign(self.optimizer.variables, saved.optimizer, "optimizer weights")
            state, best = saved.state, saved.best
            post({"kind": "note", "text": f"going on after epoch {state.epoch}"})
        feed, validation = self._feeds()
        # Both streams run through all epochs, since every start of one costs its time, and the next
        # epoch's first rows are made ready while the last one is validated.
        last_step = self.order.steps_before(train.epochs)
        with (
            closing(self._on_device(feed.batches(state.step, last_step))) as batches,
            closing(
                self._on_device(validation.batches(train.epochs - state.epoch))
            ) as validation_batches,
        ):
            while state.epoch < train.epochs and not self._out_of_patience(state):
                record = self._train_epoch(state, batches, post)
                logits_NM, label_N = self.validate(validation, validation_batches)
                record |= self._validation_record(state.epoch, logits_NM, label_N)
                improved = self._is_best(state, record)
                if improved:
                    best = {**model_arrays(self.model), "head_logits": logits_NM, "label": label_N}
                state = self._after_epoch(state, record, improved)
                post({"kind": "epoch", **record, "best": improved})
                # The variables are bound now: the copy may be asked for a little later.
                on_epoch(
                    record,
                    lambda state=state, best=best: Saved(
                        state, model_arrays(self.model), optimizer_arrays(self.optimizer), best
                    ),
                )
        variables = {k: v for k, v in best.items() if k not in ("head_logits", "label")}
        return Outcome(state, variables, best["head_logits"], best["label"])

    def _feeds(self) -> tuple[TrainingFeed, EvaluationFeed]:
        place = self.place.rank, self.place.num_workers
        options = replace(self.feeding, with_image="image" in self.model.input_names)
        batch_size = self.spec.train.global_batch_size // self.place.num_workers
        return (
            TrainingFeed(self.folder, self.manifest, self.order, *place, options),
            EvaluationFeed(self.folder, self.manifest, "validation", batch_size, *place, options),
        )

    def _on_device(self, batches: Generator[Batch]) -> Generator[Tensors]:
        """Yield batches as tensors, on the device before the step asks for them."""

        def tensors() -> Iterator[Tensors]:
            with closing(batches):
                yield from map(self.tensors, batches)

        return ahead(tensors(), self.spec.data.prefetch_batches)

    def _train_epoch(
        self, state: LoopState, batches: Iterator[Tensors], post: "Poster"
    ) -> dict[str, Any]:
        epoch, num_steps = state.epoch, self.order.num_steps(state.epoch)
        self._seed_epoch(epoch)
        started = shown = time.monotonic()
        wait_s, total = 0.0, tf.zeros(())
        for step in range(num_steps):
            asked = time.monotonic()
            batch = next(batches)
            wait_s += time.monotonic() - asked
            loss = self.train_step(batch.inputs, batch.label_B1, batch.weight_B1)
            total += loss
            if time.monotonic() - shown > _STEP_EVENT_S:
                shown = time.monotonic()
                post(
                    {
                        "kind": "step",
                        report.EPOCH: epoch,
                        "done": step + 1,
                        "total": num_steps,
                        report.TRAIN_LOSS: float(loss) * self.place.num_workers,
                        report.ROWS_PER_S: (step + 1)
                        * self.spec.train.global_batch_size
                        / (shown - started),
                    }
                )
        loss = float(self._agree(total / num_steps))
        if not np.isfinite(loss):
            # The sum over all workers, so that all of them end here alike.
            raise ValueError(self._diverged(f"the training loss is {loss}", epoch))
        epoch_s = time.monotonic() - started
        return {
            report.EPOCH: epoch,
            report.STEP: state.step + num_steps,
            report.TRAIN_LOSS: loss,
            report.LEARNING_RATE: self._learning_rate(),
            report.ROWS_PER_S: num_steps * self.spec.train.global_batch_size / epoch_s,
            report.DATA_WAIT_S: wait_s,
            report.EPOCH_S: epoch_s,
        }

    def validate(
        self, feed: EvaluationFeed, batches: Iterator[Tensors]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return head logits (N, M) and labels (N,) of all validation rows, on every rank.

        Args:
            feed: of this worker's share.
            batches: of the feed, as tensors, at the beginning of a pass.
        """
        num_rows = self.manifest.splits["validation"].num_rows
        num_heads = len(self.model.heads)
        rows = np.zeros((num_rows, num_heads + 1), np.float32)
        at = feed.rows.start
        for batch in islice(batches, feed.num_batches):
            logits = self.evaluate_step(batch.inputs).numpy()
            real = batch.weight_B1.numpy()[:, 0] > 0
            stop = at + int(real.sum())
            rows[at:stop, :num_heads] = logits[real]
            rows[at:stop, num_heads] = batch.label_B1.numpy()[real, 0]
            at = stop
        # Every worker fills its own rows and leaves the others 0, so their sum is all rows.
        rows = self._sum(tf.constant(rows)).numpy()
        return rows[:, :num_heads], rows[:, num_heads]

    def tensors(self, batch: Batch) -> Tensors:
        """Return a batch as tensors; class weights are in the weights."""
        inputs = {name: as_tensor(batch[name]) for name in self.model.input_names}
        by_class = np.where(batch[LABEL] > 0.5, self.class_weight[1], self.class_weight[0])
        weight = (batch[WEIGHT] * by_class).astype(np.float32)
        return Tensors(inputs, tf.convert_to_tensor(batch[LABEL]), tf.convert_to_tensor(weight))

    # -- decisions, from numbers that all workers hold alike --------------------------------------

    def _diverged(self, what: str, epoch: int) -> str:
        rate = self.spec.train.learning_rate
        return f"{what} in epoch {epoch + 1}; lower train.learning_rate={rate:g}"

    def _validation_record(
        self, epoch: int, logits_NM: np.ndarray, label_N: np.ndarray
    ) -> dict[str, Any]:
        if not np.isfinite(logits_NM).all():
            raise ValueError(self._diverged("a validation logit is not finite", epoch))
        blended_N = logits_NM.astype(np.float64) @ self.model.blend.weights_M()
        metrics = validation_metrics(label_N, sigmoid(blended_N - self.logit_shift))
        return {f"val/{name}": value for name, value in metrics.items()}

    def _is_best(self, state: LoopState, record: dict[str, Any]) -> bool:
        key = self.spec.train.monitor
        if record[key] is None:
            return state.best_epoch is None
        than = None if state.best_epoch is None else state.history[state.best_epoch][key]
        return report.is_better(key, record[key], than)

    def _after_epoch(self, state: LoopState, record: dict[str, Any], improved: bool) -> LoopState:
        train, waited = self.spec.train, 0 if improved else state.plateau_epochs + 1
        if train.schedule == "plateau" and waited >= train.plateau_patience:
            waited = 0
            rate: Any = self.optimizer.learning_rate
            rate.assign(self._learning_rate() * train.plateau_factor)
        return LoopState(
            epoch=state.epoch + 1,
            step=record[report.STEP],
            history=(*state.history, record),
            best_epoch=state.epoch if improved else state.best_epoch,
            plateau_epochs=waited,
        )

    def _learning_rate(self) -> float:
        # A tensor under a schedule, else a variable, which as a mirrored one is no float itself.
        rate: Any = self.optimizer.learning_rate
        return float(rate.numpy())

    def _out_of_patience(self, state: LoopState) -> bool:
        if state.best_epoch is None:
            return False
        return state.epoch - 1 - state.best_epoch >= self.spec.train.patience

    def _seed_epoch(self, epoch: int) -> None:
        """Make dropout and augmentation of an epoch follow from (seed, rank, epoch) alone."""
        for i, variable in enumerate(self.model.variables):
            if is_random_state(variable):
                words = f"{self.spec.run.seed}:{self.place.rank}:{epoch}:{i}".encode()
                digest = hashlib.sha256(words).digest()[:8]
                variable.assign(np.frombuffer(digest, np.uint32))


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


def new_model(spec: RunSpec, manifest: Manifest) -> FusionModel:
    """Return the untrained model of a run."""
    decoder = RowDecoder(manifest, with_image=True, size=spec.data.image_size)
    return build_model(
        spec.model, manifest.statistics, decoder.row_shape, vocabularies=manifest.vocabularies
    )
