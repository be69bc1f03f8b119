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


def test_there_are_specs_to_test():
    assert YAMLS


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_every_spec_that_is_shipped_is_valid(path):
    spec = parse(RunSpec, [str(path)])
    assert spec != RunSpec()


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
def test_a_spec_survives_json_and_yaml(spec):
    tree = spec.model_dump(mode="json")
    assert type(spec).model_validate(tree) == spec
    assert type(spec).model_validate(yaml.safe_load(yaml.safe_dump(tree))) == spec
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec


def test_a_spec_cannot_be_changed_in_place():
    with pytest.raises(ValidationError, match="frozen"):
        RunSpec().train.epochs = 3  # type: ignore[misc]


def test_overlay_replaces_values_by_path_and_nothing_else():
    spec = CHANGED.overlay({"train.learning_rate": 1e-3, "model.numeric.units": (4, 2)})
    assert (spec.train.learning_rate, spec.model.numeric.units) == (1e-3, (4, 2))
    back = {"train.learning_rate": 0.1 + 0.2, "model.numeric.units": [8]}
    assert spec.overlay(back) == CHANGED


def test_overlay_takes_the_numbers_of_a_search():
    spec = RunSpec().overlay({"train.epochs": np.int64(3), "model.l2": np.float64(0.5)})
    assert (spec.train.epochs, spec.model.l2) == (3, 0.5)


def test_overlay_of_nothing_gives_an_equal_spec():
    assert CHANGED.overlay({}) == CHANGED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.epoch": 3}, "train.epoch: train has no key 'epoch'; did you mean 'epochs'?"),
        ({"train.epochs": 0}, "train.epochs=0: Input should be greater than 0"),
        ({"train.epochs.most": 3}, r"train.epochs: Input should be a valid integer"),
        ({"train.num_workers": 5}, "num_workers=5 cannot share global_batch_size=32 evenly"),
    ],
)
def test_overlay_refuses_what_the_command_line_would_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        RunSpec().overlay(changes)


@pytest.mark.parametrize(
    ("batch", "workers", "allowed"),
    [(32, 3, "1, 2, 4, 8, 16, 32"), (67, 67, "1"), (96, 32, "1, 2, 3, 4, 6, 8, 12, 16, 24, 48")],
)
def test_workers_that_cannot_share_the_batch_are_told_which_numbers_can(batch, workers, allowed):
    message = f"num_workers={workers} cannot share global_batch_size={batch} evenly; it can be "
    with pytest.raises(ValueError, match=rf"{message}{allowed} \["):
        TrainSpec(global_batch_size=batch, num_workers=workers)


def test_between_the_least_and_the_most_workers_one_number_must_share_the_batch():
    spec = TrainSpec(global_batch_size=32, num_workers=(3, 9))
    assert spec.workers_range == (3, 9)
    with pytest.raises(ValueError, match="num_workers=5,7 cannot share global_batch_size=32"):
        TrainSpec(global_batch_size=32, num_workers=(5, 7))
    with pytest.raises(ValueError, match="num_workers=4,2: the least is more than the most"):
        TrainSpec(global_batch_size=32, num_workers=(4, 2))


def test_replicas_and_parts_of_a_step_must_share_it_too():
    gpus = {"use_gpu": True, "gpus_per_worker": 2}
    assert TrainSpec(global_batch_size=16, **gpus, accumulate_steps=2).allowed_workers() == [
        1,
        2,
        4,
    ]
    message = "cannot be split into accumulate_steps=3 parts for each of 2 replicas"
    with pytest.raises(ValueError, match=message):
        TrainSpec(global_batch_size=32, **gpus, accumulate_steps=3)


def test_stages_must_all_be_reached():
    stages = [{"epochs": 3, "backbone": 0}, {"epochs": 1}]
    assert TrainSpec.model_validate({"epochs": 4, "stages": stages}).stages[0].backbone == 0
    with pytest.raises(ValueError, match="those before the last take 3 of epochs=3"):
        TrainSpec.model_validate({"epochs": 3, "stages": stages})


def test_fractions_that_leave_nothing_to_train_on_are_refused():
    message = r"validation_fraction=0.5 and test_fraction=0.5 leave nothing to train on"
    with pytest.raises(ValueError, match=message):
        PrepareSpec(validation_fraction=0.5, test_fraction=0.5)


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", ".."])
def test_the_name_of_a_run_is_one_folder_name(name):
    with pytest.raises(ValueError, match="a run's name is one folder name"):
        RunSpec.model_validate({"run": {"name": name}})
