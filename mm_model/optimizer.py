"""The optimizer of a spec; `Model.fit` and the distributed loop use the same one.

Learning rates over time, of step s of T steps, of which the first W = round(T × warmup_fraction)
warm up; d = (s - W) / (T - W) is the share of the decay that is done, P the peak, e what is left
of it in the end:

    warm-up       P × s / W
    cosine        P × (e + (1 - e) × (1 + cos(π × d)) / 2)     (Loshchilov and Hutter 2016)
    exponential   P × e^d
    polynomial    P × (e + (1 - e) × (1 - d)^power)

After the last step the rate stays.
"""

from typing import Any

import keras
from keras import ops
from keras.optimizers import schedules

from mm_model.layers.blocks import register
from mm_model.spec import OptimizerSpec
from mm_model.tunable import Tunable, current_value

# Biases and what normalises: no kernels. Under a strategy a variable is `kernel/replica_1:0`.
_NO_KERNEL = r"(^|/)(bias|gamma|beta)(/replica_\d+)?(:\d+)?$"
_EXPONENTIAL_END = 0.01


def make_optimizer(spec: OptimizerSpec, total_steps: int | None = None) -> keras.Optimizer:
    """Return the optimizer and its schedule that a spec asks for.

    With `ema_momentum` it also keeps moving averages of what it trains, which
    `finalize_variable_values` puts in place. Nothing is clipped.

    Args:
        spec: optimizer, learning rate and schedule.
        total_steps: steps of the whole run, which the schedules that decay need.

    Raises:
        ValueError: if the schedule decays and `total_steps` is not given.
    """
    options: dict[str, Any] = {"learning_rate": _learning_rate(spec, total_steps)}
    if spec.ema_momentum is not None:
        options |= {"use_ema": True, "ema_momentum": spec.ema_momentum}
    if spec.optimizer == "adam":
        return keras.optimizers.Adam(**options)
    if spec.optimizer == "sgd":
        return keras.optimizers.SGD(momentum=spec.momentum, nesterov=True, **options)
    kind = keras.optimizers.AdamW if spec.optimizer == "adamw" else keras.optimizers.Lamb
    optimizer = kind(weight_decay=spec.weight_decay, **options)
    optimizer.exclude_from_weight_decay(var_names=[_NO_KERNEL])
    return optimizer


def _learning_rate(spec: OptimizerSpec, total_steps: int | None) -> Any:
    peak = spec.learning_rate
    if isinstance(peak, Tunable) and spec.schedule not in ("constant", "plateau"):
        # Every schedule is its peak times what it would be with 1.
        unit = spec.model_copy(update={"learning_rate": 1.0})
        return _Scaled(_learning_rate(unit, total_steps), peak)
    if spec.schedule in ("constant", "plateau"):
        return peak
    if not total_steps:
        raise ValueError(
            f"train.schedule={spec.schedule} needs the number of steps of the whole run"
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
    """Another schedule times a tunable."""

    def __init__(self, schedule: Any, tunable: Tunable) -> None:
        self.schedule, self.tunable = schedule, tunable

    def __call__(self, step: Any) -> Any:
        """Return the learning rate of a step."""
        return self.schedule(step) * current_value(self.tunable)


@register
class WarmUp(schedules.LearningRateSchedule):
    """Climbs from 0 to the peak in a straight line, then follows another schedule and stops.

    Args:
        decay: the schedule after the warm-up, whose step 0 is the first there.
        peak: learning rate at the end of the warm-up.
        warmup_steps: steps of the climb.
        decay_steps: steps of the other schedule, after which the rate stays.
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
        climb = step * (self.peak / max(self.warmup_steps, 1))
        return ops.where(step < self.warmup_steps, climb, self.decay(after))

    def get_config(self) -> dict:
        """Return what the schedule is made from."""
        return {
            "decay": keras.saving.serialize_keras_object(self.decay),
            "peak": self.peak,
            "warmup_steps": self.warmup_steps,
            "decay_steps": self.decay_steps,
        }
