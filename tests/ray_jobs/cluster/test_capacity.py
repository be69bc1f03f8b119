import pytest

from ray_jobs.cluster import capacity, compat_ray
from ray_jobs.cluster.capacity import (
    bundles_that_fit,
    can_grow,
    reading_cpus,
    trial_slots,
    worker_resources,
    workers_that_fit,
)
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import TrainSpec


def test_a_larger_run_fits_after_a_restart_if_it_could_grow_before():
    train = TrainSpec(global_batch_size=24, num_workers=(2, 4), cpus_per_worker=4)
    # With two workers on the larger node, free plus used resources equal the total.
    assert workers_that_fit([{"CPU": 5}, {"CPU": 12}], train) == 4
    assert workers_that_fit([{"CPU": 5}, {"CPU": 4}], train) == 2
    assert workers_that_fit([{"CPU": 4}, {"CPU": 8}], train) == 2


def test_workers_fill_a_node_except_for_the_cpu_of_ray_data():
    assert workers_that_fit([{"CPU": 1}], TrainSpec()) == 0
    assert workers_that_fit([{"CPU": 2}], TrainSpec()) == 1
    assert workers_that_fit([{"CPU": 0.5}, {"GPU": 1}], TrainSpec()) == 0
    train = TrainSpec(global_batch_size=24, num_workers=3, cpus_per_worker=0.4)
    assert workers_that_fit([{"CPU": 2.2}], train) == 3
    assert workers_that_fit([{"CPU": 2.19}], train) == 2


def test_a_run_can_grow_into_what_is_free_and_what_it_holds(monkeypatch):
    train = TrainSpec(global_batch_size=24, num_workers=(1, 3))
    monkeypatch.setattr(compat_ray, "free_resources", lambda: {"a": {"CPU": 0.5}, "b": {"CPU": 1}})
    assert not can_grow(train, 1, {})
    # The CPUs of its own worker and reading tasks are free after a restart.
    assert can_grow(train, 1, {"a": {"CPU": 1.5}})
    assert not can_grow(train, 2, {"a": {"CPU": 1.5}})
    assert not can_grow(train, 1, {"lost": {"CPU": 4}})


def test_reading_tasks_get_the_cpus_that_are_left_as_two_bundles_per_worker():
    assert reading_cpus([{"CPU": 16}], 2, 8) == 8
    assert reading_cpus([{"CPU": 7}, {"CPU": 7}], 2, 8) == 7
    assert reading_cpus([{"CPU": 3}], 2, 8) == 1
    assert reading_cpus([{"CPU": 1}], 2, 8) == 0.5
    assert reading_cpus([{"CPU": 2}], 64, 1) == 0.02
    assert reading_cpus([{"GPU": 1}, {"CPU": 0.01}], 1, 1) is None


@pytest.mark.parametrize(
    ("node", "bundle", "count"),
    [
        ({"CPU": 1.2}, {"CPU": 0.4}, 3),
        ({"CPU": 1.19}, {"CPU": 0.4}, 2),
        ({"CPU": 8, "GPU": 1}, {"CPU": 1, "GPU": 0.25}, 4),
        ({"CPU": 8, "GPU": 0.7}, {"CPU": 1, "GPU": 0.1}, 7),
        ({"CPU": 8}, {"CPU": 1, "GPU": 0.25}, 0),
        ({"CPU": 8, "rack": 0.003}, {"CPU": 1, "rack": 0.001}, 3),
    ],
)
def test_bundles_are_counted_in_the_units_of_ray(node, bundle, count):
    assert bundles_that_fit(node, bundle) == count


def test_workers_of_a_trial_may_share_a_gpu():
    train = TrainSpec(use_gpu=True, gpus_per_worker=2, resources_per_worker={"rack": 1.0})
    assert worker_resources(train) == {"CPU": 1.0, "GPU": 2.0, "rack": 1.0}
    assert worker_resources(train, 0.25) == {"CPU": 1.0, "GPU": 0.25, "rack": 1.0}
    assert worker_resources(TrainSpec(), 0.25) == {"CPU": 1.0}


def test_slots_include_nodes_that_the_autoscaler_may_add(monkeypatch):
    monkeypatch.setattr(capacity, "current_nodes", lambda: [{"CPU": 2}])
    monkeypatch.setattr(capacity, "possible_nodes", lambda: [{"CPU": 4}] * 3)
    monkeypatch.setattr(capacity, "owns_ray", lambda: False)
    assert trial_slots({"CPU": 2}, 2) == 3
    message = (
        r"tune\.workers_per_trial=2: a trial needs 2 × \(8 CPU\), each on one node, and the "
        r"cluster has 2 CPU, with its autoscaler at most 3 × 4 CPU; lower tune\.workers_per_trial"
    )
    with pytest.raises(JobError, match=message):
        trial_slots({"CPU": 8}, 2)
    # The limits of an autoscaler may be unknown.
    monkeypatch.setattr(capacity, "possible_nodes", list)
    assert trial_slots({"CPU": 8}, 2, max_concurrent=5) == 5
    with pytest.raises(JobError, match=r"if an autoscaler will add nodes, set tune\.max_conc"):
        trial_slots({"CPU": 8}, 2)
