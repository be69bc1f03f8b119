import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from ray_jobs.config.errors import Interrupted, JobError
from ray_jobs.tune.run_trials import TRIALS
from ray_jobs.tune.trials.trial import ENDED
from ray_jobs.tune.trials.tune_callback import SearchCallback
from tests.ray_jobs.autoscaling import autoscaling_cluster
from tests.ray_jobs.tune.searches import require_nothing_left, run_search, spec_in


def start_times(folder: Path) -> dict[str, float]:
    """Return the time at which each trial's folder was created."""
    return {path.parent.name: path.stat().st_mtime for path in folder.glob("*/run.yaml")}


class PlacementGroupCounter:
    """Polls for the largest number of placement groups that exist at the same time."""

    def __init__(self) -> None:
        self.most, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._poll)

    def __enter__(self) -> "PlacementGroupCounter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _poll(self) -> None:
        from ray.util import placement_group_table

        while not self._done.wait(0.2):
            states = [group["state"] for group in placement_group_table().values()]
            self.most = max(self.most, sum(state != "REMOVED" for state in states))


def test_a_search_tries_the_specs_own_values_survives_failed_trials_and_resumes(ray_local, data):
    spec = spec_in(
        data,
        run__name="resumes",
        tune__space={
            "train.learning_rate": {"choice": [1e30]},
            "train.schedule": {"choice": ["exponential", "cosine"]},
            "train.end_fraction": {"choice": [0.1, 0.0]},
        },
        tune__searcher="grid",
        tune__scheduler="fifo",
        # One process trains all trials.
        tune__max_concurrent_trials=1,
        tune__budget__trials=2,
        train__end_fraction=0.1,
        train__epochs=2,
    )
    first = run_search(spec)
    assert [row.values["train.learning_rate"] for row in first.trials] == [1e-4, 1e30]
    assert [row.state for row in first.trials] == ["finished", "failed"]
    own, failed = first.trials
    assert own.ended_s is not None
    assert own.ended_s <= failed.began_s
    assert failed.error is not None
    assert failed.error.startswith("ValueError: ")
    assert "lower train.learning_rate=1e+30" in failed.error
    assert failed.scores == {}
    assert own.epochs == len(own.history) == 2
    assert own.scores == {"val/log_loss": min(record["val/log_loss"] for record in own.history)}
    assert first.spent["trials"] == 2
    assert first.spent["cpu_hours"] > 0
    folder = data / "runs/resumes" / TRIALS
    before = start_times(folder)
    assert all((folder / name / ENDED).exists() for name in before)
    require_nothing_left()
    # With a larger budget, the grid continues, and ended trials are not run again. The next values
    # are valid alone but not together.
    spent = first.spent["cpu_hours"]
    second = run_search(spec.overlay({"tune.budget.trials": 3}))
    assert [row.name for row in second.trials[:2]] == [row.name for row in first.trials]
    assert [row.state for row in second.trials] == ["finished", "failed", "failed"]
    assert "end_fraction=0 is impossible with schedule=exp" in str(second.trials[2].error)
    assert start_times(folder) == before
    assert second.trials[0].scores == own.scores
    assert second.spent["cpu_hours"] > spent
    require_nothing_left()


@pytest.mark.slow
@pytest.mark.multiworker
def test_trials_of_two_workers_clone_each_other(ray_local, data):
    spec = spec_in(
        data,
        run__name="clones",
        tune__scheduler="pbt",
        tune__workers_per_trial=2,
        tune__budget__trials=2,
        tune__perturbation_epochs=2,
        # A clone needs a donor with an earlier checkpoint, so there are several perturbations.
        train__epochs=16,
        train__patience=16,
    )
    search = run_search(spec)
    assert [(row.state, row.epochs) for row in search.trials] == [("finished", 16)] * 2
    # The worse trial became a clone with new values.
    folder = data / "runs/clones" / TRIALS
    started = [yaml.safe_load((folder / r.name / "run.yaml").read_text()) for r in search.trials]
    rates = [tree["train"]["learning_rate"] for tree in started]
    assert [row.values["train.learning_rate"] for row in search.trials] != rates
    require_nothing_left()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_asha_stops_half_of_thirty_trials_early(ray_local, data):
    spec = spec_in(data, run__name="thirty", tune__budget__trials=30, train__epochs=9)
    with PlacementGroupCounter() as counter:
        states = [row.state for row in run_search(spec).trials]
    assert len(states) == 30
    assert states.count("stopped") >= 15
    assert states.count("finished") >= 1
    # Two trials run at a time, with one placement group each.
    assert 1 <= counter.most <= 2
    require_nothing_left()


@pytest.mark.slow
def test_a_search_ends_when_its_budget_is_spent(ray_local, data):
    spec = spec_in(
        data,
        run__name="budget",
        train__epochs=1000,
        train__patience=1000,
        tune__scheduler="fifo",
        tune__budget__cpu_hours=90 / 3600,
    )
    search = run_search(spec)
    assert {row.state for row in search.trials} == {"stopped"}
    assert search.spent["cpu_hours"] >= 90 / 3600
    assert all(row.epochs < 1000 for row in search.trials)
    require_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_search_which_can_resume(ray_local, data, number):
    spec = spec_in(
        data,
        run__name=f"stopped-{number}",
        train__epochs=1000,
        train__patience=1000,
        tune__scheduler="fifo",
        tune__max_concurrent_trials=1,
        tune__budget__trials=1,
    )
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    handlers = [signal.getsignal(one) for one in signals]
    on_trial_result = SearchCallback.on_trial_result

    def interrupt(*arguments: Any, **options: Any) -> None:
        on_trial_result(*arguments, **options)
        os.kill(os.getpid(), number)

    with (
        patch.object(SearchCallback, "on_trial_result", interrupt),
        pytest.raises(Interrupted, match="run the same command again to resume the search"),
    ):
        run_search(spec)
    assert [
        signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    ] == handlers
    require_nothing_left()
    (trial,) = run_search(spec.overlay({"tune.budget.cpu_hours": 20 / 3600})).trials
    assert trial.state == "stopped"
    assert [record["epoch"] for record in trial.history][:2] == [0, 1]
    require_nothing_left()


def test_a_search_that_cannot_fit_on_the_cluster_fails_before_a_trial_starts(ray_local, data):
    spec = spec_in(data, run__name="large", tune__workers_per_trial=2, train__cpus_per_worker=4)
    with pytest.raises(JobError, match=r"a trial needs 2 × \(4 CPU\), each on one node, and the"):
        run_search(spec)
    gpus = spec_in(data, run__name="gpus", train__use_gpu=True, tune__gpus_per_worker=0.5)
    with pytest.raises(JobError, match=r"1 × \(1 CPU and 0.5 GPU\)"):
        run_search(gpus)
    assert not (data / "runs/large" / TRIALS).exists()
    require_nothing_left()


@pytest.mark.slow
@pytest.mark.multiworker
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median", "pbt", "pb2", "fifo"])
def test_every_scheduler_finishes_and_releases_everything(ray_local, data, scheduler, num_workers):
    spec = spec_in(
        data,
        run__name=f"{scheduler}-{num_workers}",
        tune__scheduler=scheduler,
        tune__workers_per_trial=num_workers,
        tune__perturbation_epochs=2,
    )
    search = run_search(spec)
    assert len(search.trials) == 4
    assert {row.state for row in search.trials} <= {"finished", "stopped"}
    assert "finished" in {row.state for row in search.trials}
    require_nothing_left()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_autoscaler_adds_nodes_for_a_search_and_removes_them_afterwards(tmp_path):
    with autoscaling_cluster(tmp_path, 2, cpu={"CPU": 1}) as address:
        result = subprocess.run(
            [sys.executable, "-m", "tests.ray_jobs.tune.autoscaled", str(tmp_path), address],
            capture_output=True,
            text=True,
            env={**os.environ, "RAY_AUTH_MODE": "token"},
        )
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    assert (counts["before"], counts["most"], counts["after"]) == (0, 2, 0)
    assert len(counts["states"]) == 4
    assert set(counts["states"]) <= {"finished", "stopped"}
