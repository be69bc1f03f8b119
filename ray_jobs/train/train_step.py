"""One optimizer step: gradients of the global batch, their sum over all replicas, the update.

    forward, backward   on each replica, in `accumulate_steps` parts, perhaps compiled by XLA
    sum                 over all replicas of all workers, packed into as few exchanges as asked for
    clip, update        alike on every replica, each on its own copy of the variables

Keras' optimizers sum gradients by themselves when they are told to apply them, after clipping what
one replica has; here the sum comes first, so that a norm is that of the global batch and workers
cannot differ in whether they skip a step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from mm_model import per_row_random
from mm_model.mixup import mixed
from mm_model.model import FusionModel
from mm_model.tunable import current_value
from ray_jobs.cluster.strategy import Replicas
from ray_jobs.config.spec import TrainSpec
from ray_jobs.train.checkpoints.checkpoint import is_random_state
from ray_jobs.train.device_batch import DeviceBatch

_START_SCALE = 2.0**15
_GROW_AFTER = 2000
"""Steps without an overflow after which the scale of the loss doubles, as in Keras."""


class TrainStep:
    """Takes the training steps of one worker. Make it in the strategy's scope.

    Args:
        model: to train, compiled with its loss.
        optimizer: of `make_optimizer`, not yet built.
        replicas: of this worker.
        spec: precision, accumulation, exchange.
        synchronized: whether batch norms take statistics of the global batch.
    """

    def __init__(
        self,
        model: FusionModel,
        optimizer: keras.Optimizer,
        replicas: Replicas,
        spec: TrainSpec,
        synchronized: bool,
    ) -> None:
        self.model, self.replicas, self.spec = model, replicas, spec
        self.optimizer: Any = _updating_each_replica(optimizer)
        self.optimizer.build(model.trainable_variables)
        self.scale: Any = None
        if spec.precision == "mixed_float16":
            self.scale = keras.Variable(_START_SCALE, trainable=False, name="loss_scale")
            self.good_steps = keras.Variable(0, trainable=False, dtype="int32", name="good_steps")
        self.exchanges = replicas.count > 1 and synchronized
        """Whether replicas exchange something within the model."""
        self.mix_seed = None
        if spec.mixup_alpha or spec.cutmix_alpha:
            self.mix_seed = keras.random.SeedGenerator(name="mix_seed")
        self.trace()

    @property
    def variables(self) -> list[Any]:
        """What a step changes beside the model, in an order that does not change."""
        own = [self.scale, self.good_steps] if self.scale is not None else []
        mix = [self.mix_seed.state] if self.mix_seed is not None else []
        return [*self.optimizer.variables, *own, *mix]

    def trace(self, rates: Mapping[str, float] | None = None) -> None:
        """Begin a new graph, since other variables learn, or at other rates.

        Args:
            rates: by path of a variable what its learning rate is multiplied by.
        """
        self.optimizer.rates = dict(rates or {})
        self._compute: Callable[..., Any] = self._gradients
        if self.spec.jit_compile:
            self._compute = tf.function(self._gradients, jit_compile=True)
        self.call = tf.function(self._one if self.spec.steps_per_call == 1 else self._several)

    def __call__(self, batch: DeviceBatch) -> tf.Tensor:
        """Take the batch's steps; return this worker's part of their summed losses."""
        arguments = (batch.inputs, batch.label_B1, batch.weight_B1)
        if self.spec.steps_per_call == 1:
            return self.call(*arguments)
        return self.call(tf.constant(batch.num_steps), *arguments)

    def _one(self, inputs: dict[str, Any], y_B1: Any, weight_B1: Any) -> tf.Tensor:
        run = self.replicas.strategy.run(self._on_replica, args=(inputs, y_B1, weight_B1))
        return tf.add_n(self.replicas.results(run))

    def _several(
        self, num_steps: tf.Tensor, inputs: dict[str, Any], y_KB1: Any, weight_KB1: Any
    ) -> tf.Tensor:
        def on_replica(k: tf.Tensor, *stacked: Any) -> tf.Tensor:
            return self._on_replica(*tf.nest.map_structure(lambda x: x[k], stacked))

        def body(k: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            run = self.replicas.strategy.run(on_replica, args=(k, inputs, y_KB1, weight_KB1))
            return k + 1, total + tf.add_n(self.replicas.results(run))

        start = (tf.constant(0), tf.constant(0.0))
        _, total = tf.while_loop(lambda k, _: k < num_steps, body, start, parallel_iterations=1)
        return total

    # -- on one replica ---------------------------------------------------------------------------

    def _on_replica(self, inputs: dict[str, Any], y_B1: Any, weight_B1: Any) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        index = 0
        if self.replicas.count > 1:
            # A number to Python, or a constant tensor, by the kind of strategy.
            index = tf.get_static_value(context.replica_id_in_sync_group)
        if self.mix_seed is not None:
            inputs, y_B1, weight_B1 = mixed(inputs, y_B1, weight_B1, self.spec, self.mix_seed)
        compute = self._compute if self.spec.accumulate_steps == 1 else self._in_parts
        scale = tf.constant(1.0) if self.scale is None else tf.convert_to_tensor(self.scale.value)
        loss, gradients = compute(inputs, y_B1, weight_B1, index, scale)
        gradients = self._summed(context, gradients)
        if self.scale is not None:
            gradients = self._unscaled(gradients, scale)
        if self.spec.clip_norm is not None:
            gradients, _ = tf.clip_by_global_norm(gradients, self.spec.clip_norm)
        self.optimizer.apply(gradients, self.model.trainable_variables)
        return loss

    def _gradients(
        self, inputs: dict[str, Any], y_B1: Any, weight_B1: Any, part: Any, scale: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Return this part's share of the loss, and its scaled gradients."""
        num_parts = self.replicas.count * self.spec.accumulate_steps
        with per_row_random.replica(part, num_parts), tf.GradientTape() as tape:
            p_B1 = self.model(inputs, training=True)
            # Divided by the number of replicas already: Keras' losses see the strategy.
            loss = self.model.compute_loss(inputs, y_B1, p_B1, weight_B1, training=True)
            loss = tf.cast(loss, tf.float32) / self.spec.accumulate_steps
            scaled = loss * scale
        variables = self.model.trainable_variables
        unconnected = tf.UnconnectedGradients.ZERO
        gradients: Any = tape.gradient(scaled, variables, unconnected_gradients=unconnected)
        return loss, gradients

    def _in_parts(
        self, inputs: dict[str, Any], y_B1: Any, weight_B1: Any, index: int, scale: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Return loss and gradients, computed one part of the rows after the other."""
        count = self.spec.accumulate_steps
        random = [v for v in self.model.variables if is_random_state(v)]

        def split(x: tf.Tensor) -> tf.Tensor:
            return tf.reshape(x, (count, -1, *x.shape[1:]))

        parts = tf.nest.map_structure(split, (inputs, y_B1, weight_B1))

        def body(a: tf.Tensor, loss: tf.Tensor, sums: list[tf.Tensor]) -> tuple[Any, ...]:
            before = [tf.identity(v.value) for v in random]
            some = tf.nest.map_structure(lambda x: x[a], parts)
            part_loss, gradients = self._compute(*some, index * count + a, scale)
            for variable, value in zip(random, before, strict=True):
                # All parts draw from the same state, each the numbers of its own rows.
                variable.assign(tf.where(a == count - 1, tf.identity(variable.value), value))
            sums = [s + g for s, g in zip(sums, gradients, strict=True)]
            return a + 1, loss + part_loss, sums

        zeros = [tf.zeros(v.shape, v.dtype) for v in self.model.trainable_variables]
        state = (tf.constant(0), tf.constant(0.0), zeros)
        if self.exchanges:
            # What replicas exchange inside of the model, they cannot in a loop of the graph.
            for _ in range(count):
                with tf.control_dependencies(tf.nest.flatten(state)):
                    state = body(*state)
        else:
            state = tf.while_loop(lambda a, *_: a < count, body, state, parallel_iterations=1)
        return state[1], state[2]

    def _summed(self, context: Any, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        if self.replicas.count == 1:
            return list(gradients)
        options = tf.distribute.experimental.CommunicationOptions(
            bytes_per_pack=self.spec.all_reduce_bytes or 0
        )
        sent = [tf.cast(g, self.spec.all_reduce_dtype) for g in gradients]
        summed = context.all_reduce(tf.distribute.ReduceOp.SUM, sent, options)
        return [tf.cast(s, g.dtype) for s, g in zip(summed, gradients, strict=True)]

    def _unscaled(self, gradients: Sequence[tf.Tensor], scale: tf.Tensor) -> list[tf.Tensor]:
        """Take the loss scale out, and set it for the next step.

        A step whose sum is not finite is skipped by all replicas, and halves the scale, as in
        Keras' LossScaleOptimizer (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).
        """
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])
        grown = self.good_steps.value + 1
        grows = tf.equal(grown, _GROW_AFTER)
        after = tf.where(grows, scale * 2, scale)
        self.good_steps.assign(tf.where(finite & ~grows, grown, 0))
        self.scale.assign(tf.where(finite, after, scale / 2))
        self.optimizer.usable = finite
        return [g / scale for g in gradients]


class _OnEachReplica:
    """An optimizer's update from gradients that are the same on every replica already.

    Every replica changes its own copies of the variables. Keras' way would sum the gradients once
    more, and needs a merge of all replicas, which `tf.cond` cannot hold.
    """

    rates: Mapping[str, float] = {}
    """By path of a variable what its learning rate is multiplied by."""
    usable: Any = None
    """Whether this step's gradients may be applied; None: they may."""

    def _backend_update_step(
        self: Any, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        def update() -> None:
            for gradient, variable in zip(grads, trainable_variables, strict=True):
                rate = learning_rate * self.rates.get(variable.path, 1.0)
                if self.weight_decay and self._use_weight_decay(variable):
                    variable.assign(variable - variable * current_value(self.weight_decay) * rate)
                self.update_step(gradient, variable, rate)

        if self.usable is None:
            update()
        else:
            tf.cond(self.usable, update, lambda: None)

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        """Leave it to the update, which may be skipped, and has rates of its own."""


def _updating_each_replica(optimizer: keras.Optimizer) -> keras.Optimizer:
    kind = type(optimizer)
    # In place, since not all settings of an optimizer are in its config.
    object.__setattr__(optimizer, "__class__", type(kind.__name__, (_OnEachReplica, kind), {}))
    return optimizer
