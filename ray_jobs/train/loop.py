"""What one worker does: build, steps, epochs, validation, and the best model at the end.

Enters: spec, manifest, and the worker's place among the others; perhaps a checkpoint to go on from.
Leaves: checkpoints and a record an epoch, through `Callbacks`; the trained model's variables.

Every decision that another worker must share (validate, save, stop, be best, lower the learning
rate) follows from numbers that all workers hold alike, since a collective that one of them skips
hangs the others. What a step draws at random (dropout, augmentation) follows from the seed, the
step and the place of a row in the global batch, whatever the number of workers.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mm_model.calibration import sigmoid
from mm_model.fit_helpers import balanced_weights
from mm_model.freezing import apply_stage, learning_rates, stage_of
from mm_model.losses import make_loss
from mm_model.optimizer import make_optimizer
from ray_jobs.cluster.strategy import Replicas, WorkerContext, make_strategy
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.batch import FEATURES, IMAGE
from ray_jobs.data.loader import EvaluationFeed, FeedOptions, TrainingFeed
from ray_jobs.data.manifest import Manifest
from ray_jobs.data.prefetch import prefetch
from ray_jobs.data.reader import Batch
from ray_jobs.data.sampler import TrainingSampler
from ray_jobs.storage.folder import Folder
from ray_jobs.train.callbacks import Callbacks, ControlRequest
from ray_jobs.train.checkpoints.checkpoint import BestCheckpoint, Checkpoint, LoopState, assign
from ray_jobs.train.checkpoints.snapshot import Copier, Snapshots
from ray_jobs.train.device_batch import DeviceBatch, DeviceBatcher
from ray_jobs.train.graph_reuse import make_tunables, same_graph, value_of, with_tunables
from ray_jobs.train.metrics import validation_metrics
from ray_jobs.train.model_factory import new_model
from ray_jobs.train.telemetry import console
from ray_jobs.train.train_step import TrainStep

_STEP_EVENT_S = 1.0
_LOOK_UP_S = 2.0
"""About how often workers ask each other whether one of them was told to save or to stop."""
_MOST_STEPS_UNASKED = 500


@dataclass
class Outcome:
    """What training ends with."""

    state: LoopState
    finished: bool
    """Whether training came to its end; else it was stopped, and its checkpoint is saved."""
    best: BestCheckpoint | None
    """The model at the best epoch so far, on rank 0 alone."""


@dataclass
class _Clock:
    """Where the time of an epoch went."""

    started: float = field(default_factory=time.monotonic)
    wait_s: float = 0.0
    checkpoint_s: float = 0.0
    steps: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class Loop:
    """One worker's model and its epochs.

    Args:
        spec: of the run.
        manifest: of the prepared data.
        place: of this worker.
        strategy: to compute under; by default the one for its devices and the number of workers.
        feeding: how rows are fed; by default decoded in this process, without a cache.
        tunable: whether it can become the loop of another spec by `becomes`.

    Raises:
        ValueError: if the workers differ in their replicas, or the data is too small.
    """

    def __init__(
        self,
        spec: RunSpec,
        manifest: Manifest,
        place: WorkerContext,
        strategy: tf.distribute.Strategy | None = None,
        feeding: FeedOptions | None = None,
        tunable: bool = False,
    ) -> None:
        self.spec, self.manifest, self.context = spec, manifest, place
        self.feeding = feeding or FeedOptions(data=spec.data)
        self.folder = Folder(spec.data.prepared)
        train = spec.train
        split = manifest.splits["train"]
        self.order = TrainingSampler.of(split, train.global_batch_size, spec.run.seed, spec.data)
        self.replicas = Replicas(strategy or make_strategy(place.num_workers), place)
        total_steps = self.order.steps_before(train.epochs)
        with self.replicas.strategy.scope():
            self.tunables = make_tunables(spec) if tunable else {}
            if self.tunables:
                spec = with_tunables(spec, self.tunables)
                train = spec.train
            keras.utils.set_random_seed(spec.run.seed)
            self.model = new_model(spec, manifest, train.precision)
            optimizer = make_optimizer(train, total_steps)
            synchronized = spec.model.batch_norm == "sync"
            self.stepper = TrainStep(self.model, optimizer, self.replicas, train, synchronized)
            self.optimizer = self.stepper.optimizer
            self.model.compile(self.optimizer, make_loss(train), auto_scale_loss=False)
        self.trainable = list(self.model.trainable_variables)
        """What learns in some stage, in the optimizer's order."""
        self.stage = stage_of((), 0)
        class_weight = {0: 1.0, 1: 1.0}
        if train.class_weight == "balanced":
            class_weight = balanced_weights(*split.class_counts)
        self.logit_shift = float(np.log(class_weight[1] / class_weight[0]))
        """What the class weights add to every logit, and no probability should hold."""
        names = self.model.input_names
        self.to_steps = DeviceBatcher(self.replicas, names, class_weight, train.steps_per_call)
        self.to_tensors = DeviceBatcher(self.replicas, names, class_weight)
        self.best: dict[int, BestCheckpoint] = {}
        """Models of the best epochs so far, by their index; on rank 0 alone."""
        self.loss_sum = np.float32(0)
        """This worker's part of the losses of the epoch's steps so far."""
        self.evaluate_step = tf.function(self._evaluate_step)
        self.snapshots = Snapshots(self.model, self.stepper, self.replicas)
        self._copy_trainable = Copier(self.trainable, self.replicas)
        self._next_question = 0
        self._start = self.snapshots.take(LoopState(), {}, {}) if tunable else None
        """What model and optimizer began with."""

    def _evaluate_step(self, inputs: dict[str, Any]) -> Any:
        """Return the head logits (B, M) of one batch; no worker waits for another in it."""
        run = self.replicas.strategy.run(
            lambda x: self.model.head_logits(x, training=False), args=(inputs,)
        )
        return tf.concat(self.replicas.results(run), axis=0)

    def becomes(self, spec: RunSpec) -> bool:
        """Become the untrained loop of another spec, if its graph is the same; say whether it is.

        A new loop of that spec would train the same but for rounding: what is a constant there is a
        variable here.
        """
        if self._start is None or not same_graph(spec, self.spec, list(self.tunables)):
            return False
        if not all(value_of(spec, path) for path in self.tunables):
            # A number that is 0 leaves a part of the graph out, and of what a checkpoint holds.
            return False
        for path, tunable in self.tunables.items():
            tunable.assign(value_of(spec, path))
        self.snapshots.restore(self._start)
        self.spec, self.best, self.loss_sum = spec, {}, np.float32(0)
        self._next_question = 0
        if spec.train.schedule in ("constant", "plateau"):
            self.optimizer.learning_rate.assign(spec.train.learning_rate)
        return True

    # -- epochs -----------------------------------------------------------------------------------

    def run(self, callbacks: Callbacks | None = None, saved: Checkpoint | None = None) -> Outcome:
        """Train until the last epoch, until patience ends, or until a request to stop.

        Args:
            callbacks: what to call.
            saved: checkpoint to go on from.
        """
        held = [saved]
        del saved  # As large as three models, and not needed for long.
        with closing(self.epochs(callbacks, held.pop())) as epochs:
            outcome = next(epochs)
            for outcome in epochs:  # noqa: B007
                pass
        return outcome

    def epochs(
        self, callbacks: Callbacks | None = None, saved: Checkpoint | None = None
    ) -> Generator[Outcome]:
        """Train as `run` does, and yield how training stands after each epoch.

        Whoever asks for the next one decides whether there is one; all workers alike. A training
        that has come to its end before yields once.
        """
        callbacks = callbacks or Callbacks()
        epochs = self.spec.train.epochs
        state = LoopState()
        if saved is not None:
            state, self.best = saved.state, dict(saved.best)
            self.loss_sum = self.snapshots.restore(saved)
            if self.spec.train.schedule == "constant":
                # The checkpoint may be another trial's, at another rate.
                self.optimizer.learning_rate.assign(self.spec.train.learning_rate)
        del saved
        if self._is_finished(state):
            yield self._outcome(state)
            return
        feed, validation = self._feeds()
        # Both streams run through all epochs, since every start of one costs its time, and the next
        # epoch's first rows are made ready while the last one is validated.
        steps = self._steps(feed, state.step, self.order.steps_before(epochs))
        passes = self._on_device(validation.batches(epochs - state.epoch))
        with closing(steps), closing(passes):
            stopped = False
            while not (stopped or self._is_finished(state)):
                self._set_stage(state.epoch, callbacks)
                clock = _Clock()
                state, stopped = self._train_epoch(state, steps, callbacks, clock)
                if state.step == self.order.steps_before(state.epoch + 1):
                    state = self._end_epoch(state, validation, passes, callbacks, clock)
                yield self._outcome(state)

    def _outcome(self, state: LoopState) -> Outcome:
        best = self.best.get(int(state.best_epoch or 0))
        return Outcome(state, self._is_finished(state), best)

    def _train_epoch(
        self, state: LoopState, steps: Iterator[DeviceBatch], callbacks: Callbacks, clock: _Clock
    ) -> tuple[LoopState, bool]:
        """Take the steps of an epoch that are left; return whether one wished to stop."""
        end = self.order.steps_before(state.epoch + 1)
        cadence = self.spec.train.checkpoint_cadence
        step, shown, request = state.step, clock.started, ControlRequest()
        total: Any = tf.constant(self.loss_sum)
        while step < end:
            asked = time.monotonic()
            batch = next(steps)
            clock.wait_s += time.monotonic() - asked
            callbacks.before_step(step, batch.num_steps)
            loss = self.stepper(batch)
            total += loss
            step += batch.num_steps
            clock.steps += batch.num_steps
            callbacks.after_step(step)
            if time.monotonic() - shown > _STEP_EVENT_S:
                shown = time.monotonic()
                callbacks.post(self._step_event(state.epoch, step, float(loss), batch, clock))
            request = self._poll_control(step, callbacks, clock)
            due = cadence is not None and step % cadence == 0
            if (request.save or request.stop or due) and step < end:
                self.loss_sum = total.numpy()
                self._save(state.model_copy(update={"step": step}), callbacks, clock)
            if request.stop:
                break
        self.loss_sum = total.numpy()
        return state.model_copy(update={"step": step}), request.stop

    def _end_epoch(
        self,
        state: LoopState,
        validation: EvaluationFeed,
        passes: Iterator[DeviceBatch],
        callbacks: Callbacks,
        clock: _Clock,
    ) -> LoopState:
        """Validate, find out whether the epoch is the best, save."""
        epoch, seconds = state.epoch, clock.seconds
        num_steps = state.step - self.order.steps_before(epoch)
        loss = float(self.replicas.sum(np.asarray(self.loss_sum))) / num_steps
        self.loss_sum = np.float32(0)
        if not np.isfinite(loss):
            # The sum over all workers, so that all of them end here alike.
            raise ValueError(self._diverged(f"the training loss is {loss}", epoch))
        self.replicas.agree(self.snapshots.statistics)
        rows_per_s = clock.steps * self.spec.train.global_batch_size / seconds
        record = {
            console.EPOCH: epoch,
            console.STEP: state.step,
            console.TRAIN_LOSS: loss,
            console.LEARNING_RATE: self._learning_rate(),
            console.ROWS_PER_S: rows_per_s,
            console.DATA_WAIT_S: clock.wait_s,
            console.EPOCH_S: seconds,
            console.STEP_S: (seconds - clock.wait_s - clock.checkpoint_s) / max(clock.steps, 1),
            console.CHECKPOINT_S: clock.checkpoint_s,
            **self._exchange_s(),
            **callbacks.measures(),
        }
        started = time.monotonic()
        with self._averaged_weights():
            logits_NM, label_N = self.validate(validation, passes, callbacks.alive)
            record |= self._validation_record(epoch, logits_NM, label_N)
            record[console.VALIDATION_S] = time.monotonic() - started
            kept = self._best_epochs((*state.history, record))
            if epoch in kept and self.context.rank == 0:
                self.best[epoch] = BestCheckpoint(self.snapshots.copy_model(), logits_NM, label_N)
        self.best = {e: best for e, best in self.best.items() if e in kept}
        improved = kept[0] == epoch
        state = self._after_epoch(state, record, improved)
        callbacks.post({"kind": "epoch", **record, "best": improved})
        callbacks.on_epoch(record, partial(self.snapshots.take, state, {}, self.best))
        return state

    def validate(
        self,
        feed: EvaluationFeed,
        batches: Iterator[DeviceBatch],
        alive: Callable[[], None] = lambda: None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return head logits (N, M) and labels (N,) of all validation rows, on every rank.

        Args:
            feed: of this worker's share.
            batches: of the feed, as tensors, at the beginning of a pass.
            alive: told that a batch is done.
        """
        num_rows = self.manifest.splits["validation"].num_rows
        num_heads = len(self.model.heads)
        rows = np.zeros((num_rows, num_heads + 1), np.float32)
        at = feed.rows.start
        for batch in islice(batches, feed.num_batches):
            logits = self.evaluate_step(batch.inputs).numpy()
            real = np.concatenate(self.replicas.results(batch.weight_B1))[:, 0] > 0
            label = np.concatenate(self.replicas.results(batch.label_B1))[:, 0]
            stop = at + int(real.sum())
            rows[at:stop, :num_heads] = logits[real]
            rows[at:stop, num_heads] = label[real]
            at = stop
            alive()
        # Every worker fills its own rows and leaves the others 0, so their sum is all rows.
        rows = self.replicas.sum(rows)
        return rows[:, :num_heads], rows[:, num_heads]

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Give the model the moving average of its weights for a while, where there is one."""
        if self.spec.train.ema_momentum is None:
            yield
            return
        own = self._copy_trainable()
        self.optimizer.finalize_variable_values(self.trainable)
        yield
        assign(self.trainable, own, "weights")

    # -- rows -------------------------------------------------------------------------------------

    def _feeds(self) -> tuple[TrainingFeed, EvaluationFeed]:
        place = self.context.rank, self.context.num_workers
        with_image = not {IMAGE, FEATURES}.isdisjoint(self.model.input_names)
        options = replace(self.feeding, with_image=with_image)
        batch_size = self.spec.train.global_batch_size // self.context.num_workers
        return (
            TrainingFeed(self.folder, self.manifest, self.order, *place, options),
            EvaluationFeed(self.folder, self.manifest, "validation", batch_size, *place, options),
        )

    def _steps(self, feed: TrainingFeed, start: int, stop: int) -> Generator[DeviceBatch]:
        """Yield what each call of the step takes, on the device before it asks."""

        def calls() -> Iterator[DeviceBatch]:
            with closing(feed.batches(start, stop)) as batches:
                for count in self._calls(start, stop):
                    yield self.to_steps(list(islice(batches, count)))

        return prefetch(calls(), self.spec.data.prefetch_batches)

    def _calls(self, start: int, stop: int) -> Iterator[int]:
        """Yield how many steps each call takes: none goes beyond an epoch or a checkpoint."""
        cadence, step = self.spec.train.checkpoint_cadence, start
        while step < stop:
            ends = [
                step + self.spec.train.steps_per_call,
                self.order.steps_before(self.order.epoch_of(step) + 1),
            ]
            if cadence is not None:
                ends.append((step // cadence + 1) * cadence)
            yield min(ends) - step
            step = min(ends)

    def _on_device(self, batches: Generator[Batch]) -> Generator[DeviceBatch]:
        def tensors() -> Iterator[DeviceBatch]:
            with closing(batches):
                for batch in batches:
                    yield self.to_tensors([batch])

        return prefetch(tensors(), self.spec.data.prefetch_batches)

    def _save(self, state: LoopState, callbacks: Callbacks, clock: _Clock) -> None:
        """Offer a checkpoint in the middle of an epoch; an exchange."""
        started = time.monotonic()
        own = self.snapshots.gather(self.loss_sum)
        callbacks.on_checkpoint(state.step, partial(self.snapshots.take, state, own, self.best))
        clock.checkpoint_s += time.monotonic() - started

    # -- decisions, from numbers that all workers hold alike --------------------------------------

    def _poll_control(self, step: int, callbacks: Callbacks, clock: _Clock) -> ControlRequest:
        """Return what any worker was asked for, every few seconds; then an exchange."""
        if step < self._next_question:
            return ControlRequest()
        own, step_s = callbacks.poll_control(), clock.seconds / max(clock.steps, 1)
        save, stop, all_s = self.replicas.sum(np.array([own.save, own.stop, step_s], np.float32))
        pause = _LOOK_UP_S / max(float(all_s) / self.context.num_workers, 1e-6)
        self._next_question = step + int(np.clip(pause, 1, _MOST_STEPS_UNASKED))
        return ControlRequest(save=save > 0, stop=stop > 0)

    def _set_stage(self, epoch: int, callbacks: Callbacks) -> None:
        stage = stage_of(self.spec.train.stages, epoch)
        if stage == self.stage:
            return
        self.stage = stage
        apply_stage(self.model, stage)
        self.stepper.trace(learning_rates(self.model, stage))
        learning = len(self.model.trainable_variables)
        text = f"{learning} of {len(self.trainable)} variables learn"
        callbacks.post({"kind": "stage", "text": f"from epoch {epoch + 1} on {text}"})

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

    def _best_epochs(self, history: tuple[dict[str, Any], ...]) -> list[int]:
        """Return the best epochs, the best first; of equal ones the earlier is better."""
        key = self.spec.train.monitor
        ranked = sorted(range(len(history)), key=lambda e: console.rank(key, history[e][key]))
        return ranked[: self.spec.train.keep_best]

    def _after_epoch(self, state: LoopState, record: dict[str, Any], improved: bool) -> LoopState:
        train, waited = self.spec.train, 0 if improved else state.plateau_epochs + 1
        if train.schedule == "plateau" and waited >= train.plateau_patience:
            waited = 0
            self.optimizer.learning_rate.assign(self._learning_rate() * train.plateau_factor)
        return LoopState(
            epoch=state.epoch + 1,
            step=state.step,
            history=(*state.history, record),
            best_epoch=state.epoch if improved else state.best_epoch,
            plateau_epochs=waited,
        )

    def _learning_rate(self) -> float:
        # A tensor under a schedule, else a variable, which as a mirrored one is no float itself.
        return float(self.optimizer.learning_rate.numpy())

    def _is_finished(self, state: LoopState) -> bool:
        if state.epoch == self.spec.train.epochs:
            return True
        if state.best_epoch is None:
            return False
        return state.epoch - 1 - state.best_epoch >= self.spec.train.patience

    # -- measures ---------------------------------------------------------------------------------

    def _exchange_s(self) -> dict[str, float]:
        """Return how long workers take to exchange as many numbers as this stage's gradient has.

        In float32, from the processor's memory and back into it.
        """
        if self.context.num_workers == 1:
            return {}
        gradient = np.zeros(sum(map(_size, self.model.trainable_variables)), np.float32)
        # The first is not measured: in it they wait for each other, and trace a size that is new.
        self.replicas.sum(gradient)
        started = time.monotonic()
        self.replicas.sum(gradient)
        return {console.COLLECTIVE_S: time.monotonic() - started}

    def _step_event(
        self, epoch: int, step: int, loss: float, batch: DeviceBatch, clock: _Clock
    ) -> console.Event:
        first = self.order.steps_before(epoch)
        return {
            "kind": "step",
            console.EPOCH: epoch,
            "done": step - first,
            "total": self.order.num_steps(epoch),
            console.TRAIN_LOSS: loss / batch.num_steps * self.context.num_workers,
            console.ROWS_PER_S: clock.steps * self.spec.train.global_batch_size / clock.seconds,
        }


def _size(variable: keras.Variable) -> int:
    return int(np.prod(variable.shape))
