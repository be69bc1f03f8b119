import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from ray_jobs.cluster.node_inventory import _nodes_of_ray_up
from ray_jobs.cluster.trial_slots import trials_that_fit
from ray_jobs.config.errors import JobError
from ray_jobs.tune.run_trials import TRIALS
from ray_jobs.tune.trials.trial import ENDED
from tests.ray_jobs.autoscaling import autoscaling_cluster
from tests.ray_jobs.tune.searches import (
    prepared_in,
    require_nothing_left,
    run_search,
    spec_in,
)

SCHEDULERS = ("asha", "hyperband", "median", "pbt", "pb2", "fifo")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    prepared_in(folder)
    return folder


def starts_of(folder: Path) -> dict[str, float]:
    """When each trial's folder was begun."""
    return {path.parent.name: path.stat().st_mtime for path in folder.glob("*/run.yaml")}


class Watch:
    """Looks again and again how many placement groups there are."""

    def __init__(self) -> None:
        self.most, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        from ray.util import placement_group_table

        while not self._done.wait(0.2):
            states = [group["state"] for group in placement_group_table().values()]
            self.most = max(self.most, sum(state != "REMOVED" for state in states))


def test_a_search_tries_the_specs_own_values_survives_a_bad_trial_and_goes_on(ray_local, data):
    space = {"train.learning_rate": {"choice": [1e30, 1e-3, 3e-3]}}
    spec = spec_in(
        data,
        run__name="goes-on",
        tune__space=space,
        tune__searcher="grid",
        tune__scheduler="fifo",
        train__epochs=2,
        tune__budget__trials=2,
    )
    first = run_search(spec)
    assert [row.values["train.learning_rate"] for row in first.trials] == [1e-4, 1e30]
    assert [row.state for row in first.trials] == ["finished", "failed"]
    own, failed = first.trials
    assert failed.error is not None
    assert failed.error.startswith("ValueError: ")
    assert "lower train.learning_rate=1e+30" in failed.error
    assert failed.scores == {}
    assert own.epochs == len(own.history) == 2
    assert own.scores == {"val/log_loss": min(record["val/log_loss"] for record in own.history)}
    assert first.spent["trials"] == 2
    assert first.spent["cpu_hours"] > 0
    folder = data / "runs/goes-on" / TRIALS
    before = starts_of(folder)
    assert all((folder / name / ENDED).exists() for name in before)
    require_nothing_left()
    # The same again with more to spend: what has ended is not run again, the grid goes on.
    spent = first.spent["cpu_hours"]
    second = run_search(spec.overlay({"tune.budget.trials": 4}))
    rates = [row.values["train.learning_rate"] for row in second.trials]
    assert rates == [1e-4, 1e30, 1e-3, 3e-3]
    assert [row.state for row in second.trials] == ["finished", "failed", "finished", "finished"]
    assert {name: starts_of(folder)[name] for name in before} == before
    assert second.trials[0].scores == own.scores
    assert second.spent["cpu_hours"] > spent
    require_nothing_left()


@pytest.mark.slow
@pytest.mark.multiworker
def test_trials_of_two_workers_clone_each_other_and_leave_nothing(ray_local, data):
    spec = spec_in(
        data,
        run__name="clones",
        tune__scheduler="pbt",
        tune__workers_per_trial=2,
        tune__budget__trials=2,
        tune__perturbation_epochs=2,
        # A clone needs a donor that has saved at a look before: several looks for that to happen.
        train__epochs=16,
        train__patience=16,
    )
    search = run_search(spec)
    assert [(row.state, row.epochs) for row in search.trials] == [("finished", 16)] * 2
    # The worse one became a clone, with other values than it had begun with.
    folder = data / "runs/clones" / TRIALS
    begun = [yaml.safe_load((folder / r.name / "run.yaml").read_text()) for r in search.trials]
    rates = [tree["train"]["learning_rate"] for tree in begun]
    assert [row.values["train.learning_rate"] for row in search.trials] != rates
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


def test_what_the_cluster_can_never_give_is_refused_before_a_trial_starts(ray_local, data):
    spec = spec_in(data, run__name="large", tune__workers_per_trial=2, train__cpus_per_worker=4)
    started = time.monotonic()
    with pytest.raises(JobError, match=r"a trial needs 2 × \(4 CPU\), each on one node, and the"):
        run_search(spec)
    assert time.monotonic() - started < 10
    gpus = spec_in(data, run__name="gpus", train__use_gpu=True, tune__gpus_per_worker=0.5)
    with pytest.raises(JobError, match=r"1 × \(1 CPU and 0.5 GPU\)"):
        run_search(gpus)
    assert not (data / "runs/large" / TRIALS).exists()
    require_nothing_left()


@pytest.mark.slow
@pytest.mark.multiworker
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_runs_to_its_end_and_leaves_nothing(
    ray_local, data, scheduler, num_workers
):
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
@pytest.mark.timeout(1800)
def test_of_thirty_trials_half_are_stopped_early_and_none_leaks(ray_local, data):
    spec = spec_in(data, run__name="thirty", tune__budget__trials=30, train__epochs=9)
    with Watch() as watch:
        search = run_search(spec)
    states = [row.state for row in search.trials]
    assert len(states) == 30
    assert states.count("stopped") >= 15
    assert states.count("finished") >= 1
    # Two trials at once, of a placement group each.
    assert watch.most <= 2
    require_nothing_left()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nodes_come_for_a_search_and_go_after_it(tmp_path):
    with autoscaling_cluster(tmp_path, {"CPU": 1}, most=2) as address:
        result = subprocess.run(
            [sys.executable, "-m", "tests.ray_jobs.tune.autoscaled", str(tmp_path), address],
            capture_output=True,
            text=True,
            env={**os.environ, "RAY_AUTH_MODE": "token"},
        )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["before"], found["most"], found["after"]) == (0, 2, 0)
    assert len(found["states"]) == 4
    assert set(found["states"]) <= {"finished", "stopped"}


def test_what_an_autoscaler_may_add_counts(tmp_path):
    config = {
        "max_workers": 4,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 2}},
            "small": {"resources": {"CPU": 4}, "max_workers": 3},
            "large": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 2},
        },
    }
    path = tmp_path / "ray_bootstrap_config.yaml"
    path.write_text(yaml.safe_dump(config))
    nodes = _nodes_of_ray_up(path)
    # Five workers would be one more than there may be.
    assert sorted(node["CPU"] for node in nodes) == [2, 4, 4, 8, 8]
    assert trials_that_fit(nodes, {"CPU": 4}, 1) == 2 + 2 * 2
    assert trials_that_fit(nodes, {"CPU": 1, "GPU": 0.25}, 1) == 8
    assert trials_that_fit(nodes, {"CPU": 4}, 2) == 3
    assert trials_that_fit(nodes, {"CPU": 9}, 1) == 0
    bare = {"max_workers": 2, "resources": {}}
    path.write_text(yaml.safe_dump({**config, "available_node_types": {"head": bare}}))
    assert _nodes_of_ray_up(path) == []
    path.write_text("head_node_type: head")
    assert _nodes_of_ray_up(path) == _nodes_of_ray_up(tmp_path / "absent.yaml") == []
