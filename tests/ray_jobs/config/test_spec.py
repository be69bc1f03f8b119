from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

import ray_jobs
from ray_jobs.config.command_line import parse
from ray_jobs.config.spec import (
    DemoSpec,
    EvaluateSpec,
    PredictSpec,
    PrepareSpec,
    RunSpec,
    TrainSpec,
)
from ray_jobs.tune.search.space import SearchSpec

YAMLS = sorted((Path(ray_jobs.__file__).parent / "specs").glob("*.yaml"))

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


def test_presets_exist():
    assert YAMLS


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_every_preset_is_valid(path):
    spec = parse(SearchSpec, [str(path)])
    assert spec != SearchSpec()


@pytest.mark.parametrize(
    "spec",
    [
        RunSpec(),
        CHANGED,
        EvaluateSpec(run="r", data="d", output="o"),
        PredictSpec(run="r", data="d", output="o", split=None, images="{key}.jpg"),
        DemoSpec(),
    ],
)
def test_a_spec_round_trips_through_json_and_yaml(spec):
    tree = spec.model_dump(mode="json")
    assert type(spec).model_validate(tree) == spec
    assert type(spec).model_validate(yaml.safe_load(yaml.safe_dump(tree))) == spec
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec


def test_a_spec_is_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        RunSpec().train.epochs = 3  # type: ignore[misc]


def test_overlay_replaces_only_the_given_values():
    spec = CHANGED.overlay({"train.learning_rate": 1e-3, "model.numeric.units": (4, 2)})
    assert (spec.train.learning_rate, spec.model.numeric.units) == (1e-3, (4, 2))
    back = {"train.learning_rate": 0.1 + 0.2, "model.numeric.units": [8]}
    assert spec.overlay(back) == CHANGED


def test_overlay_accepts_numpy_numbers():
    spec = RunSpec().overlay({"train.epochs": np.int64(3), "model.l2": np.float64(0.5)})
    assert (spec.train.epochs, spec.model.l2) == (3, 0.5)


def test_an_empty_overlay_gives_an_equal_spec():
    assert CHANGED.overlay({}) == CHANGED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.epoch": 3}, "train: unknown setting 'epoch'; did you mean 'epochs'?"),
        ({"train.epochs": 0}, "train.epochs=0: Input should be greater than 0"),
        ({"train.epochs.most": 3}, r"train.epochs: Input should be a valid integer"),
        ({"train.num_workers": 5}, "global_batch_size=32 cannot be .* among num_workers=5"),
    ],
)
def test_overlay_validates_like_the_command_line(changes, message):
    with pytest.raises(ValueError, match=message):
        RunSpec().overlay(changes)


@pytest.mark.parametrize(
    ("batch", "workers", "allowed"),
    [
        (32, 3, "1, 2, 4, 8, 16 or 32"),
        (67, 67, "1"),
        (96, 32, "1, 2, 3, 4, 6, 8, 12, 16, 24 or 48"),
    ],
)
def test_the_error_for_workers_that_cannot_share_the_batch_contains_the_accepted_numbers(
    batch, workers, allowed
):
    message = f"global_batch_size={batch} cannot be divided equally among num_workers={workers}; "
    with pytest.raises(ValueError, match=rf"{message}use num_workers={allowed} \["):
        TrainSpec(global_batch_size=batch, num_workers=workers)


def test_a_range_of_workers_must_contain_a_number_that_can_share_the_batch():
    spec = TrainSpec(global_batch_size=32, num_workers=(3, 9))
    assert spec.workers_range == (3, 9)
    with pytest.raises(ValueError, match="divided equally among num_workers=5,7"):
        TrainSpec(global_batch_size=32, num_workers=(5, 7))
    with pytest.raises(ValueError, match="num_workers=4,2: the minimum exceeds the maximum"):
        TrainSpec(global_batch_size=32, num_workers=(4, 2))


def test_replicas_and_accumulation_must_share_the_batch_equally():
    gpus = {"use_gpu": True, "gpus_per_worker": 2}
    assert TrainSpec(global_batch_size=16, **gpus, accumulate_steps=2).allowed_workers() == [
        1,
        2,
        4,
    ]
    message = "cannot be split into accumulate_steps=3 parts for each of 2 replicas"
    with pytest.raises(ValueError, match=message):
        TrainSpec(global_batch_size=32, **gpus, accumulate_steps=3)


def test_all_stages_must_be_reachable():
    stages = [{"epochs": 3, "backbone": 0}, {"epochs": 1}]
    assert TrainSpec.model_validate({"epochs": 4, "stages": stages}).stages[0].backbone == 0
    with pytest.raises(ValueError, match="starts after epoch 3, but training ends after epochs=3"):
        TrainSpec.model_validate({"epochs": 3, "stages": stages})


def test_fractions_that_leave_no_rows_for_training_are_refused():
    message = r"validation_fraction=0.5 and test_fraction=0.5 leave no rows for training"
    with pytest.raises(ValueError, match=message):
        PrepareSpec(validation_fraction=0.5, test_fraction=0.5)


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", ".."])
def test_the_name_of_a_run_must_be_one_folder_name(name):
    with pytest.raises(ValueError, match="must be one folder name"):
        RunSpec.model_validate({"run": {"name": name}})
