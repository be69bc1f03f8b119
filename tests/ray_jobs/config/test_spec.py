from pathlib import Path

import numpy as np
import pytest
import yaml

import ray_jobs
from ray_jobs.config.command_line import parse
from ray_jobs.config.spec import RunSpec, TrainSpec
from ray_jobs.tune.search.space import SearchSpec

CHANGED = RunSpec.model_validate(
    {
        "run": {"name": "a b", "seed": 3},
        "prepare": {"numeric_columns": ["a", "b"], "exclude_columns": ["c"], "max_bad_fraction": 1},
        "model": {"image": {"kind": "tiny", "weights": None}, "numeric": {"units": [8]}},
        "train": {
            "decision_threshold": "f1",
            "resources_per_worker": {"accelerator_type:A10G": 0.001},
            "learning_rate": 0.1 + 0.2,
        },
    }
)


def test_every_preset_is_valid():
    paths = sorted((Path(ray_jobs.__file__).parent / "specs").glob("*.yaml"))
    assert paths
    for path in paths:
        assert parse(SearchSpec, [str(path)]) != SearchSpec()


@pytest.mark.parametrize("spec", [RunSpec(), CHANGED])
def test_a_spec_round_trips_through_json_and_yaml(spec):
    tree = spec.model_dump(mode="json")
    assert type(spec).model_validate(yaml.safe_load(yaml.safe_dump(tree))) == spec
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec


def test_overlay_replaces_only_the_given_values():
    spec = CHANGED.overlay({"train.learning_rate": np.float64(1e-3), "model.numeric.units": (4, 2)})
    assert (spec.train.learning_rate, spec.model.numeric.units) == (1e-3, (4, 2))
    back = {"train.learning_rate": 0.1 + 0.2, "model.numeric.units": [8]}
    assert spec.overlay(back) == CHANGED.overlay({}) == CHANGED
    assert spec.overlay({"train.epochs": np.int64(3)}).train.epochs == 3


GPUS = {"use_gpu": True, "gpus_per_worker": 2}


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("train", {"num_workers": 3}, r"num_workers=3; use num_workers=1, 2, 4, 8, 16 or 32 \["),
        ("train", {"global_batch_size": 67, "num_workers": 67}, r"use num_workers=1 \["),
        ("train", {"num_workers": [5, 7]}, "divided equally among num_workers=5,7"),
        ("train", {"num_workers": [4, 2]}, "num_workers=4,2: the minimum exceeds the maximum"),
        (
            "train",
            {**GPUS, "accumulate_steps": 3},
            "cannot be split into accumulate_steps=3 parts for each of 2 replicas",
        ),
        (
            "train",
            {"epochs": 3, "stages": [{"epochs": 3, "backbone": 0}, {"epochs": 1}]},
            "starts after epoch 3, but training ends after epochs=3",
        ),
        (
            "prepare",
            {"validation_fraction": 0.5, "test_fraction": 0.5},
            "validation_fraction=0.5 and test_fraction=0.5 leave no rows for training",
        ),
        *(("run", {"name": name}, "one folder name") for name in ("", "a/b", ".hidden", "..")),
    ],
)
def test_values_that_contradict_each_other_are_refused_with_the_accepted_ones(
    section, values, message
):
    with pytest.raises(ValueError, match=message):
        RunSpec.model_validate({section: values})


def test_the_workers_and_replicas_that_can_share_the_batch_are_accepted():
    assert TrainSpec(global_batch_size=32, num_workers=(3, 9)).workers_range == (3, 9)
    train = TrainSpec(global_batch_size=16, **GPUS, accumulate_steps=2)
    assert train.allowed_workers() == [1, 2, 4]
    stages = [{"epochs": 3, "backbone": 0}, {"epochs": 1}]
    assert TrainSpec.model_validate({"epochs": 4, "stages": stages}).stages[0].backbone == 0
