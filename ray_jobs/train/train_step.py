"""One optimizer step: gradients of the global batch, their sum over all replicas, the update.

    forward, backward   on each replica, in `accumulate_steps` parts, optionally compiled by XLA
    sum                 over all replicas of all workers, in one exchange, or in several of about
                        `all_reduce_bytes`
    clip, update        the same on every replica, each on its own copy of the variables

Keras would clip the gradients of each replica and sum them afterwards. Here the sum comes first, so
that `clip_norm` limits the gradient of the global batch, and all workers skip the same steps when
scaled gradients overflow.

Shapes: B rows of a replica, K steps per call.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from mm_model import per_row_random
from mm_model.compat_keras import update_locally
from mm_model.mixup import mix_rows
from mm_model.model import FusionModel
from ray_jobs.cluster.strategy import Replicas
from ray_jobs.config.spec import TrainSpec
from ray_jobs.train.device_batch import DeviceBatch

_INITIAL_SCALE = 2.0**15
_GROWTH_STEPS = 2000
"""Steps without an overflow after which the loss scale doubles, as in Keras."""


class TrainStep:
    """Runs the training steps of one worker. Create it in the strategy's scope.

    Args:
        model: Model to train, compiled with its loss.
        optimizer: From `make_optimizer`, not built yet.
        replicas: The replicas of this worker.
        spec: The `train` section: precision, accumulation, exchange.
        synchronized: Whether batch norms use statistics of the global batch.
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
        self.optimizer: Any = update_locally(optimizer)
        self.optimizer.build(model.trainable_variables)
        self.scale: Any = None
        if spec.precision == "mixed_float16":
            self.scale = keras.Variable(_INITIAL_SCALE, trainable=False, name="loss_scale")
            self.good_steps = keras.Variable(0, trainable=False, dtype="int32", name="good_steps")
        self.exchanges = replicas.count > 1 and synchronized
        """Whether the model itself exchanges values between replicas."""
        self.mix_seed = None
        if spec.mixup_alpha or spec.cutmix_alpha:
            self.mix_seed = keras.random.SeedGenerator(name="mix_seed")
        self.trace()

    @property
    def variables(self) -> list[Any]:
        """The variables that a step changes, other than those of the model, in a fixed order."""
        scaling = [self.scale, self.good_steps] if self.scale is not None else []
        mix = [self.mix_seed.state] if self.mix_seed is not None else []
        return [*self.optimizer.variables, *scaling, *mix]

    def trace(self, rate_factors: Mapping[int, float] | None = None) -> None:
        """Discard the traced graph.

        Call this when the set of trainable variables or their learning rates change.

        Args:
            rate_factors: Learning-rate multipliers by `id` of the variable; 1 for variables not
                listed.
        """
        self.optimizer.rate_factors = dict(rate_factors or {})
        # Autograph is off: loops and conditions are explicit, and a killed worker would leave
        # Autograph's generated source files in the temporary folder.
        self._compute: Callable[..., Any] = self._gradients
        if self.spec.jit_compile:
            self._compute = tf.function(self._gradients, jit_compile=True, autograph=False)
        step = self._one if self.spec.steps_per_call == 1 else self._several
        self.call = tf.function(step, autograph=False)

    def __call__(self, batch: DeviceBatch) -> tf.Tensor:
        """Run the one or several steps of a device batch.

        Returns:
            This worker's share of the sum of their losses.
        """
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
            # A Python number or a constant tensor, depending on the strategy.
            index = tf.get_static_value(context.replica_id_in_sync_group)
        if self.mix_seed is not None:
            inputs, y_B1, weight_B1 = mix_rows(inputs, y_B1, weight_B1, self.spec, self.mix_seed)
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
        """Return this part's contribution to the loss, and its scaled gradients."""
        num_parts = self.replicas.count * self.spec.accumulate_steps
        with per_row_random.batch_part(part, num_parts), tf.GradientTape() as tape:
            p_B1 = self.model(inputs, training=True)
            # Keras' losses already divide by the number of the strategy's replicas.
            loss = self.model.compute_loss(inputs, y_B1, p_B1, weight_B1, training=True)
            loss = tf.cast(loss, tf.float32) / self.spec.accumulate_steps
            scaled = loss * scale
        variables = self.model.trainable_variables
        unconnected = tf.UnconnectedGradients.ZERO
        gradients: Any = tape.gradient(scaled, variables, unconnected_gradients=unconnected)
        # The gradient of a lookup is sparse, of a size that differs between workers.
        return loss, [tf.convert_to_tensor(gradient) for gradient in gradients]

    def _in_parts(
        self, inputs: dict[str, Any], y_B1: Any, weight_B1: Any, index: int, scale: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Return the loss and the gradients, computed part by part."""
        count = self.spec.accumulate_steps
        random = per_row_random.random_states(self.model)

        def split(x: tf.Tensor) -> tf.Tensor:
            return tf.reshape(x, (count, -1, *x.shape[1:]))

        parts = tf.nest.map_structure(split, (inputs, y_B1, weight_B1))

        def body(a: tf.Tensor, loss: tf.Tensor, sums: list[tf.Tensor]) -> tuple[Any, ...]:
            before = [tf.identity(v.value) for v in random]
            part = tf.nest.map_structure(lambda x: x[a], parts)
            part_loss, gradients = self._compute(*part, index * count + a, scale)
            for variable, value in zip(random, before, strict=True):
                # All parts start from the same random state, and each draws the random numbers for
                # its own rows.
                variable.assign(tf.where(a == count - 1, tf.identity(variable.value), value))
            sums = [s + g for s, g in zip(sums, gradients, strict=True)]
            return a + 1, loss + part_loss, sums

        zeros = [tf.zeros(v.shape, v.dtype) for v in self.model.trainable_variables]
        state = (tf.constant(0), tf.constant(0.0), zeros)
        if self.exchanges:
            # The model exchanges values between replicas, which TensorFlow rejects in the body of a
            # `tf.while_loop` inside `strategy.run`. A `tf.while_loop` around
            # `strategy.run`, as in `_several`, is allowed.
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
        """Remove the loss scale from the gradients and update the scale for the next step.

        If the summed gradients are not finite, all replicas skip the step and halve the scale, as
        Keras' LossScaleOptimizer does (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).
        """
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])
        good_steps = self.good_steps.value + 1
        grows = tf.equal(good_steps, _GROWTH_STEPS)
        self.good_steps.assign(tf.where(finite & ~grows, good_steps, 0))
        self.scale.assign(tf.where(finite, tf.where(grows, scale * 2, scale), scale / 2))
        self.optimizer.gradients_finite = finite
        return [g / scale for g in gradients]
