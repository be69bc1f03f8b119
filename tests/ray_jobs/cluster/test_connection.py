"""Tests of connecting to Ray; `ray.init` is replaced, so that no Ray starts."""

import os

import pytest
import ray

from ray_jobs.cluster import connection
from ray_jobs.cluster.capacity import cpu_settings
from ray_jobs.cluster.connection import available_cpus, connected, owns_ray
from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import PredictSpec
from ray_jobs.config.spec import TrainSpec

TWO_WORKERS = "train.num_workers=2 and train.cpus_per_worker=1"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The CPUs of each local Ray that would have started on a machine with two cores."""
    cpus: list[int] = []
    monkeypatch.setattr(connection, "_ray_owners", set())
    monkeypatch.setattr(connection, "available_cpus", lambda: 2)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, num_cpus, **__: cpus.append(num_cpus))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus[-1]})
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return cpus


def test_a_local_ray_has_the_cpus_of_the_machine(started, capsys):
    assert not owns_ray()
    with connected("local", num_cpus=1):
        assert owns_ray()
    assert not owns_ray()
    assert started == [2]
    assert capsys.readouterr().err == ""


def test_more_logical_cpus_than_cores_start_with_a_warning(started, capsys):
    with connected("local", num_cpus=2, cpu_settings=TWO_WORKERS):
        pass
    with connected("local", num_cpus=4):
        pass
    assert started == [3, 5]
    assert capsys.readouterr().err.splitlines()[0] == (
        f"warning: {TWO_WORKERS} need 3 CPUs including Ray Data's, but this machine has 2; the "
        "processes will share them"
    )


def test_more_than_twice_the_cores_plus_one_are_refused_with_the_settings_and_a_remedy(started):
    train = TrainSpec(num_workers=64, global_batch_size=64)
    message = (
        r"train\.num_workers=64 and train\.cpus_per_worker=1 need 65 CPUs including Ray Data's, "
        r"but this machine has 2, and a local Ray starts with at most 5; lower these settings to 4 "
        r"CPUs in total, or set RAY_ADDRESS to a cluster"
    )
    with (
        pytest.raises(JobError, match=message),
        connected("local", num_cpus=64, cpu_settings=cpu_settings(train)),
    ):
        pass
    assert started == []
    predict = PredictSpec(run="r", data="d", output="o", num_workers=3, cpus_per_worker=0.5)
    assert cpu_settings(predict) == "num_workers=3 and cpus_per_worker=0.5"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs CPU affinities")
def test_cpus_are_those_that_the_process_may_use():
    cpus = os.sched_getaffinity(0)
    assert 1 <= available_cpus() <= len(cpus)
    try:
        os.sched_setaffinity(0, {min(cpus)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, cpus)


def test_an_address_without_a_listener_is_refused_within_seconds():
    with pytest.raises(JobError, match=r"no Ray cluster answers at 127\.0\.0\.1:1: .*refused"):
        connection._require_listening("127.0.0.1:1")
    connection._require_listening("auto")


def test_the_root_cause_of_a_chain_of_errors_is_one_line():
    error = RuntimeError("task failed")
    error.__cause__ = ValueError("bad row\nTraceback")
    assert connection.root_cause(error) == "ValueError bad row"
