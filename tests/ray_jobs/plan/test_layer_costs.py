"""Compares layer costs with counts by hand and published figures."""

import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.plan.estimate import Estimator
from ray_jobs.plan.layer_costs import ModelCosts, model_costs, planned_manifest
from ray_jobs.plan.plan_spec import TABLE, read_machines
from tests.ray_jobs.plan.samples import manifest, spec

TINY = {
    "model__image__kind": "tiny",
    "model__image__units": 24,
    "model__augmentation": {"contrast": 0, "brightness": 0},
    "data__image_size": 32,
}
# Multiplications, with the classifier: Tan and Le 2019, arXiv 1905.11946, table 2, and for ViT-B/16
# the documentation of torchvision.
PUBLISHED_MACS = {"efficientnet_b0": 0.39e9, "efficientnet_b5": 9.9e9, "vit_base": 17.56e9}
# From keras.io, without the classifier of 1,000 classes; for ViT-B/16, from KerasHub's presets.
PUBLISHED_WEIGHTS = {
    "vit_base": 85_798_656,
    "efficientnet_b0": 5_330_571 - 1281 * 1000,
    "efficientnet_b5": 30_562_527 - 2049 * 1000,
}
# (GPU, precision, rows per step, rows per second) of TensorFlow 2 with XLA on one GPU: NVIDIA,
# DeepLearningExamples, TensorFlow2/Classification/ConvNets/efficientnet_v1, February 2022. Without
# B0 in half precision on V100, which was limited by augmentation on the CPU, as they note.
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
SIZES = {"vit_base": 224, "efficientnet_b0": 224, "efficientnet_b4": 380, "efficientnet_b5": 456}
WITHIN = 1.35
MEMORY_GIB = {"a100-80": 80.0, "v100": 31.7}
"""Memory of those GPUs; the table has the smaller V100."""


def of(run: RunSpec) -> ModelCosts:
    return model_costs(run, manifest(run))[0]


def flops_of(costs: ModelCosts) -> float:
    return sum(layer.flops for layer in costs.layers)


def alone(kind: str, **changes) -> RunSpec:
    """Return a run of an image backbone with as little else as possible."""
    return spec(
        model__image__kind=kind, model__image__units=8, model__numeric__kind="none",
        data__image_size=SIZES[kind], train__optimizer="sgd", **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def b0() -> ModelCosts:
    return of(alone("efficientnet_b0"))


def test_operations_and_weights_of_a_small_network_match_a_count_by_hand():
    costs = of(spec(**TINY, model__numeric__kind="none", train__optimizer="sgd"))
    convolutions = 16**2 * 27 * 16 + 8**2 * 144 * 32 + 4**2 * 288 * 64
    dense = 2 * (64 * 24 + 24)
    assert flops_of(costs) == 2 * convolutions + dense
    kernels = 27 * 16 + 144 * 32 + 288 * 64 + 64 * 24
    learning = kernels + 2 * (16 + 32 + 64 + 24) + 25
    assert costs.num_learning == learning
    # Moving statistics of the batch norms; scale and bias of blend and calibration.
    assert costs.num_weights >= learning + 2 * (16 + 32 + 64 + 24) + 4
    assert costs.num_slots == learning
    assert costs.input_bytes == 32 * 32 * 3 + 4 * 4
    # Each image of a row goes through the backbone.
    four = of(spec(**TINY, model__numeric__kind="none", prepare__image_columns=list("abcd")))
    assert flops_of(four) - dense == 4 * 2 * convolutions


def check_against_published(kind: str, costs: ModelCosts) -> None:
    assert flops_of(costs) / 2 == pytest.approx(PUBLISHED_MACS[kind], rel=0.05)
    # Above the backbone: a dense layer, its batch norm, the head, blend and calibration.
    assert costs.num_weights == pytest.approx(PUBLISHED_WEIGHTS[kind], rel=0.005)


def test_a_vision_transformer_has_the_published_operations_and_weights():
    check_against_published("vit_base", of(alone("vit_base")))


def test_a_text_backbone_has_the_operations_of_its_formula():
    """Devlin et al. 2019, BERT-base: 12 layers of 768 features and 3,072 inside, here 64 tokens."""
    texts = {"data__text": ["note"], "data__text_length": 64, "model__text__kind": "bert_base"}
    run = spec(model__image__kind="none", **texts)
    costs = model_costs(run, planned_manifest(run, 1000, 1))[0]
    tokens, width = 64, 768
    dense = 12 * (4 * width**2 + 2 * width * 3072) * tokens
    attention = 12 * 2 * tokens**2 * width
    assert flops_of(costs) / 2 == pytest.approx(dense + attention, rel=0.01)
    two = spec(model__image__kind="none", **{**texts, "data__text": ["note", "title"]})
    twice = model_costs(two, planned_manifest(two, 1000, 1))[0]
    assert flops_of(twice) == pytest.approx(2 * flops_of(costs), rel=0.01)
    frozen = spec(model__image__kind="none", model__text__trainable=False, **texts)
    layers = model_costs(frozen, planned_manifest(frozen, 1000, 1))[0].layers
    assert sum(layer.flops for layer in layers if layer.learns) < 0.01 * flops_of(costs)
    # The words of the published weights, of which 5 are special.
    known = spec(model__image__kind="none", model__text__weights="preset:x", **texts)
    pretrained = model_costs(known, planned_manifest(known, 1000, 1))[0]
    assert pretrained.num_weights - costs.num_weights == (30_522 - 8000) * width


def check_rows_per_s(kind: str, costs: ModelCosts, half: ModelCosts) -> None:
    machines = read_machines(str(TABLE))
    for gpu, precision, rows, published in PUBLISHED_ROWS_PER_S[kind]:
        run = alone(kind).overlay(
            {"train.use_gpu": True, "train.global_batch_size": rows, "train.precision": precision}
        )
        model = costs if precision == "float32" else half
        machine = machines[gpu].model_copy(update={"memory_gib": MEMORY_GIB[gpu]})
        (stage,) = Estimator(run, gpu, machine, [model], manifest(run, 2000)).plan().stages
        ratio = rows / stage.compute_s / published
        assert 1 / WITHIN < ratio < WITHIN, (gpu, precision, ratio)
        # These runs fitted, and were about as large as possible.
        assert stage.memory.total < stage.memory.capacity < 2 * stage.memory.total


def test_efficientnet_b0_has_the_published_operations_weights_and_step_times(b0):
    check_against_published("efficientnet_b0", b0)
    half = of(alone("efficientnet_b0", train__precision="mixed_float16"))
    check_rows_per_s("efficientnet_b0", b0, half)


@pytest.mark.slow
def test_efficientnet_b5_has_the_published_operations_and_weights():
    check_against_published("efficientnet_b5", of(alone("efficientnet_b5")))


@pytest.mark.slow
def test_efficientnet_b4_has_the_published_step_times():
    costs = [of(alone("efficientnet_b4", train__precision=p)) for p in ("float32", "mixed_float16")]
    check_rows_per_s("efficientnet_b4", *costs)


def test_no_layer_below_the_first_trainable_one_has_a_gradient():
    run = spec(**TINY, train__epochs=5, train__stages=[
        {"epochs": 1, "backbone": 0}, {"epochs": 2, "backbone": 0.4}, {"epochs": 2},
    ])  # fmt: skip
    stages = model_costs(run, manifest(run))
    assert [stage.epochs for stage in stages] == [1, 2, 2]
    learning = [sum(layer.learns for layer in stage.layers) for stage in stages]
    assert learning[0] < learning[1] < learning[2] < len(stages[2].layers)
    assert stages[0].num_learning < stages[1].num_learning < stages[2].num_learning
    # The optimizer has slots for all weights that learn in any stage.
    assert {stage.num_slots for stage in stages} == {2 * stages[2].num_learning}
    (frozen,) = model_costs(spec(**TINY, model__image__trainable=False), manifest(run))
    assert frozen.num_learning == stages[0].num_learning


@pytest.mark.parametrize(
    ("optimizer", "ema_momentum", "slots"),
    [("adam", None, 2), ("lamb", None, 2), ("sgd", None, 1), ("sgd", 0.99, 2)],
)
def test_slots_are_counted_in_the_optimizer_itself(optimizer, ema_momentum, slots):
    costs = of(spec(**TINY, train__optimizer=optimizer, train__ema_momentum=ema_momentum))
    assert costs.num_slots == slots * costs.num_learning


def test_half_precision_halves_the_bytes_of_all_but_pixels():
    full, half = (of(spec(**TINY, train__precision=p)) for p in ("float32", "mixed_bfloat16"))
    kept = [sum(layer.kept_bytes for layer in c.layers if layer.learns) for c in (full, half)]
    assert 0.5 <= kept[1] / kept[0] < 0.6
    assert full.num_weights == half.num_weights


def test_an_impossible_model_is_refused_with_the_reason():
    stages = [{"epochs": 1, "backbone": 1}, {"epochs": 1}]
    run = spec(**TINY, model__image__trainable=False, train__stages=stages)
    message = r"cannot be built: backbone=1 in train\.stages unfreezes the backbone"
    with pytest.raises(JobError, match=message):
        model_costs(run, manifest(run))
