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
    trainable = {**FROZEN, "trainable": True}
    assert not should_use_features(*space_of({"model.dropout": {"uniform": [0, 0.5]}}, trainable))


@pytest.mark.parametrize(
    ("changes", "frozen"),
    [
        ({}, True),
        ({"model.image.trainable": True}, False),
        ({"model.image.kind": "none"}, False),
        ({"model.image.trainable": True, "train.stages": [{"epochs": 2, "backbone": 0}]}, True),
        ({"model.image.trainable": True, "train.stages": [{"epochs": 2}]}, False),
        (
            {
                "model.image.trainable": True,
                "train.stages": [{"epochs": 2, "backbone": 0.1}, {"epochs": 1, "backbone": 0}],
            },
            False,
        ),
    ],
)
def test_a_backbone_counts_as_frozen_if_its_first_stage_freezes_it(changes, frozen):
    spec, _ = space_of({})
    assert is_frozen(spec.overlay(changes)) == frozen


@pytest.mark.parametrize(
    ("path", "affects"),
    [
        ("model.image.kind", True),
        ("model.image.weights", True),
        ("model.image.units", False),
        ("model.augmentation.zoom", True),
        ("model.activation", True),
        ("model.dropout", False),
        ("model.fusion.kind", False),
        ("data.image_size", True),
        ("data.prefetch_batches", False),
        ("run.storage_path", False),
        ("train.learning_rate", False),
    ],
)
def test_settings_of_data_and_backbone_affect_features(path, affects):
    _, space = space_of({"model.image.kind": {"choice": ["efficientnet_b0", "tiny"]}})
    assert affects_features(path, space) == affects


def test_the_activation_affects_the_features_only_of_a_backbone_that_uses_it():
    _, space = space_of({}, {**FROZEN, "kind": "tiny"})
    assert affects_features("model.activation", space)
    _, space = space_of({}, {**FROZEN, "kind": "mobilenet_v3_small"})
    assert not affects_features("model.activation", space)
