import pytest

from ray_jobs.config.command_line import validate_spec
from ray_jobs.config.spec import RunSpec
from ray_jobs.tune.search.searcher import make_searcher
from ray_jobs.tune.search.space import Space

SPACE = {
    "train.learning_rate": {"loguniform": [1e-3, 1e-1]},
    "model.dropout": {"quniform": [0, 0.5, 0.1]},
    "train.optimizer": {"choice": ["adam", "adamw"]},
    "train.weight_decay": {"uniform": [0, 0.1], "when": {"train.optimizer": "adamw"}},
    "train.epochs": {"lograndint": [1, 100]},
    "model.numeric.units": {"choice": [[8], [16, 8]]},
}
DROPOUT = {"model.dropout": {"uniform": [0, 0.9]}}


def make(space=SPACE, **tune):
    tree = {
        "model": {"image": {"kind": "tiny", "weights": None}},
        "tune": {"space": space, **tune},
    }
    spec = validate_spec(RunSpec, tree)
    metrics = spec.tune.metrics or ("val/log_loss",)
    return make_searcher(Space(spec), spec.tune, metrics), Space(spec)


def score(values) -> float:
    return abs(values.get("model.dropout", 0.0) - 0.4)


def suggest(searcher, names, learn=True) -> list[dict]:
    tried = []
    for name in names:
        values = searcher.suggest(name)
        tried.append(values)
        if learn:
            searcher.on_trial_complete(name, {"best/val/log_loss": score(values)})
    return tried


@pytest.mark.parametrize("searcher", ["tpe", "random", "cmaes", "nsga2"])
def test_suggestions_are_in_the_space_and_determined_by_the_seed(searcher):
    one, space = make(searcher=searcher, seed=3)
    tried = suggest(one, map(str, range(25)))
    # The spec's own values come first, although their learning rate is outside the space.
    assert tried[0] == {
        "train.learning_rate": 1e-4, "model.dropout": 0.3, "train.optimizer": "adam",
        "train.epochs": 50, "model.numeric.units": [256, 128],
    }  # fmt: skip
    for values in tried[1:]:
        assert space.contains(values)
        assert ("train.weight_decay" in values) == (values["train.optimizer"] == "adamw")
        space.spec_of(values)
    assert suggest(make(searcher=searcher, seed=3)[0], map(str, range(25))) == tried
    assert suggest(make(searcher=searcher, seed=4)[0], map(str, range(25)))[1:] != tried[1:]


SMALL = {"train.optimizer": SPACE["train.optimizer"], "train.epochs": {"randint": [3, 12]}}


@pytest.mark.parametrize("searcher", ["tpe", "random", "grid"])
def test_a_restored_searcher_continues_with_the_same_suggestions(tmp_path, searcher):
    space = SMALL if searcher == "grid" else SPACE
    whole = suggest(make(space, searcher=searcher)[0], map(str, range(14)))
    first = make(space, searcher=searcher)[0]
    begun = suggest(first, map(str, range(6)))
    first.save(str(tmp_path / "state"))
    second = make(space, searcher=searcher)[0]
    second.restore(str(tmp_path / "state"))
    assert begun + suggest(second, map(str, range(6, 14))) == whole


@pytest.mark.parametrize("searcher", ["tpe", "grid"])
@pytest.mark.parametrize("num_trials", [0, 1, 3, 5])
def test_a_state_from_another_moment_than_the_trials_loses_and_repeats_no_suggestion(
    tmp_path, searcher, num_trials
):
    whole = suggest(make(SMALL, searcher=searcher)[0], map(str, range(9)), learn=False)
    first = make(SMALL, searcher=searcher)[0]
    suggest(first, "012", learn=False)
    first.save(str(tmp_path / "state"))
    second = make(SMALL, searcher=searcher)[0]
    second.restore(str(tmp_path / "state"))
    second.reconcile({str(i): whole[i] for i in range(num_trials)})
    assert suggest(second, map(str, range(num_trials, 9)), learn=False) == whole[num_trials:]


def test_a_study_takes_over_the_values_of_a_trial_that_it_would_choose_differently(tmp_path):
    searcher, _ = make(DROPOUT)
    searcher.reconcile({"a": {"model.dropout": 0.3}, "b": {"model.dropout": 0.125}})
    searcher.on_trial_complete("b", {"best/val/log_loss": 0.25})
    learned = [trial.params for trial in searcher.study.trials if trial.value == 0.25]
    assert learned == [{"model.dropout": 0.125}]


def test_a_restored_study_learns_from_trials_that_were_running(tmp_path):
    first, _ = make()
    suggest(first, ["a", "b"], learn=False)
    first.save(str(tmp_path / "state"))
    second, _ = make()
    second.restore(str(tmp_path / "state"))
    second.on_trial_complete("b", {"best/val/log_loss": 0.25})
    assert [t.value for t in second.study.trials if t.state.is_finished()] == [0.25]


def test_tpe_learns_from_results_and_random_search_does_not():
    late = {"tpe": 0.0, "random": 0.0}
    for name in late:
        for seed in range(3):
            searcher, _ = make(DROPOUT, searcher=name, seed=seed)
            late[name] += sum(map(score, suggest(searcher, map(str, range(40)))[20:]))
    assert late["tpe"] < 0.6 * late["random"]


def test_failed_trials_differ_from_trials_that_ended_while_paused():
    searcher, _ = make(DROPOUT)
    for name in "abcd":
        searcher.suggest(name)
    searcher.on_trial_result("a", {"best/val/log_loss": 0.5})
    searcher.on_trial_complete("a")  # Ended while paused: its last result counts.
    searcher.on_trial_complete("b", error=True)
    searcher.on_trial_complete("c", {"error": "ValueError: nan"})
    searcher.on_trial_complete("d", {"best/val/log_loss": 0.25})
    states = [trial.state.name for trial in searcher.study.trials]
    assert states == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    assert [trial.value for trial in searcher.study.trials] == [0.5, None, None, 0.25]


def test_the_study_receives_each_objective_with_its_direction():
    searcher, _ = make(DROPOUT, metrics=["val/roc_auc", "inference/row_s"])
    searcher.suggest("a")
    searcher.on_trial_complete("a", {"best/val/roc_auc": 0.9, "best/inference/row_s": 0.01})
    assert [d.name for d in searcher.study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert searcher.study.trials[0].values == [0.9, 0.01]


@pytest.mark.parametrize("searcher", ["tpe", "grid"])
def test_none_can_be_a_choice(searcher):
    spaces = {
        "train.ema_momentum": {"choice": ["none", 0.99]},
        "train.class_weight": {"choice": ["none", "balanced"]},
    }
    one, space = make(spaces, searcher=searcher)
    tried = suggest(one, "abcd", learn=False)
    # `none` means no value for the first setting and is a literal value of the second.
    assert tried[0] == {"train.ema_momentum": None, "train.class_weight": "balanced"}
    assert {values["train.ema_momentum"] for values in tried} <= {None, 0.99}
    assert {values["train.class_weight"] for values in tried} <= {"none", "balanced"}
    for values in tried:
        space.spec_of(values)
    if searcher == "grid":
        assert len({str(values) for values in tried}) == 4
        assert one.suggest("e") == "FINISHED"
