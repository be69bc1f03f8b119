import keras
import numpy as np
import pytest
import tensorflow as tf

import mm_model
from mm_model.optimizer import make_optimizer
from mm_model.spec import OptimizerSpec
from tests.mm_model.examples import NO_RANDOMNESS, rows

TOTAL, WARMUP, PEAK = 200, 20, 0.1
STEPS = (0, 1, 7, 19, 20, 21, 65, 110, 199, 200, 300)


def rates(optimizer: keras.Optimizer) -> list[float]:
    found = []
    for step in STEPS:
        optimizer.iterations.assign(step)
        found.append(float(optimizer.learning_rate))
    return found


def formula(schedule: str, step: int, end: float, power: float) -> float:
    """The formulas of the module's docstring in float64."""
    if step < WARMUP:
        return PEAK * step / WARMUP
    done = min((step - WARMUP) / (TOTAL - WARMUP), 1.0)
    left = {
        "cosine": end + (1 - end) * (1 + np.cos(np.pi * done)) / 2,
        "exponential": end**done,
        "polynomial": end + (1 - end) * (1 - done) ** power,
    }
    return PEAK * left[schedule]


def test_the_cosine_schedule_rises_to_the_peak_and_ends_at_zero():
    optimizer = make_optimizer(OptimizerSpec(learning_rate=0.1, warmup_fraction=0.1), 100)
    found = []
    for step in (0, 5, 10, 55, 100):
        optimizer.iterations.assign(step)
        found.append(float(optimizer.learning_rate))
    assert found == pytest.approx([0.0, 0.05, 0.1, 0.05, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "end", "power"),
    [
        ("cosine", None, 1),
        ("cosine", 0.1, 1),
        ("exponential", None, 1),
        ("exponential", 0.2, 1),
        ("polynomial", None, 1),
        ("polynomial", 0.1, 1),
        ("polynomial", 0.1, 2.5),
    ],
)
def test_a_schedule_follows_its_formula_also_after_deserialization(schedule, end, power):
    spec = OptimizerSpec(
        schedule=schedule,
        learning_rate=PEAK,
        warmup_fraction=WARMUP / TOTAL,
        end_fraction=end,
        power=power,
    )
    optimizer = make_optimizer(spec, TOTAL)
    default = 0.01 if schedule == "exponential" else 0.0
    expected = [formula(schedule, s, default if end is None else end, power) for s in STEPS]
    assert rates(optimizer) == pytest.approx(expected, rel=1e-4, abs=1e-8)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert rates(again) == rates(optimizer)


@pytest.mark.parametrize("schedule", ["cosine", "exponential", "polynomial"])
def test_without_warm_up_a_schedule_equals_that_of_keras(schedule):
    spec = OptimizerSpec(
        schedule=schedule, learning_rate=PEAK, warmup_fraction=0, end_fraction=0.1, power=2
    )
    theirs = {
        "cosine": keras.optimizers.schedules.CosineDecay(PEAK, TOTAL, alpha=0.1),
        "exponential": keras.optimizers.schedules.ExponentialDecay(PEAK, TOTAL, 0.1),
        "polynomial": keras.optimizers.schedules.PolynomialDecay(PEAK, TOTAL, 0.1 * PEAK, 2),
    }[schedule]
    got = rates(make_optimizer(spec, TOTAL))
    expected = [float(theirs(min(step, TOTAL))) for step in STEPS]
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "exponential", "polynomial"])
def test_a_decaying_schedule_without_total_steps_is_rejected(schedule):
    with pytest.raises(ValueError, match=f"schedule={schedule} needs the total number of"):
        make_optimizer(OptimizerSpec(schedule=schedule))


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_a_constant_learning_rate_can_be_assigned(schedule):
    optimizer = make_optimizer(OptimizerSpec(schedule=schedule, learning_rate=0.25))
    assert rates(optimizer) == [0.25] * len(STEPS)
    optimizer.learning_rate.assign(0.125)
    assert rates(optimizer) == [0.125] * len(STEPS)


def constant(**settings) -> keras.Optimizer:
    return make_optimizer(OptimizerSpec(schedule="constant", **settings))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (constant(learning_rate=0.1), keras.optimizers.Adam(0.1)),
        (
            constant(optimizer="adamw", learning_rate=0.1, weight_decay=0.2),
            keras.optimizers.AdamW(0.1, weight_decay=0.2),
        ),
        (
            constant(optimizer="sgd", learning_rate=0.1, momentum=0.8),
            keras.optimizers.SGD(0.1, momentum=0.8, nesterov=True),
        ),
        (
            constant(optimizer="lamb", learning_rate=0.1, weight_decay=0.2),
            keras.optimizers.Lamb(0.1, weight_decay=0.2),
        ),
    ],
)
def test_each_optimizer_equals_that_of_keras_with_the_settings_of_the_spec(ours, theirs):
    found = []
    for optimizer in (ours, theirs):
        kernel = keras.Variable([[1.0, -2.0], [3.0, 4.0]], name="kernel")
        optimizer.build([kernel])
        for step in range(3):
            optimizer.apply([tf.constant([[0.1, 0.2], [-0.3, 0.4]]) * (step + 1)], [kernel])
        found.append(np.asarray(kernel))
    np.testing.assert_array_equal(*found)


@pytest.fixture(scope="module")
def variables() -> list:
    _, numbers, _ = rows()
    statistics = mm_model.fit_numeric_statistics(numbers)
    return mm_model.create_model((16, 16, 3), (3,), statistics, **NO_RANDOMNESS).trainable_variables


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_weight_decay_excludes_biases_and_batch_norms(kind, in_graph, variables):
    optimizer = constant(optimizer=kind, learning_rate=0.5, weight_decay=0.1)
    for v in variables:
        v.assign(np.ones(v.shape))
    optimizer.build(variables)
    zeros = [tf.zeros(v.shape) for v in variables]

    def step():
        optimizer.apply(zeros, variables)

    (tf.function(step) if in_graph else step)()
    seen = set()
    for v in variables:
        seen.add(v.name)
        expected = 0.95 if v.name == "kernel" else 1.0
        np.testing.assert_allclose(v, np.full(v.shape, expected), rtol=1e-6, err_msg=v.path)
    assert seen == {"kernel", "bias", "gamma", "beta"}


def test_weight_decay_under_a_strategy_excludes_the_same_variables():
    cpu = tf.config.list_logical_devices("CPU")[0].name
    strategy = tf.distribute.MirroredStrategy([cpu])
    with strategy.scope():
        kept = [keras.Variable([1.0], name=n) for n in ("bias", "gamma", "beta")]
        decayed = [keras.Variable([[1.0]], name=n) for n in ("kernel", "entries_0", "beta_kernel")]
        optimizer = constant(optimizer="adamw", learning_rate=0.5, weight_decay=0.1)
        optimizer.build([*kept, *decayed])
    zeros = [tf.zeros(v.shape) for v in (*kept, *decayed)]
    strategy.run(tf.function(lambda: optimizer.apply(zeros, [*kept, *decayed])))
    assert [float(np.asarray(v)[0]) for v in kept] == [1.0] * 3
    np.testing.assert_allclose([np.asarray(v)[0, 0] for v in decayed], [0.95] * 3, rtol=1e-6)


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
