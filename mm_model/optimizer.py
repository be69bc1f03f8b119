"""Creates the optimizer of a spec, for both `Model.fit` and the distributed loop.

In a run of T steps, the first W = round(T × warmup_fraction) steps are the warm-up. Step s has the
learning rate below, where d = (s - W) / (T - W) is the completed fraction of the decay, P the peak
and e the end fraction:

    warm-up       P × s / W
    cosine        P × (e + (1 - e) × (1 + cos(π × d)) / 2)     (Loshchilov and Hutter 2016)
    exponential   P × e^d
    polynomial    P × (e + (1 - e) × (1 - d)^power)

After the last step the rate is constant.
"""

from typing import Any

import keras
from keras import ops
from keras.optimizers import schedules

from mm_model.spec import OptimizerSpec
from mm_model.tunable import Tunable, current_value

_EXPONENTIAL_END = 0.01


def make_optimizer(spec: OptimizerSpec, total_steps: int | None = None) -> keras.Optimizer:
    """Return the optimizer of a spec with its learning-rate schedule.

    With `ema_momentum`, it also keeps moving averages of the variables, which
    `finalize_variable_values` assigns to them. It does not clip gradients.

    Args:
        spec: Optimizer, learning rate and schedule.
        total_steps: Total number of training steps; required by decaying schedules.

    Raises:
        ValueError: If the schedule decays and `total_steps` is missing.
    """
    options: dict[str, Any] = {"learning_rate": _learning_rate(spec, total_steps)}
    if spec.ema_momentum is not None:
        options |= {"use_ema": True, "ema_momentum": spec.ema_momentum}
    if spec.optimizer == "adam":
        return keras.optimizers.Adam(**options)
    if spec.optimizer == "sgd":
        return keras.optimizers.SGD(momentum=spec.momentum, nesterov=True, **options)
    kind = AdamW if spec.optimizer == "adamw" else Lamb
    return kind(weight_decay=spec.weight_decay, **options)


class _DecaysKernels:
    """Excludes biases and the scales and offsets of layers from weight decay.

    They are identified by having fewer than two axes. Names are not reliable: ConvNeXt's layer
    scales have none.
    """

    def build(self: Any, var_list: list[keras.Variable]) -> None:
        """Create the optimizer's variables."""
        self.exclude_from_weight_decay(var_list=[v for v in var_list if len(v.shape) < 2])
        keras_optimizer: Any = super()
        keras_optimizer.build(var_list)


@keras.saving.register_keras_serializable("mm_model")
class AdamW(_DecaysKernels, keras.optimizers.AdamW):
    """AdamW that decays kernels only."""


@keras.saving.register_keras_serializable("mm_model")
class Lamb(_DecaysKernels, keras.optimizers.Lamb):
    """LAMB that decays kernels only."""


def _learning_rate(spec: OptimizerSpec, total_steps: int | None) -> Any:
    peak = spec.learning_rate
    if spec.schedule in ("constant", "plateau"):
        return peak
    if isinstance(peak, Tunable):
        # Every schedule is proportional to its peak.
        unit = spec.model_copy(update={"learning_rate": 1.0})
        return _Scaled(_learning_rate(unit, total_steps), peak)
    if not total_steps:
        raise ValueError(
            f"train.schedule={spec.schedule} needs the total number of training steps; pass "
            "total_steps"
        )
    warmup_steps = round(total_steps * spec.warmup_fraction)
    steps = max(total_steps - warmup_steps, 1)
    end = spec.end_fraction
    if end is None:
        end = _EXPONENTIAL_END if spec.schedule == "exponential" else 0.0
    if spec.schedule == "cosine":
        return schedules.CosineDecay(
            initial_learning_rate=0.0 if warmup_steps else peak,
            decay_steps=steps,
            alpha=end,
            warmup_target=peak if warmup_steps else None,
            warmup_steps=warmup_steps,
        )
    if spec.schedule == "exponential":
        decay = schedules.ExponentialDecay(peak, steps, end)
    else:
        decay = schedules.PolynomialDecay(peak, steps, peak * end, spec.power)
    return WarmUp(decay, peak, warmup_steps, steps)


class _Scaled(schedules.LearningRateSchedule):
    """Multiplies a schedule by a tunable."""

    def __init__(self, schedule: Any, tunable: Tunable) -> None:
        self.schedule, self.tunable = schedule, tunable

    def __call__(self, step: Any) -> Any:
        """Return the learning rate of a step."""
        return self.schedule(step) * current_value(self.tunable)


@keras.saving.register_keras_serializable("mm_model")
class WarmUp(schedules.LearningRateSchedule):
    """Rises linearly from 0 to the peak, then follows another schedule for a number of steps.

    Args:
        decay: Schedule after the warm-up, which starts at step 0 of this schedule.
        peak: Learning rate at the end of the warm-up.
        warmup_steps: Number of steps of the warm-up.
        decay_steps: Number of steps of `decay`, after which the learning rate is constant.
    """

    def __init__(
        self,
        decay: schedules.LearningRateSchedule | dict,
        peak: float,
        warmup_steps: int,
        decay_steps: int,
    ) -> None:
        if isinstance(decay, dict):
            decay = keras.saving.deserialize_keras_object(decay)
        self.decay: Any = decay
        self.peak, self.warmup_steps, self.decay_steps = peak, warmup_steps, decay_steps

    def __call__(self, step: Any) -> Any:
        """Return the learning rate of a step."""
        step = ops.cast(step, "float32")
        after = ops.clip(step - self.warmup_steps, 0.0, float(self.decay_steps))
        warmup = step * (self.peak / max(self.warmup_steps, 1))
        return ops.where(step < self.warmup_steps, warmup, self.decay(after))

    def get_config(self) -> dict:
        """Return the constructor arguments."""
        return {
            "decay": keras.saving.serialize_keras_object(self.decay),
            "peak": self.peak,
            "warmup_steps": self.warmup_steps,
            "decay_steps": self.decay_steps,
        }
