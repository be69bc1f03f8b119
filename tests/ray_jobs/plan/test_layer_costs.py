"""What is said of models, against their own counts, TensorFlow's profiler and published figures."""

import keras
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.plan.estimate import Estimator
from ray_jobs.plan.layer_costs import ModelCosts, model_costs
from ray_jobs.plan.plan_spec import TABLE, read_machines
from tests.ray_jobs.plan.samples import manifest, spec

TINY = {
    "model__image__kind": "tiny",
    "model__image__units": 24,
    "model__augmentation": {"contrast": 0, "brightness": 0},
    "data__image_size": 32,
}
# Tan and Le 2019, arXiv 1905.11946, table 2: multiplications, with the classifier.
PUBLISHED_MACS = {"efficientnet_b0": (224, 0.39e9), "efficientnet_b5": (456, 9.9e9)}
# What keras.io says of them, less the classifier of 1,000 classes.
PUBLISHED_WEIGHTS = {
    "efficientnet_b0": 5_330_571 - 1281 * 1000,
    "efficientnet_b5": 30_562_527 - 2049 * 1000,
}
# Rows a second of TensorFlow 2 with XLA on one GPU, and rows a step: NVIDIA, DeepLearningExamples,
# TensorFlow2/Classification/ConvNets/efficientnet_v1, of February 2022. Left out is B0 in half
# precision on V100, where the processor's augmentation was the bound, as they say.
PUBLISHED_ROWS_PER_S = {
    "efficientnet_b0": [
        ("a100-80", "float32", 512, 1209),
        ("a100-80", "mixed_float16", 1024, 3454),
        ("v100", "float32", 256, 752),
    ],
    "efficientnet_b4": [
        ("a100-80", "float32", 80, 165),
        ("a100-80", "mixed_float16", 160, 470),
        ("v100", "float32", 32, 79),
        ("v100", "mixed_float16", 64, 211),
    ],
}
SIZES = {"efficientnet_b0": 224, "efficientnet_b4": 380, "efficientnet_b5": 456}
WITHIN = 1.35
MEMORY_GIB = {"a100-80": 80.0, "v100": 31.7}
"""What those GPUs had; in the table stands the smaller V100."""


def of(run: RunSpec) -> ModelCosts:
    return model_costs(run, manifest(run))[0]


def alone(kind: str, **changes) -> RunSpec:
    """Return a run of an image backbone with as little else as there can be."""
    return spec(
        model__image__kind=kind, model__image__units=8, model__numeric__kind="none",
        data__image_size=SIZES[kind], train__optimizer="sgd", **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def b0() -> ModelCosts:
    return of(alone("efficientnet_b0"))


def test_operations_of_a_small_network_are_those_counted_by_hand():
    run = spec(**TINY, model__numeric__kind="none")
    convolutions = 16**2 * 27 * 16 + 8**2 * 144 * 32 + 4**2 * 288 * 64
    dense = 64 * 24 + 24
    assert sum(layer.flops for layer in of(run).layers) == 2 * (convolutions + dense)


def test_weights_of_a_small_network_are_those_counted_by_hand():
    costs = of(spec(**TINY, model__numeric__kind="none", train__optimizer="sgd"))
    kernels = 27 * 16 + 144 * 32 + 288 * 64 + 64 * 24
    learning = kernels + 2 * (16 + 32 + 64 + 24) + 25
    assert costs.num_learning == learning
    # Moving statistics of the batch norms; scale and bias of blend and calibration.
    assert costs.num_weights >= learning + 2 * (16 + 32 + 64 + 24) + 4
    assert costs.num_slots == learning
    assert costs.input_bytes == 32 * 32 * 3 + 4 * 4


def check_against_published(kind: str, costs: ModelCosts) -> None:
    macs = sum(layer.flops for layer in costs.layers) / 2
    assert macs == pytest.approx(PUBLISHED_MACS[kind][1], rel=0.05)
    # Above the backbone: a dense layer, its batch norm, the head, blend and calibration.
    assert costs.num_weights == pytest.approx(PUBLISHED_WEIGHTS[kind], rel=0.005)


def check_rows_per_s(kind: str, costs: ModelCosts, half: ModelCosts) -> None:
    machines = read_machines(str(TABLE))
    for gpu, precision, rows, published in PUBLISHED_ROWS_PER_S[kind]:
        run = alone(kind).overlay(
            {"train.use_gpu": True, "train.global_batch_size": rows, "train.precision": precision}
        )
        model = costs if precision == "float32" else half
        machine = machines[gpu].model_copy(update={"memory_gib": MEMORY_GIB[gpu]})
        (stage,) = Estimator(gpu, machine, [model], manifest(run, 2000)).plan(run).stages
        ratio = rows / stage.compute_s / published
        assert 1 / WITHIN < ratio < WITHIN, (gpu, precision, ratio)
        # They ran, and were about as large as would go.
        assert stage.memory.total < stage.memory.capacity < 2 * stage.memory.total


def test_operations_and_weights_of_efficientnet_b0_are_the_published_ones(b0):
    check_against_published("efficientnet_b0", b0)


def test_step_times_of_efficientnet_b0_are_near_what_nvidia_published(b0):
    half = of(alone("efficientnet_b0", train__precision="mixed_float16"))
    check_rows_per_s("efficientnet_b0", b0, half)


@pytest.mark.slow
def test_operations_and_weights_of_efficientnet_b5_are_the_published_ones():
    check_against_published("efficientnet_b5", of(alone("efficientnet_b5")))


@pytest.mark.slow
def test_step_times_of_efficientnet_b4_are_near_what_nvidia_published():
    costs = [of(alone("efficientnet_b4", train__precision=p)) for p in ("float32", "mixed_float16")]
    check_rows_per_s("efficientnet_b4", *costs)


@pytest.mark.slow
def test_tensorflow_counts_the_same_operations_and_what_is_element_by_element(b0):
    import tensorflow as tf

    model = keras.applications.EfficientNetB0(
        include_top=False, weights=None, input_shape=(224, 224, 3)
    )
    # Another way than `plan` takes: what the traced graph does.
    graph = tf.function(lambda x: model(x)).get_concrete_function(tf.TensorSpec((1, 224, 224, 3)))
    profiler = tf.compat.v1.profiler
    options = profiler.ProfileOptionBuilder(profiler.ProfileOptionBuilder.float_operation())
    found = profiler.profile(graph=graph.graph, options=options.with_empty_output().build())
    ours = sum(layer.flops for layer in b0.layers)
    assert ours < found.total_float_ops < 1.06 * ours


def test_nothing_below_the_first_layer_that_learns_has_a_gradient():
    run = spec(**TINY, train__epochs=5, train__stages=[
        {"epochs": 1, "backbone": 0}, {"epochs": 2, "backbone": 0.4}, {"epochs": 2},
    ])  # fmt: skip
    stages = model_costs(run, manifest(run))
    assert [stage.epochs for stage in stages] == [1, 2, 2]
    learning = [sum(layer.learns for layer in stage.layers) for stage in stages]
    assert learning[0] < learning[1] < learning[2] < len(stages[2].layers)
    assert stages[0].num_learning < stages[1].num_learning < stages[2].num_learning
    # The optimizer knows from the start what will learn.
    assert {stage.num_slots for stage in stages} == {2 * stages[2].num_learning}
    (frozen,) = model_costs(spec(**TINY, model__image__trainable=False), manifest(run))
    assert frozen.num_learning == stages[0].num_learning


@pytest.mark.parametrize(
    ("changes", "slots"),
    [
        ({"train__optimizer": "adam"}, 2),
        ({"train__optimizer": "adamw"}, 2),
        ({"train__optimizer": "lamb"}, 2),
        ({"train__optimizer": "sgd"}, 1),
        ({"train__optimizer": "sgd", "train__ema_momentum": 0.99}, 2),
    ],
)
def test_the_optimizer_itself_says_what_it_keeps(changes, slots):
    costs = of(spec(**TINY, **changes))
    assert costs.num_slots == slots * costs.num_learning


def test_several_images_a_row_go_through_the_backbone_each():
    one = of(spec(**TINY, model__numeric__kind="none"))
    four = of(spec(**TINY, model__numeric__kind="none", prepare__image_columns=list("abcd")))
    dense = 2 * (64 * 24 + 24)
    flops = [sum(layer.flops for layer in costs.layers) for costs in (one, four)]
    assert flops[1] - dense == 4 * (flops[0] - dense)


def test_half_precision_keeps_half_the_bytes_of_what_is_not_pixels():
    full, half = (of(spec(**TINY, train__precision=p)) for p in ("float32", "mixed_bfloat16"))
    kept = [sum(layer.kept_bytes for layer in c.layers if layer.learns) for c in (full, half)]
    assert 0.5 <= kept[1] / kept[0] < 0.6
    assert full.num_weights == half.num_weights


def test_a_model_that_cannot_be_built_says_why():
    stages = [{"epochs": 1, "backbone": 1}, {"epochs": 1}]
    run = spec(**TINY, model__image__trainable=False, train__stages=stages)
    with pytest.raises(JobError, match=r"cannot be built: a stage lets backbone=1 of the backbone"):
        model_costs(run, manifest(run))
