from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from ray_jobs.config.spec import RunSpec
from ray_jobs.config.tune_spec import DistributionSpec
from ray_jobs.tune.search.scheduler import EPOCHS, clip_to_space, make_scheduler
from ray_jobs.tune.search.scheduler_state import dump_scheduler, restore_scheduler

SPACE = {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}}
LOSS = "val/log_loss"


class Controller:
    """The part of Tune's controller that schedulers use."""

    search_alg = None

    def __init__(self, trials: list[Trial]) -> None:
        self.trials = trials

    def get_trials(self) -> list[Trial]:
        return self.trials

    def get_live_trials(self) -> set[Trial]:
        return {trial for trial in self.trials if not trial.is_finished()}

    def _set_trial_status(self, trial: Trial, status: str) -> None:
        trial.set_status(status)

    def _schedule_trial_save(self, trial: Trial, result: dict[str, Any]) -> None:
        return None


def trials_of(names: str) -> list[Trial]:
    config = {"train.learning_rate": 1e-3}
    return [Trial("Trial", trial_id=name, config=dict(config), stub=True) for name in names]


def add_trials(scheduler: TrialScheduler, trials: list[Trial]) -> Controller:
    controller = Controller(trials)
    for trial in trials:
        scheduler.on_trial_add(controller, trial)
    return controller


def result(epochs: int, loss: float) -> dict[str, Any]:
    return {
        EPOCHS: epochs,
        "val/log_loss": loss,
        "best/val/log_loss": loss,
        "training_iteration": 1,
    }


def spec_with(**tune: Any) -> RunSpec:
    return RunSpec.model_validate(
        {
            "model": {"image": {"kind": "tiny", "weights": None}},
            "train": {"epochs": 9},
            "tune": {"space": SPACE, **tune},
        }
    )


def test_a_restored_asha_makes_the_same_decisions():
    spec = spec_with(scheduler="asha", grace_epochs=1)

    def decisions(scheduler, controller, names, losses):
        by_name = {trial.trial_id: trial for trial in controller.trials}
        return [
            scheduler.on_trial_result(controller, by_name[name], result(1, loss))
            for name, loss in zip(names, losses, strict=True)
        ]

    losses = [0.5, 0.4, 0.3, 0.6, 0.35, 0.2]
    whole = make_scheduler(spec, 9, LOSS)
    expected = decisions(whole, add_trials(whole, trials_of("abcdef")), "abcdef", losses)
    assert {"STOP", "CONTINUE"} == set(expected)
    first = make_scheduler(spec, 9, LOSS)
    begun = decisions(first, add_trials(first, trials_of("abcdef")), "abc", losses[:3])
    state = dump_scheduler(first, trials_of("abcdef"))
    second = make_scheduler(spec, 9, LOSS)
    controller = add_trials(second, trials_of("abcdef"))
    restore_scheduler(second, state, controller.trials)
    assert begun + decisions(second, controller, "def", losses[3:]) == expected
    # Without the state, it would judge only by the later results.
    third = make_scheduler(spec, 9, LOSS)
    assert (
        decisions(third, add_trials(third, trials_of("abcdef")), "def", losses[3:]) != expected[3:]
    )


@pytest.mark.parametrize("name", ["asha", "hyperband", "median", "pbt", "pb2", "fifo"])
def test_every_restored_scheduler_refers_to_the_new_trials(name):
    spec = spec_with(scheduler=name, perturbation_epochs=2)
    first = make_scheduler(spec, 9, LOSS)
    controller = add_trials(first, trials_of("ab"))
    for trial, loss in zip(controller.trials, (0.5, 0.4), strict=True):
        trial.set_status(Trial.RUNNING)
        first.on_trial_result(controller, trial, result(1, loss))
    state = dump_scheduler(first, controller.trials)
    second = make_scheduler(spec, 9, LOSS)
    trials = add_trials(second, trials_of("ab")).trials
    restore_scheduler(second, state, trials)
    held = {id(trial) for value in vars(second).values() for trial in trials_in(value)}
    assert held <= {id(trial) for trial in trials}
    assert held or name in ("asha", "fifo")


@pytest.mark.parametrize("name", ["asha", "hyperband", "median", "pbt", "pb2", "fifo"])
def test_restoring_an_older_state_keeps_new_trials_and_drops_deleted_ones(name):
    spec = spec_with(scheduler=name, perturbation_epochs=2)
    first = make_scheduler(spec, 9, LOSS)
    # `b` started after the snapshot of the trials, and `c` after that of the scheduler.
    state = dump_scheduler(first, add_trials(first, trials_of("ab")).trials)
    second = make_scheduler(spec, 9, LOSS)
    controller = add_trials(second, trials_of("ac"))
    restore_scheduler(second, state, controller.trials)
    for trial in controller.trials:
        trial.set_status(Trial.RUNNING)
        for epochs in (1, 2):
            second.on_trial_result(controller, trial, result(epochs, 0.5))
    held = [trial for value in vars(second).values() for trial in trials_in(value)]
    assert None not in held


def test_the_median_rule_accepts_a_failed_trial():
    scheduler = make_scheduler(spec_with(scheduler="median", grace_epochs=1), 9, LOSS)
    controller = add_trials(scheduler, trials_of("abc"))
    failed, *others = controller.trials
    scheduler.on_trial_complete(controller, failed, {"done": True, "error": "ValueError: nan"})
    for trial in others:
        # The rule pauses a trial while there are too few others to compare with.
        assert scheduler.on_trial_result(controller, trial, result(2, 0.5)) in ("CONTINUE", "PAUSE")


def test_hyperband_pauses_trials_again_that_were_paused():
    scheduler = make_scheduler(spec_with(scheduler="hyperband"), 9, LOSS)
    controller = add_trials(scheduler, trials_of("abc"))
    scheduler.paused = frozenset("ac")
    assert scheduler.choose_trial_to_run(controller) is controller.trials[1]
    states = [trial.status for trial in controller.trials]
    assert states == [Trial.PAUSED, Trial.PENDING, Trial.PAUSED]
    # Only once: a trial that is pending later stays so.
    controller.trials[0].set_status(Trial.PENDING)
    scheduler.choose_trial_to_run(controller)
    assert controller.trials[0].status == Trial.PENDING


def trials_in(value: Any) -> list[Trial]:
    if isinstance(value, Trial):
        return [value]
    if hasattr(value, "_live_trials"):
        return list(value._live_trials)
    if isinstance(value, dict):
        return [t for pair in value.items() for part in pair for t in trials_in(part)]
    if isinstance(value, list | tuple | set):
        return [trial for part in value for trial in trials_in(part)]
    return []


def test_asha_does_not_stop_a_trial_in_its_last_epoch():
    scheduler = make_scheduler(spec_with(scheduler="asha"), 9, LOSS)
    trial = trials_of("a")[0]
    controller = add_trials(scheduler, [trial])
    decisions = [
        scheduler.on_trial_result(controller, trial, result(epochs, 0.5)) for epochs in range(1, 10)
    ]
    assert set(decisions) == {"CONTINUE"}


def test_perturbed_values_are_clipped_to_the_space():
    space = {
        "train.learning_rate": DistributionSpec(loguniform=(1e-4, 1e-2)),
        "train.momentum": DistributionSpec(choice=(0.5, 0.9)),
        "model.l2": DistributionSpec(quniform=(0, 0.5, 0.2)),
    }
    config = {"train.learning_rate": 1.2e-2, "train.momentum": 0.9, "model.l2": 0.48}
    assert clip_to_space(space, config) == {
        "train.learning_rate": 1e-2,
        "train.momentum": 0.9,
        "model.l2": 0.4,
    }
    assert config["train.learning_rate"] == 1.2e-2
