from itertools import product

from ray_jobs.spec import RunSpec
from ray_jobs.tuning.cheap import _combinations, uses_features
from ray_jobs.tuning.space import Space
from ray_jobs.tuning.trial import features_key

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
