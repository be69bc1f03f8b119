import numpy as np
import pytest
import yaml

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
    searched = {
        "train.learning_rate": {"loguniform": [1e-5, 1e-2]},
        "model.dropout": {"uniform": [0, 0.5]},
    }
    given = [{"model.dropout": 0.1}, {"train.learning_rate": 1e-3}]
    assert Space(spec_with(searched, first=given)).first == [
        {"train.learning_rate": 1e-4, "model.dropout": 0.3},
        {"train.learning_rate": 1e-4, "model.dropout": 0.1},
        {"train.learning_rate": 1e-3, "model.dropout": 0.3},
    ]


def test_a_conditional_setting_has_a_value_only_if_its_condition_holds():
    when = {"train.optimizer": ["adamw", "lamb"]}
    searched = {
        # Listed before the setting that it depends on.
        "train.weight_decay": {"uniform": [0, 0.1], "when": when},
        "train.optimizer": {"choice": ["adam", "adamw"]},
    }
    space = Space(spec_with(searched))
    every = [random_values(space, seed) for seed in range(20)]
    assert {values["train.optimizer"] for values in every} == {"adam", "adamw"}
    for values in every:
        assert ("train.weight_decay" in values) == (values["train.optimizer"] == "adamw")
    assert space.spec_of({"train.optimizer": "adam"}).train.weight_decay == 0.01
    # A condition on the specification's own value.
    when = {"train.optimizer": "sgd"}
    space = Space(spec_with({"train.momentum": {"uniform": [0.5, 0.9], "when": when}}))
    assert random_values(space, 0) == {}
    assert space.first == [{}]


def test_the_grid_contains_each_distinct_combination_once():
    searched = {
        "train.optimizer": {"choice": ["adam", "sgd"]},
        "train.momentum": {"choice": [0.5, 0.9], "when": {"train.optimizer": "sgd"}},
        "train.epochs": {"randint": [5, 7]},
    }
    grid = list(Space(spec_with(searched, searcher="grid")).grid())
    assert len(grid) == 2 + 2 * 2
    assert all(("train.momentum" in v) == (v["train.optimizer"] == "sgd") for v in grid)


def test_values_of_dependent_settings_are_validated_together():
    # `tiny` has no ImageNet weights, so the values are valid only under the condition.
    kind = {"model.image.kind": {"choice": ["efficientnet_b0", "tiny"]}}
    weights = {
        "model.image.weights": {"choice": ["none"], "when": {"model.image.kind": "tiny"}},
    }
    tree = {"model": {"image": {"kind": "efficientnet_b0"}}}
    spec = validate_spec(SearchSpec, tree | {"tune": {"space": kind | weights}})
    assert Space(spec).spec_of({"model.image.kind": "tiny", "model.image.weights": "none"})
    message = r"tune.space: model.image.*'tiny' has no imagenet weights"
    with pytest.raises(UsageError, match=message):
        validate_spec(SearchSpec, tree | {"tune": {"space": kind}})


@pytest.mark.parametrize(
    ("tune", "space", "message"),
    [
        ("", "train.learning_rat: {choice: [1]}", "did you mean 'train.learning_rate'?"),
        ("", "train.epochs: {choice: [1], when: {train.optimiser: 1}}", "mean 'train.optimizer'?"),
        ("", "train.patience: {randint: [-1, 1]}", "tune.space: train.patience=-1: Input should"),
        ("", "train.epochs: {uniform: [1, 10]}", "tune.space: train.epochs=4.4.*valid integer"),
        ("", "model.image.kind: {choice: [tiny, b9]}", "unknown image branch 'b9'"),
        ("", "train.epochs: {randint: [5, 5]}", "lower bound 5 must be below the upper bound 5"),
        ("", "train.epochs: {choice: [1], randint: [1, 2]}", "not randint and choice"),
        ("", "train.epochs: {choice: []}", "choice needs at least one value"),
        ("", "run.seed: {randint: [0, 5]}", "cannot search over run.seed"),
        (
            "",
            "train.optimizer: {choice: [sgd], when: {train.momentum: 0.9}}\n"
            "train.momentum: {choice: [0.9], when: {train.optimizer: sgd}}",
            "the `when` conditions of train.optimizer, train.momentum form a cycle",
        ),
        ("searcher: grid", "model.dropout: {uniform: [0, 0.5]}", "cannot enumerate model.dropout"),
        ("scheduler: pbt", "train.epochs: {randint: [1, 5]}", "not fit other values of train.epoc"),
        ("scheduler: pbt", "model.dropout: {uniform: [0, 0.5]}", "model.dropout must stay above 0"),
        ("scheduler: pb2", "model.l2: {choice: [0.5]}", "supports only uniform and loguniform"),
        (
            "scheduler: pbt",
            "train.momentum: {uniform: [0.5, 0.9], when: {train.optimizer: sgd}}",
            "does not support `when`",
        ),
        ("first: [{model.dropout: 0.1}]", "", "point 1: tune.space does not contain model.dropout"),
        ("first: [{train.epochs: 0}]", "train.epochs: {choice: [1, 2]}", "point 1: train.epochs=0"),
        ("metrics: [val/log_loss, val/log_loss]", "", "contains duplicates"),
        (
            "{metrics: [val/log_loss, val/roc_auc], searcher: cmaes}",
            "",
            "cmaes supports only one metric",
        ),
    ],
)
def test_an_invalid_search_is_rejected_with_a_message(tune, space, message):
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        spec_with(yaml.safe_load(space) or {}, **(yaml.safe_load(tune) or {}))


def test_a_distribution_enumerates_and_checks_its_values():
    assert DistributionSpec(randint=(2, 5)).values() == (2, 3, 4)
    assert DistributionSpec(quniform=(0, 0.5, 0.2)).values() == (0, 0.2, 0.4)
    assert DistributionSpec(quniform=(0, 0.5, 0.2)).contains(0.4)
    assert not DistributionSpec(quniform=(0, 0.5, 0.2)).contains(0.5)
    assert DistributionSpec(lograndint=(1, 9)).contains(8)
    assert not DistributionSpec(lograndint=(1, 9)).contains(9)
    assert DistributionSpec(loguniform=(1e-5, 1e-2)).contains(1e-5)
