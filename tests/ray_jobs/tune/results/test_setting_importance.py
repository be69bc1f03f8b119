import logging
import random

import pytest

from ray_jobs.tune.results.setting_importance import importances
from tests.ray_jobs.tune.rows import search, trial


def of(score, draw, num_trials=40):
    dice = random.Random(1)
    points = [draw(dice) for _ in range(num_trials)]
    return search(*(trial(i, score(values), values) for i, values in enumerate(points)))


@pytest.mark.parametrize(
    "choices", [(True, False), ("x", None, [1, 2]), (16, 64), (1, "1e3"), (0.1, 0.5, 0.2)]
)
def test_values_of_every_kind_can_matter(choices):
    found = importances(
        of(
            lambda v: float(choices.index(v["kind"])),
            lambda r: {"kind": r.choice(choices), "idle": r.randrange(4)},
        )
    )
    assert found["kind"] > 0.8
    assert found["idle"] < 0.1


def test_a_setting_that_alone_determines_the_score_has_nearly_all_of_the_importance():
    found = importances(
        of(lambda v: (v["a"] - 0.3) ** 2, lambda r: {"b": r.random(), "a": r.random(), "c": 7})
    )
    assert next(iter(found)) == "a"
    assert found["a"] > 0.8
    assert found["b"] < 0.1
    assert found["c"] == 0
    assert sum(found.values()) == pytest.approx(1)


def test_each_power_of_ten_counts_alike():
    # Of the range from 1e-5 to 1 read as it is, what is below 1e-3 would be next to nothing.
    found = importances(
        of(
            lambda v: (v["rate"] < 1e-3) + 0.3 * (v["b"] > 0.5),
            lambda r: {"rate": 10 ** r.uniform(-5, 0), "b": r.random()},
        )
    )
    assert found["rate"] > 0.8


@pytest.mark.parametrize(
    ("score", "optimizer", "momentum"),
    [
        (lambda v: float(v["optimizer"] == "sgd"), (0.8, 1), (0, 0.1)),
        # Of both: by the formula, three quarters are the optimizer's.
        (lambda v: v["momentum"] + 0.5 if "momentum" in v else 0.5, (0.55, 0.95), (0.05, 0.45)),
        (lambda v: v.get("momentum", 0.5), (0, 0.4), (0.6, 1)),
    ],
)
def test_a_setting_that_only_some_trials_have_gets_its_own_share_only(score, optimizer, momentum):
    def conditional(dice):
        values = {"optimizer": dice.choice(["adamw", "sgd"]), "idle": dice.random()}
        return values | ({"momentum": dice.random()} if values["optimizer"] == "sgd" else {})

    found = importances(of(score, conditional))
    assert optimizer[0] <= found["optimizer"] <= optimizer[1]
    assert momentum[0] <= found["momentum"] <= momentum[1]
    assert found["idle"] < 0.2


def test_one_diverged_trial_is_not_all_the_variance():
    found = of(lambda v: v["a"], lambda r: {"a": r.random(), "b": 0.9 * r.random()})
    found.trials[5] = trial(5, 1e9, {"a": 0.5, "b": 1.0})
    found.trials[6].scores["val/log_loss"] = float("nan")
    assert importances(found)["a"] > 0.8


def test_the_same_search_gives_the_same_shares_and_optuna_says_nothing(caplog, capsys):
    import optuna

    level = optuna.logging.get_verbosity()
    found = of(lambda v: v["a"] * v["b"], lambda r: {"a": r.random(), "b": r.random()}, 12)
    with caplog.at_level(logging.DEBUG):
        assert importances(found) == importances(found)
    assert capsys.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == level
