import keras
import numpy as np
import pytest
import tensorflow as tf

import mm_model
from mm_model.optimizer import make_optimizer
from mm_model.spec import OptimizerSpec
from tests.mm_model.examples import NO_RANDOMNESS, rows

TOTAL, PEAK = 200, 0.1
STEPS = (0, 1, 7, 19, 20, 21, 65, 110, 199, 200, 300)


def rates(optimizer: keras.Optimizer) -> list[float]:
    found = []
    for step in STEPS:
        optimizer.iterations.assign(step)
        found.append(float(optimizer.learning_rate))
    return found


def formula(schedule: str, step: int, warmup: int, end: float, power: float) -> float:
    """The formulas of the module's docstring in float64."""
    if step < warmup:
        return PEAK * step / warmup
    done = min((step - warmup) / (TOTAL - warmup), 1.0)
    left = {
        "cosine": end + (1 - end) * (1 + np.cos(np.pi * done)) / 2,
        "exponential": end**done,
        "polynomial": end + (1 - end) * (1 - done) ** power,
    }
    return PEAK * left[schedule]


@pytest.mark.parametrize(
    ("schedule", "warmup", "end", "power"),
    [
        ("cosine", 20, None, 1),
        ("cosine", 0, 0.1, 1),
        ("exponential", 20, None, 1),
        ("exponential", 0, 0.2, 1),
        ("polynomial", 20, None, 1),
        ("polynomial", 0, 0.1, 2.5),
    ],
)
def test_a_schedule_follows_its_formula_also_after_deserialization(schedule, warmup, end, power):
    spec = OptimizerSpec(
        schedule=schedule,
        learning_rate=PEAK,
        warmup_fraction=warmup / TOTAL,
        end_fraction=end,
        power=power,
    )
    optimizer = make_optimizer(spec, TOTAL)
    default = 0.01 if schedule == "exponential" else 0.0
    end = default if end is None else end
    expected = [formula(schedule, step, warmup, end, power) for step in STEPS]
    assert rates(optimizer) == pytest.approx(expected, rel=1e-4, abs=1e-8)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert rates(again) == rates(optimizer)
    with pytest.raises(ValueError, match=f"schedule={schedule} needs the total number of"):
        make_optimizer(spec)


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_a_constant_learning_rate_can_be_assigned(schedule):
    optimizer = make_optimizer(OptimizerSpec(schedule=schedule, learning_rate=0.25))
    assert rates(optimizer) == [0.25] * len(STEPS)
    optimizer.learning_rate.assign(0.125)
    assert rates(optimizer) == [0.125] * len(STEPS)


def constant(**settings) -> keras.Optimizer:
    return make_optimizer(OptimizerSpec(schedule="constant", **settings))


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({}, keras.optimizers.Adam(0.1)),
        ({"optimizer": "adamw"}, keras.optimizers.AdamW(0.1, weight_decay=0.2)),
        ({"optimizer": "sgd"}, keras.optimizers.SGD(0.1, momentum=0.8, nesterov=True)),
        ({"optimizer": "lamb"}, keras.optimizers.Lamb(0.1, weight_decay=0.2)),
    ],
)
def test_each_optimizer_equals_that_of_keras_with_the_settings_of_the_spec(settings, theirs):
    found = []
    for optimizer in (
        constant(learning_rate=0.1, weight_decay=0.2, momentum=0.8, **settings),
        theirs,
    ):
        kernel = keras.Variable([[1.0, -2.0], [3.0, 4.0]], name="kernel")
        optimizer.build([kernel])
        for step in range(3):
            optimizer.apply([tf.constant([[0.1, 0.2], [-0.3, 0.4]]) * (step + 1)], [kernel])
        found.append(np.asarray(kernel))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_weight_decay_excludes_biases_and_batch_norms(kind, mirrored):
    strategy = tf.distribute.get_strategy()
    if mirrored:
        strategy = tf.distribute.MirroredStrategy([tf.config.list_logical_devices("CPU")[0].name])
    statistics = mm_model.fit_numeric_statistics(rows()[1])
    with strategy.scope():
        model = mm_model.create_model((16, 16, 3), (3,), statistics, **NO_RANDOMNESS)
        # The number of axes decides, not the name.
        named = [keras.Variable([[1.0]], name=name) for name in ("entries_0", "beta_kernel")]
        variables = [*model.trainable_variables, *named]
        optimizer = constant(optimizer=kind, learning_rate=0.5, weight_decay=0.1)
        optimizer.build(variables)
    for v in variables:
        v.assign(np.ones(v.shape))
    zeros = [tf.zeros(v.shape) for v in variables]
    strategy.run(tf.function(lambda: optimizer.apply(zeros, variables)))
    for v in variables:
        expected = 1.0 if v.name in ("bias", "gamma", "beta") else 0.95
        np.testing.assert_allclose(v, np.full(v.shape, expected), rtol=1e-6, err_msg=v.path)
    names = {v.name for v in variables}
    assert names == {"kernel", "bias", "gamma", "beta", "entries_0", "beta_kernel"}


def test_an_average_of_the_weights_is_kept_until_it_is_assigned():
    optimizer = constant(optimizer="sgd", learning_rate=1.0, momentum=0, ema_momentum=0.9)
    kernel = keras.Variable([0.0], name="kernel")
    optimizer.build([kernel])
    average = None
    for step in range(1, 6):
        optimizer.apply([tf.constant([-1.0])], [kernel])
        assert float(kernel[0]) == step
        average = step if average is None else 0.9 * average + 0.1 * step
    optimizer.finalize_variable_values([kernel])
    assert float(kernel[0]) == pytest.approx(average)
