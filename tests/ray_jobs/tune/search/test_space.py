import numpy as np
import pytest

from ray_jobs.config.command_line import validate_spec
from ray_jobs.config.errors import UsageError
from ray_jobs.config.tune_spec import DistributionSpec
from ray_jobs.tune.search.space import SearchSpec, Space

TINY = {"image": {"kind": "tiny", "weights": None}}


def spec_with(space, **tune) -> SearchSpec:
    return validate_spec(SearchSpec, {"model": TINY, "tune": {"space": space, **tune}})


def random_values(space: Space, seed: int) -> dict:
    rng = np.random.default_rng(seed)

    def suggest(path, values):
        if values.is_continuous:
            return float(rng.uniform(values.low, values.high))
        every = values.values()
        return every[rng.integers(len(every))]

    return space.values(suggest)


def test_the_first_trials_use_the_specs_own_values_then_the_given_points():
    space = Space(
        spec_with(
            {
                "train.learning_rate": {"loguniform": [1e-5, 1e-2]},
                "model.dropout": {"uniform": [0, 0.5]},
            },
            first=[{"model.dropout": 0.1}, {"train.learning_rate": 1e-3}],
        )
    )
    assert space.first == [
        {"train.learning_rate": 1e-4, "model.dropout": 0.3},
        {"train.learning_rate": 1e-4, "model.dropout": 0.1},
        {"train.learning_rate": 1e-3, "model.dropout": 0.3},
    ]


def test_a_conditional_setting_has_a_value_only_if_its_condition_holds():
    space = Space(
        spec_with(
            {
                # Listed before the setting that it depends on.
                "train.weight_decay": {
                    "uniform": [0, 0.1],
                    "when": {"train.optimizer": ["adamw", "lamb"]},
                },
                "train.optimizer": {"choice": ["adam", "adamw"]},
            }
        )
    )
    every = [random_values(space, seed) for seed in range(20)]
    assert {values["train.optimizer"] for values in every} == {"adam", "adamw"}
    for values in every:
        assert ("train.weight_decay" in values) == (values["train.optimizer"] == "adamw")
    assert space.spec_of({"train.optimizer": "adam"}).train.weight_decay == 0.01


def test_a_condition_can_refer_to_the_specs_own_value():
    space = Space(
        spec_with({"train.momentum": {"uniform": [0.5, 0.9], "when": {"train.optimizer": "sgd"}}})
    )
    assert random_values(space, 0) == {}
    assert space.first == [{}]


def test_the_grid_contains_each_distinct_combination_once():
    space = Space(
        spec_with(
            {
                "train.optimizer": {"choice": ["adam", "sgd"]},
                "train.momentum": {"choice": [0.5, 0.9], "when": {"train.optimizer": "sgd"}},
                "train.epochs": {"randint": [5, 7]},
            },
            searcher="grid",
        )
    )
    grid = list(space.grid())
    assert len(grid) == 2 + 2 * 2
    assert all(("train.momentum" in v) == (v["train.optimizer"] == "sgd") for v in grid)


def test_values_of_dependent_settings_are_validated_together():
    # `tiny` has no ImageNet weights, so the values are valid only under the condition.
    space = {
        "model.image.kind": {"choice": ["efficientnet_b0", "tiny"]},
        "model.image.weights": {"choice": ["none"], "when": {"model.image.kind": "tiny"}},
    }
    spec = validate_spec(
        SearchSpec, {"model": {"image": {"kind": "efficientnet_b0"}}, "tune": {"space": space}}
    )
    assert Space(spec).spec_of({"model.image.kind": "tiny", "model.image.weights": "none"})
    alone = {"model.image.kind": space["model.image.kind"]}
    with pytest.raises(
        UsageError, match=r"tune.space: model.image.*'tiny' has no imagenet weights"
    ):
        validate_spec(
            SearchSpec, {"model": {"image": {"kind": "efficientnet_b0"}}, "tune": {"space": alone}}
        )


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"train.learning_rat": {"uniform": [0, 1]}},
            "tune.space: no setting train.learning_rat; did you mean 'train.learning_rate'?",
        ),
        (
            {"train.momentum": {"uniform": [0, 0.9], "when": {"train.optimiser": "sgd"}}},
            "no setting train.optimiser; did you mean 'train.optimizer'?",
        ),
        (
            {"train.learning_rate": {"uniform": [-1, 1]}},
            "tune.space: train.learning_rate=-1.0: Input should be greater than 0",
        ),
        (
            {"model.dropout": {"uniform": [0, 1]}},
            "tune.space: model.dropout=1.0: Input should be less than 1",
        ),
        ({"train.epochs": {"uniform": [1, 10]}}, "tune.space: train.epochs=4.4.*valid integer"),
        (
            {"model.image.kind": {"choice": ["tiny", "efficientnet_b9"]}},
            "unknown image branch 'efficientnet_b9'; did you mean 'efficientnet_b7'",
        ),
        ({"train.epochs": {"randint": [5, 5]}}, "lower bound 5 must be below the upper bound 5"),
        ({"train.epochs": {}}, "give exactly one of uniform, loguniform"),
        (
            {"train.epochs": {"choice": [1], "randint": [1, 2]}},
            "give exactly one of .*, not randint and choice",
        ),
        ({"train.epochs": {"choice": []}}, "choice needs at least one value"),
        ({"train.epochs": {"unifrm": [1, 2]}}, "unknown setting 'unifrm'; did you mean 'uniform'?"),
        ({"run.seed": {"randint": [0, 5]}}, "cannot search over run.seed"),
        (
            {
                "train.optimizer": {"choice": ["sgd"], "when": {"train.momentum": 0.9}},
                "train.momentum": {"choice": [0.9], "when": {"train.optimizer": "sgd"}},
            },
            "the `when` conditions of train.optimizer, train.momentum form a cycle",
        ),
    ],
)
def test_an_invalid_space_is_rejected_with_a_message(space, message):
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        spec_with(space)


@pytest.mark.parametrize(
    ("space", "tune", "message"),
    [
        (
            {"model.dropout": {"uniform": [0, 0.5]}},
            {"searcher": "grid"},
            "searcher=grid cannot enumerate model.dropout",
        ),
        (
            {"train.epochs": {"randint": [1, 5]}},
            {"scheduler": "pbt"},
            "do not fit other values of train.epochs",
        ),
        (
            {"model.dropout": {"uniform": [0, 0.5]}},
            {"scheduler": "pbt"},
            "model.dropout must stay above 0",
        ),
        (
            {"train.momentum": {"choice": [0.5]}},
            {"scheduler": "pb2"},
            "pb2 supports only uniform and loguniform",
        ),
        (
            {"train.momentum": {"uniform": [0.5, 0.9], "when": {"train.optimizer": "sgd"}}},
            {"scheduler": "pbt"},
            "does not support `when`",
        ),
        (
            {"train.epochs": {"randint": [1, 5]}},
            {"first": [{"model.dropout": 0.1}]},
            "tune.first, point 1: tune.space does not contain model.dropout; leave it out",
        ),
        (
            {"train.epochs": {"randint": [1, 5]}},
            {"first": [{"train.epochs": 0}]},
            "tune.first, point 1: train.epochs=0",
        ),
        ({}, {"metrics": ["val/log_loss", "val/log_loss"]}, "contains duplicates"),
        (
            {},
            {"metrics": ["val/log_loss", "val/roc_auc"], "searcher": "cmaes"},
            "cmaes supports only one metric",
        ),
        ({}, {"budget": {"trials": 0}}, "tune.budget.trials=0"),
    ],
)
def test_conflicting_settings_are_rejected_with_a_message(space, tune, message):
    with pytest.raises(UsageError, match=message):
        spec_with(space, **tune)


def test_a_distribution_enumerates_and_checks_its_values():
    assert DistributionSpec(randint=(2, 5)).values() == (2, 3, 4)
    assert DistributionSpec(quniform=(0, 0.5, 0.2)).values() == (0, 0.2, 0.4)
    assert DistributionSpec(quniform=(0, 0.5, 0.2)).contains(0.4)
    assert not DistributionSpec(quniform=(0, 0.5, 0.2)).contains(0.5)
    assert DistributionSpec(lograndint=(1, 9)).contains(8)
    assert not DistributionSpec(lograndint=(1, 9)).contains(9)
    assert DistributionSpec(loguniform=(1e-5, 1e-2)).contains(1e-5)
    assert not DistributionSpec(choice=(1, 2)).contains(3)
