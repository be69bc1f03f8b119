from typing import Any

import pytest
from ray.tune.experiment import Trial

from ray_jobs.config.spec import RunSpec
from ray_jobs.config.tune_spec import DistributionSpec
from ray_jobs.tune.search.scheduler import EPOCHS, clip_to_space, make_scheduler
from ray_jobs.tune.search.scheduler_state import dump_scheduler, restore_scheduler

SPACE = {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}}


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


def started(names: str, **tune: Any) -> tuple[Any, Controller]:
    """Return a scheduler to which trials were added, and its controller."""
    spec = RunSpec.model_validate(
        {
            "model": {"image": {"kind": "tiny", "weights": None}},
            "train": {"epochs": 9},
            "tune": {"space": SPACE, "perturbation_epochs": 2, **tune},
        }
    )
    scheduler, config = make_scheduler(spec, 9, "val/log_loss"), {"train.learning_rate": 1e-3}
    trials = [Trial("Trial", trial_id=name, config=dict(config), stub=True) for name in names]
    controller = Controller(trials)
    for trial in trials:
        scheduler.on_trial_add(controller, trial)
    return scheduler, controller


def result(epochs: int, loss: float) -> dict[str, Any]:
    scores = {"val/log_loss": loss, "best/val/log_loss": loss}
    return {EPOCHS: epochs, "training_iteration": 1, **scores}


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


def test_a_restored_asha_makes_the_same_decisions():
    losses = {"a": 0.5, "b": 0.4, "c": 0.3, "d": 0.6, "e": 0.35, "f": 0.2}

    def asha():
        return started("abcdef", scheduler="asha", grace_epochs=1)

    def decisions(scheduler, controller, names):
        return [
            scheduler.on_trial_result(controller, trial, result(1, losses[trial.trial_id]))
            for trial in controller.trials
            if trial.trial_id in names
        ]

    expected = decisions(*asha(), "abcdef")
    assert {"STOP", "CONTINUE"} == set(expected)
    first, controller = asha()
    begun = decisions(first, controller, "abc")
    state = dump_scheduler(first, controller.trials)
    second, controller = asha()
    restore_scheduler(second, state, controller.trials)
    assert begun + decisions(second, controller, "def") == expected
    # Without the state, it would judge only by the later results.
    assert decisions(*asha(), "def") != expected[3:]


@pytest.mark.parametrize("name", ["asha", "hyperband", "median", "pbt", "pb2", "fifo"])
def test_every_restored_scheduler_refers_to_the_trials_that_exist(name):
    def run(scheduler: Any, controller: Controller, *epochs: int) -> None:
        for number in epochs:
            for trial, loss in zip(controller.trials, (0.5, 0.4), strict=True):
                trial.set_status(Trial.RUNNING)
                scheduler.on_trial_result(controller, trial, result(number, loss))

    # `b` started after the snapshot of the trials, and `c` after that of the scheduler.
    first, controller = started("ab", scheduler=name)
    run(first, controller, 1)
    state = dump_scheduler(first, controller.trials)
    second, controller = started("ac", scheduler=name)
    restore_scheduler(second, state, controller.trials)
    run(second, controller, 1, 2)
    held = {id(trial) for value in vars(second).values() for trial in trials_in(value)}
    assert held <= {id(trial) for trial in controller.trials}
    assert held or name in ("asha", "fifo")


def test_the_median_rule_accepts_a_failed_trial():
    scheduler, controller = started("abc", scheduler="median", grace_epochs=1)
    failed, *others = controller.trials
    scheduler.on_trial_complete(controller, failed, {"done": True, "error": "ValueError: nan"})
    for trial in others:
        # The rule pauses a trial while there are too few others to compare with.
        assert scheduler.on_trial_result(controller, trial, result(2, 0.5)) in ("CONTINUE", "PAUSE")


def test_hyperband_pauses_trials_again_that_were_paused():
    scheduler, controller = started("abc", scheduler="hyperband")
    scheduler.paused = frozenset("ac")
    assert scheduler.choose_trial_to_run(controller) is controller.trials[1]
    states = [trial.status for trial in controller.trials]
    assert states == [Trial.PAUSED, Trial.PENDING, Trial.PAUSED]
    # Only once: a trial that is pending later stays so.
    controller.trials[0].set_status(Trial.PENDING)
    scheduler.choose_trial_to_run(controller)
    assert controller.trials[0].status == Trial.PENDING


def test_asha_does_not_stop_a_trial_in_its_last_epoch():
    scheduler, controller = started("a", scheduler="asha")
    for epochs in range(1, 10):
        decision = scheduler.on_trial_result(controller, controller.trials[0], result(epochs, 0.5))
        assert decision == "CONTINUE"


def test_perturbed_values_are_clipped_to_the_space():
    space = {
        "train.learning_rate": DistributionSpec(loguniform=(1e-4, 1e-2)),
        "train.momentum": DistributionSpec(choice=(0.5, 0.9)),
        "model.l2": DistributionSpec(quniform=(0, 0.5, 0.2)),
    }
    config = {"train.learning_rate": 1.2e-2, "train.momentum": 0.9, "model.l2": 0.48}
    clipped = {"train.learning_rate": 1e-2, "train.momentum": 0.9, "model.l2": 0.4}
    assert clip_to_space(space, config) == clipped
