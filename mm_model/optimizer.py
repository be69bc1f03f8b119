"""The optimizer of a spec; `Model.fit` and the distributed loop use the same one."""

from typing import Any

import keras

from mm_model.spec import OptimizerSpec


def make_optimizer(spec: OptimizerSpec, total_steps: int | None = None) -> keras.Optimizer:
    """Return Adam with the schedule that a spec asks for.

    Args:
        spec: learning rate and schedule.
        total_steps: steps of the whole run, which the cosine schedule needs.

    Raises:
        ValueError: if the schedule is cosine and `total_steps` is not given.
    """
    if spec.schedule != "cosine":
        return keras.optimizers.Adam(spec.learning_rate)
    if not total_steps:
        raise ValueError("train.schedule=cosine needs the number of steps of the whole run")
    warmup_steps = round(total_steps * spec.warmup_fraction)
    schedule: Any = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup_steps else spec.learning_rate,
        decay_steps=max(total_steps - warmup_steps, 1),
        warmup_target=spec.learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )
    return keras.optimizers.Adam(schedule)
