from itertools import product

import pytest

from ray_jobs.config.spec import RunSpec
from ray_jobs.tune.search.feature_trials import (
    _combinations,
    affects_features,
    features_key,
    is_frozen,
    uses_features,
)
from ray_jobs.tune.search.space import Space

FROZEN = {"kind": "efficientnet_b0", "weights": None, "trainable": False}


def space_of(space: dict, image: dict = FROZEN) -> tuple[RunSpec, Space]:
    spec = RunSpec.model_validate({"model": {"image": image}, "tune": {"space": space}})
    return spec, Space(spec)


def test_every_trial_finds_its_features_among_those_that_are_computed():
    spec, space = space_of(
        {
            "model.image.kind": {"choice": ["efficientnet_b0", "tiny"]},
            # Of `tiny` alone, which the specification's own kind does not tell.
            "model.activation": {"choice": ["relu", "silu"]},
            "model.dropout": {"uniform": [0, 0.5]},
        }
    )
    assert uses_features(spec, space)
    computed = {features_key(values, space) for values in _combinations(space)}
    for kind, activation in product(["efficientnet_b0", "tiny"], ["relu", "silu"]):
        trial = {"model.image.kind": kind, "model.activation": activation, "model.dropout": 0.1}
        assert features_key(trial, space) in computed
    assert len(computed) == 4


def test_trials_see_images_where_features_cannot_tell_them_apart():
    for space in (
        {"model.image.trainable": {"choice": [True, False]}},
        {"model.image.kind": {"choice": ["none", "tiny"]}},
        {"model.augmentation.rotation": {"uniform": [0, 0.5]}},
        {"train.cutmix_alpha": {"choice": [0, 1.0]}},
    ):
        assert not uses_features(*space_of(space)), space
    assert uses_features(*space_of({"model.dropout": {"uniform": [0, 0.5]}}))
    learning = {**FROZEN, "trainable": True}
    assert not uses_features(*space_of({"model.dropout": {"uniform": [0, 0.5]}}, learning))


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
def test_a_backbone_is_frozen_that_stands_still_at_first(changes, frozen):
    spec, _ = space_of({})
    assert is_frozen(spec.overlay(changes)) == frozen


@pytest.mark.parametrize(
    ("path", "affects"),
    [
        ("model.image.kind", True),
        ("model.image.weights", True),
        ("model.image.units", False),
        ("model.image", True),
        ("model.augmentation.zoom", True),
        ("model.augmentation", True),
        ("model.activation", True),
        ("model.dropout", False),
        ("model.fusion.kind", False),
        ("data.image_size", True),
        ("data.prepared", True),
        ("data.prefetch_batches", False),
        ("run.seed", True),
        ("run.storage_path", False),
        ("train.learning_rate", False),
    ],
)
def test_settings_affect_features_or_do_not(path, affects):
    assert affects_features(path) == affects


def test_the_activation_affects_the_features_of_a_backbone_that_has_it():
    spec, _ = space_of({}, {**FROZEN, "kind": "tiny"})
    assert affects_features("model.activation", spec)
    spec = spec.overlay({"model.image.kind": "mobilenet_v3_small"})
    assert not affects_features("model.activation", spec)
    assert affects_features("model.image.kind", spec)
