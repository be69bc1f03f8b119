"""Trains one worker's model: steps, epochs, validation, and the choice of the best epoch.

Inputs: a spec, the manifest, the context of the worker, and optionally a checkpoint to resume from.
Outputs: checkpoints and one record per epoch, through `Callbacks`; the trained model's variables.

All workers must make the same decisions (validate, save, stop, best epoch, lower learning rate),
since a collective that one worker skips hangs the others. Decisions therefore depend only on
numbers that are equal on all workers. The random numbers of a step (dropout, augmentation) depend
only on the seed, the step and the position of a row in the global batch, not on the number of
workers.

Shapes: B rows of a batch, N validation rows, M heads.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, repeat
from operator import attrgetter
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mm_model.calibration import sigmoid
from mm_model.fit_helpers import balanced_weights
from mm_model.freezing import apply_stage, learning_rate_factors, stage_of
from mm_model.losses import make_loss
from mm_model.optimizer import make_optimizer
from ray_jobs.cluster.strategy import Replicas, WorkerContext, make_strategy
from ray_jobs.config.spec import RunSpec
from ray_jobs.config.text import count_text
from ray_jobs.data.batch import FEATURES, IMAGE, TEXT
from ray_jobs.data.loader import EvaluationFeed, FeedOptions, TrainingFeed, make_feeds
from ray_jobs.data.manifest import Manifest
from ray_jobs.data.sampler import TrainingSampler
from ray_jobs.data.text_input import text_reader
from ray_jobs.storage.folder import Folder
from ray_jobs.train.callbacks import Callbacks, ControlRequest
from ray_jobs.train.checkpoints.checkpoint import BestCheckpoint, Checkpoint, LoopState, assign
from ray_jobs.train.checkpoints.snapshot import Copier, Snapshots
from ray_jobs.train.device_batch import DeviceBatch, DeviceBatcher, call_sizes
from ray_jobs.train.graph_reuse import make_tunables, same_graph, with_tunables
from ray_jobs.train.metrics import validation_metrics
from ray_jobs.train.model_factory import new_model
from ray_jobs.train.telemetry import history_keys
from ray_jobs.train.train_step import TrainStep

_STEP_EVENT_S = 1.0
_POLL_S = 2.0
"""Approximate time between two exchanges of requests to save or stop."""
_MAX_STEPS_BETWEEN_POLLS = 500


@dataclass
class _Clock:
    """Durations within an epoch."""

    started: float = field(default_factory=time.monotonic)
    wait_s: float = 0.0
    checkpoint_s: float = 0.0
    steps: int = 0
    texts_cut: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class Loop:
    """One worker's model and its training.

    Args:
        spec: The run's settings.
        manifest: The manifest of the prepared data.
        context: Rank of this worker and number of workers.
        strategy: Distribution strategy; by default, the one for the worker's devices.
        feed_options: Options of the feed; by default, this process decodes rows without a cache.
        tunable: Whether `reuse_for` can change the spec later.

    Raises:
        ValueError: If the workers have different numbers of replicas, or the data is too small.
    """

    def __init__(
        self,
        spec: RunSpec,
        manifest: Manifest,
        context: WorkerContext,
        strategy: tf.distribute.Strategy | None = None,
        feed_options: FeedOptions | None = None,
        tunable: bool = False,
    ) -> None:
        self.spec, self.manifest, self.context = spec, manifest, context
        self.feed_options = feed_options or FeedOptions(data=spec.data)
        self.folder = Folder(spec.data.prepared)
        train = spec.train
        split = manifest.splits["train"]
        self.sampler = TrainingSampler.of_run(spec, manifest)
        self.replicas = Replicas(strategy or make_strategy(context.num_workers), context)
        total_steps = self.sampler.steps_before(train.epochs)
        with self.replicas.strategy.scope():
            self.tunables = make_tunables(spec) if tunable else {}
            if self.tunables:
                spec = with_tunables(spec, self.tunables)
                train = spec.train
            keras.utils.set_random_seed(spec.run.seed)
            self.model = new_model(spec, manifest, train.precision)
            optimizer = make_optimizer(train, total_steps)
            synchronized = spec.model.batch_norm == "sync"
            self.train_step = TrainStep(self.model, optimizer, self.replicas, train, synchronized)
            self.optimizer = self.train_step.optimizer
            self.model.compile(self.optimizer, make_loss(train), auto_scale_loss=False)
        self.trainable = list(self.model.trainable_variables)
        """Variables that are trained in at least one stage, in the optimizer's order."""
        self.stage = stage_of((), 0)
        class_weight = {0: 1.0, 1: 1.0}
        sums = split.class_weights or split.class_counts
        if train.class_weight == "balanced":
            # As scikit-learn: from the classes' total weights.
            class_weight = balanced_weights(*sums)
        # The training rows' mean weight becomes 1, so its unit affects neither rate nor L2 penalty.
        unit = split.num_rows / sum(sums)
        row_factor = {label: unit * weight for label, weight in class_weight.items()}
        self.logit_shift = float(np.log(class_weight[1] / class_weight[0]))
        """Shift of every logit by the class weights; subtracted to compute probabilities."""
        names = self.model.input_names
        stack = train.steps_per_call
        self.train_batcher = DeviceBatcher(self.replicas, names, row_factor, stack)
        self.validation_batcher = DeviceBatcher(self.replicas, names, {0: 1.0, 1: 1.0})
        self.best: dict[int, BestCheckpoint] = {}
        """Models of the best epochs so far, by index; on rank 0 only."""
        self.loss_sum = np.float32(0)
        """This worker's part of the sum of the epoch's losses so far."""
        # Autograph is off, as in `TrainStep`.
        self.evaluate_step = tf.function(self._evaluate_step, autograph=False)
        self.snapshots = Snapshots(self.model, self.train_step, self.replicas)
        self._copy_trainable = Copier(self.trainable, self.replicas)
        self._next_poll = 0
        self._initial = self.snapshots.take(LoopState(), {}, {}) if tunable else None

    def _evaluate_step(self, inputs: dict[str, Any]) -> Any:
        """Return the head logits (B, M) of one batch, without any exchange between workers."""
        run = self.replicas.strategy.run(
            lambda x: self.model.head_logits(x, training=False), args=(inputs,)
        )
        return tf.concat(self.replicas.results(run), axis=0)

    def reuse_for(self, spec: RunSpec) -> bool:
        """Reset to the untrained state with another spec if its graph is the same.

        A new loop would train in the same way except for rounding, since its graph would contain
        the tunable values as constants.

        Returns:
            Whether the loop was reset.
        """
        if self._initial is None or not same_graph(spec, self.spec, list(self.tunables)):
            return False
        values = {path: attrgetter(path)(spec) for path in self.tunables}
        if not all(values.values()):
            # A value of 0 would remove a part of the graph and of the checkpoints.
            return False
        for path, tunable in self.tunables.items():
            tunable.assign(values[path])
        self.snapshots.restore(self._initial)
        self.spec, self.best, self.loss_sum = spec, {}, np.float32(0)
        self._next_poll = 0
        if spec.train.schedule in ("constant", "plateau"):
            self.optimizer.learning_rate.assign(spec.train.learning_rate)
        return True

    # -- epochs -----------------------------------------------------------------------------------

    def run(
        self, callbacks: Callbacks | None = None, checkpoint: Checkpoint | None = None
    ) -> LoopState:
        """Train until the last epoch is reached, patience runs out, or a stop is requested.

        If the returned state is not finished, a stop was requested; its checkpoint is saved.
        """
        held = [checkpoint]
        del checkpoint  # Free its memory, three times the model's, once it is restored.
        with closing(self.epochs(callbacks, held.pop())) as epochs:
            return deque(epochs, maxlen=1).pop()

    def epochs(
        self, callbacks: Callbacks | None = None, checkpoint: Checkpoint | None = None
    ) -> Generator[LoopState]:
        """Train like `run`, and yield the state after each epoch, or once if already finished.

        All workers must request the same number of epochs.
        """
        callbacks = callbacks or Callbacks()
        train, state = self.spec.train, LoopState()
        if checkpoint is not None:
            state, self.best = checkpoint.state, dict(checkpoint.best)
            self.loss_sum = self.snapshots.restore(checkpoint)
            if train.schedule == "constant":
                # The checkpoint may be from a trial with another learning rate.
                self.optimizer.learning_rate.assign(train.learning_rate)
        del checkpoint
        if state.is_finished(train):
            yield state
            return
        feed, validation = self._feeds()
        start, stop = state.step, self.sampler.steps_before(train.epochs)
        depth = self.spec.data.prefetch_batches
        # One stream for all epochs: each start takes time, and the first rows of the next epoch are
        # prepared during validation.
        steps = self.train_batcher.stream(
            feed.batches(start, stop), call_sizes(self.sampler, train, start, stop), depth
        )
        passes = self.validation_batcher.stream(
            validation.batches(state.epoch, train.epochs), repeat(1), depth
        )
        with closing(steps), closing(passes):
            stopped = False
            while not (stopped or state.is_finished(train)):
                self._set_stage(state.epoch, callbacks)
                clock = _Clock()
                state, stopped = self._train_epoch(state, steps, callbacks, clock)
                if state.step == self.sampler.steps_before(state.epoch + 1):
                    state = self._end_epoch(state, validation, passes, callbacks, clock)
                yield state

    def _feeds(self) -> tuple[TrainingFeed, EvaluationFeed]:
        with_image = not {IMAGE, FEATURES}.isdisjoint(self.model.input_names)
        text = text_reader(self.spec, self.manifest)
        options = replace(self.feed_options, with_image=with_image, text=text)
        rank, num_workers = self.context.rank, self.context.num_workers
        return make_feeds(self.spec, self.manifest, options, rank, num_workers)

    def _train_epoch(
        self, state: LoopState, steps: Iterator[DeviceBatch], callbacks: Callbacks, clock: _Clock
    ) -> tuple[LoopState, bool]:
        """Run the remaining steps of an epoch; also return whether a stop was requested."""
        end = self.sampler.steps_before(state.epoch + 1)
        cadence = self.spec.train.checkpoint_cadence
        step, last_event, request = state.step, clock.started, ControlRequest()
        total: Any = tf.constant(self.loss_sum)
        while step < end and not request.stop:
            waiting = time.monotonic()
            batch = next(steps)
            clock.wait_s += time.monotonic() - waiting
            callbacks.before_step(step, batch.num_steps)
            loss = self.train_step(batch)
            total += loss
            step += batch.num_steps
            clock.steps += batch.num_steps
            clock.texts_cut += batch.num_texts_cut
            callbacks.after_step(step)
            if time.monotonic() - last_event > _STEP_EVENT_S:
                last_event = time.monotonic()
                mean = float(loss) / batch.num_steps * self.context.num_workers
                callbacks.post(self._step_event(state.epoch, step, mean, clock))
            request = self._poll_control(step, callbacks, clock)
            due = cadence is not None and step % cadence == 0
            if (request.save or request.stop or due) and step < end:
                self.loss_sum = total.numpy()
                self._save(state.model_copy(update={"step": step}), callbacks, clock)
        self.loss_sum = total.numpy()
        return state.model_copy(update={"step": step}), request.stop

    def _save(self, state: LoopState, callbacks: Callbacks, clock: _Clock) -> None:
        """Offer a checkpoint within an epoch; all workers exchange their local values."""
        started = time.monotonic()
        local = self.snapshots.gather(self.loss_sum)
        callbacks.on_checkpoint(state.step, partial(self.snapshots.take, state, local, self.best))
        clock.checkpoint_s += time.monotonic() - started

    def _end_epoch(
        self,
        state: LoopState,
        validation: EvaluationFeed,
        passes: Iterator[DeviceBatch],
        callbacks: Callbacks,
        clock: _Clock,
    ) -> LoopState:
        """Validate, decide whether the epoch is the best, and offer a checkpoint."""
        train, epoch, seconds = self.spec.train, state.epoch, clock.seconds
        num_steps = state.step - self.sampler.steps_before(epoch)
        loss = float(self.replicas.sum(np.asarray(self.loss_sum))) / num_steps
        self.loss_sum = np.float32(0)
        # This loss is the sum over all workers, so all of them raise.
        self._require_finite("the training loss", loss, epoch)
        self.replicas.average(self.snapshots.statistics)
        step_s = (seconds - clock.wait_s - clock.checkpoint_s) / max(clock.steps, 1)
        record = {
            history_keys.EPOCH: epoch,
            history_keys.STEP: state.step,
            history_keys.TRAIN_LOSS: loss,
            history_keys.LEARNING_RATE: self._learning_rate(),
            history_keys.ROWS_PER_S: clock.steps * train.global_batch_size / seconds,
            history_keys.DATA_WAIT_S: clock.wait_s,
            history_keys.EPOCH_S: seconds,
            history_keys.STEP_S: step_s,
            history_keys.CHECKPOINT_S: clock.checkpoint_s,
            **self._texts_cut(clock, callbacks, epoch),
            **self._collective_s(),
            **callbacks.measures(),
        }
        started = time.monotonic()
        with self._averaged_weights():
            rows = self.validate(validation, passes, callbacks.alive)
            logits_NM, label_N, weight_N = rows
            self._require_finite("a validation logit", logits_NM, epoch)
            blended_N = logits_NM.astype(np.float64) @ self.model.blend.weights_M()
            probability_N = sigmoid(blended_N - self.logit_shift)
            metrics = validation_metrics(label_N, probability_N, weight_N)
            record |= {f"val/{name}": value for name, value in metrics.items()}
            record[history_keys.VALIDATION_S] = time.monotonic() - started
            state = state.model_copy(update={"history": (*state.history, record)})
            kept = state.best_epochs(train)
            if epoch in kept and self.context.rank == 0:
                self.best[epoch] = BestCheckpoint(self.snapshots.copy_model(), *rows)
        self.best = {e: best for e, best in self.best.items() if e in kept}
        improved = kept[0] == epoch
        waited = 0 if improved else state.plateau_epochs + 1
        if train.schedule == "plateau" and waited >= train.plateau_patience:
            waited = 0
            self.optimizer.learning_rate.assign(self._learning_rate() * train.plateau_factor)
        best_epoch = epoch if improved else state.best_epoch
        update = {"epoch": epoch + 1, "best_epoch": best_epoch, "plateau_epochs": waited}
        state = state.model_copy(update=update)
        callbacks.post({"kind": "epoch", **record, "best": improved})
        callbacks.on_epoch(record, partial(self.snapshots.take, state, {}, self.best))
        return state

    def validate(
        self,
        feed: EvaluationFeed,
        batches: Iterator[DeviceBatch],
        alive: Callable[[], None] = lambda: None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return head logits (N, M), labels and weights (N,) of all validation rows, on every rank.

        The weights are None if rows have none.
        `batches` are the feed's, at the start of a pass; `alive` is called after each batch.
        """
        num_rows = self.manifest.splits["validation"].num_rows
        num_heads = len(self.model.heads)
        is_weighted = self.manifest.is_weighted
        rows = np.zeros((num_rows, num_heads + 1 + is_weighted), np.float32)
        at = feed.rows.start
        for batch in islice(batches, feed.num_batches):
            logits = self.evaluate_step(batch.inputs).numpy()
            weight = np.concatenate(self.replicas.results(batch.weight_B1))[:, 0]
            real = weight > 0
            label = np.concatenate(self.replicas.results(batch.label_B1))[:, 0]
            stop = at + int(real.sum())
            rows[at:stop, :num_heads] = logits[real]
            rows[at:stop, num_heads] = label[real]
            if is_weighted:
                rows[at:stop, -1] = weight[real]
            at = stop
            alive()
        # Every worker fills its own rows and leaves the others 0, so the sum contains all rows.
        rows = self.replicas.sum(rows)
        return rows[:, :num_heads], rows[:, num_heads], rows[:, -1] if is_weighted else None

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Use the moving average of the weights if it is enabled and a step has updated it."""
        if self.spec.train.ema_momentum is None or not self.optimizer.iterations.numpy():
            yield
            return
        own = self._copy_trainable()
        self.optimizer.finalize_variable_values(self.trainable)
        yield
        assign(self.trainable, own, "weights")

    # -- decisions, from numbers that are equal on all workers ------------------------------------

    def _poll_control(self, step: int, callbacks: Callbacks, clock: _Clock) -> ControlRequest:
        """Return the requests of all workers, which they exchange every few seconds."""
        if step < self._next_poll:
            return ControlRequest()
        own, step_s = callbacks.poll_control(), clock.seconds / max(clock.steps, 1)
        save, stop, sum_s = self.replicas.sum(np.array([own.save, own.stop, step_s], np.float32))
        pause = _POLL_S / max(float(sum_s) / self.context.num_workers, 1e-6)
        self._next_poll = step + int(np.clip(pause, 1, _MAX_STEPS_BETWEEN_POLLS))
        return ControlRequest(save=save > 0, stop=stop > 0)

    def _set_stage(self, epoch: int, callbacks: Callbacks) -> None:
        stage = stage_of(self.spec.train.stages, epoch)
        if stage == self.stage:
            return
        self.stage = stage
        apply_stage(self.model, stage)
        self.train_step.trace(learning_rate_factors(self.model, stage))
        count = len(self.model.trainable_variables)
        text = f"from epoch {epoch + 1}: {count} of {len(self.trainable)} variables train"
        callbacks.post({"kind": "stage", "text": text})

    def _require_finite(self, what: str, values: Any, epoch: int) -> None:
        if not np.isfinite(values).all():
            rate = self.spec.train.learning_rate
            raise ValueError(
                f"{what} is not finite in epoch {epoch + 1}; lower train.learning_rate={rate:g}"
            )

    def _learning_rate(self) -> float:
        # A tensor or a variable, depending on the schedule; `float` fails for a mirrored variable.
        return float(self.optimizer.learning_rate.numpy())

    # -- measurements -----------------------------------------------------------------------------

    def _texts_cut(self, clock: _Clock, callbacks: Callbacks, epoch: int) -> dict[str, float]:
        """Return the number of texts of all workers that were cut, and report it once."""
        if TEXT not in self.model.input_names:
            return {}
        count = int(self.replicas.sum(np.asarray(clock.texts_cut, np.float32)))
        if count and epoch == 0:
            length = self.spec.data.text_length
            text = f"{count_text(count, 'text')} cut to data.text_length={length} tokens"
            callbacks.post({"kind": "note", "text": text})
        return {history_keys.TEXTS_CUT: count}

    def _collective_s(self) -> dict[str, float]:
        """Measure the exchange of as many float32 values as the gradient has."""
        if self.context.num_workers == 1:
            return {}
        size = sum(int(np.prod(variable.shape)) for variable in self.model.trainable_variables)
        gradient = np.zeros(size, np.float32)
        # Not measured: here, the workers wait for each other, and TensorFlow traces a new size.
        self.replicas.sum(gradient)
        started = time.monotonic()
        self.replicas.sum(gradient)
        return {history_keys.COLLECTIVE_S: time.monotonic() - started}

    def _step_event(self, epoch: int, step: int, loss: float, clock: _Clock) -> dict[str, Any]:
        rows_per_s = clock.steps * self.spec.train.global_batch_size / clock.seconds
        return {
            "kind": "step",
            history_keys.EPOCH: epoch,
            "done": step - self.sampler.steps_before(epoch),
            "total": self.sampler.num_steps(epoch),
            history_keys.TRAIN_LOSS: loss,
            history_keys.ROWS_PER_S: rows_per_s,
        }
