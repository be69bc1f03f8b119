from itertools import product

import pytest

from ray_jobs.config.spec import RunSpec
from ray_jobs.tune.search.feature_trials import (
    _combinations,
    affects_features,
    features_key,
    is_frozen,
    should_use_features,
)
from ray_jobs.tune.search.space import Space

FROZEN = {"kind": "efficientnet_b0", "weights": None, "trainable": False}


def space_of(space: dict, image: dict = FROZEN) -> tuple[RunSpec, Space]:
    spec = RunSpec.model_validate({"model": {"image": image}, "tune": {"space": space}})
    return spec, Space(spec)


def test_the_features_of_every_trial_are_computed():
    spec, space = space_of(
        {
            "model.image.kind": {"choice": ["efficientnet_b0", "tiny"]},
            # Affects only `tiny`, which is not the spec's own kind.
            "model.activation": {"choice": ["relu", "silu"]},
            "model.dropout": {"uniform": [0, 0.5]},
        }
    )
    assert should_use_features(spec, space)
    computed = {features_key(values, space) for values in _combinations(space)}
    for kind, activation in product(["efficientnet_b0", "tiny"], ["relu", "silu"]):
        trial = {"model.image.kind": kind, "model.activation": activation, "model.dropout": 0.1}
        assert features_key(trial, space) in computed
    assert len(computed) == 4


def test_trials_train_on_images_if_features_cannot_distinguish_them():
    for space in (
        {"model.image.trainable": {"choice": [True, False]}},
        {"model.image.kind": {"choice": ["none", "tiny"]}},
        {"model.augmentation.rotation": {"uniform": [0, 0.5]}},
        {"train.cutmix_alpha": {"choice": [0, 1.0]}},
    ):
        assert not should_use_features(*space_of(space)), space
    assert should_use_features(*space_of({"model.dropout": {"uniform": [0, 0.5]}}))
    trainable, without = {**FROZEN, "trainable": True}, {"kind": "none"}
    for image in (trainable, without):
        assert not should_use_features(*space_of({"model.dropout": {"uniform": [0, 0.5]}}, image))


@pytest.mark.parametrize(
    ("trainable", "backbone_rates", "frozen"),
    [
        (False, [], True),
        (True, [], False),
        (True, [0], True),
        (True, [1], False),
        (True, [0.1, 0], False),
    ],
)
def test_a_backbone_counts_as_frozen_if_its_first_stage_freezes_it(
    trainable, backbone_rates, frozen
):
    stages = [{"epochs": 1, "backbone": rate} for rate in backbone_rates]
    spec, _ = space_of({}, {**FROZEN, "trainable": trainable})
    assert is_frozen(spec.overlay({"train.stages": stages})) == frozen


def test_settings_of_data_and_backbone_affect_features():
    _, space = space_of({"model.image.kind": {"choice": ["efficientnet_b0", "tiny"]}})
    for path in ("image.kind", "image.weights", "augmentation.zoom", "activation"):
        assert affects_features(f"model.{path}", space)
    assert affects_features("data.image_size", space)
    for path in ("image.units", "dropout", "fusion.kind"):
        assert not affects_features(f"model.{path}", space)
    for path in ("data.prefetch_batches", "run.storage_path", "train.learning_rate"):
        assert not affects_features(path, space)
    # Only `tiny` uses the activation.
    for kind, affects in (("tiny", True), ("mobilenet_v3_small", False)):
        _, space = space_of({}, {**FROZEN, "kind": kind})
        assert affects_features("model.activation", space) == affects
