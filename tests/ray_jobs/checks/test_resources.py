import pytest

from ray_jobs.checks import resources
from ray_jobs.checks.probe import Node
from ray_jobs.config.spec import RunSpec


@pytest.fixture
def autoscaler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "possible_nodes", lambda: [{"CPU": 4.0}] * 3)


@pytest.fixture
def no_autoscaler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "possible_nodes", lambda: [])


def spec(num_workers: int) -> RunSpec:
    changes = {"train.num_workers": num_workers, "train.global_batch_size": 16}
    return RunSpec().overlay(changes)


NODES = [Node("0" * 40, "a", {"CPU": 2.0, "object_store_memory": 4e9, "memory": 8e9})]


def test_too_many_workers_are_an_error(no_autoscaler):
    (found,) = resources.workers(spec(8), NODES)
    assert found.status == "error"
    assert found.text == (
        "train.num_workers=8: the cluster has 2 CPU and cannot run 8 workers with 1 CPU each with "
        "one CPU left for Ray Data"
    )


def test_nodes_that_the_autoscaler_may_add_count(autoscaler):
    (found,) = resources.workers(spec(8), NODES)
    assert found.status == "ok"
    assert found.text == (
        "the cluster can run 8 workers with 1 CPU each once the autoscaler has added nodes"
    )
    (found,) = resources.workers(spec(16), NODES)
    assert "the cluster has 2 CPU, or with the autoscaler 3 × 4 CPU, and cannot" in found.text


def store_status() -> list[str]:
    large_store = RunSpec().overlay({"data.object_store_memory": 10**10})
    return [found.status for found in resources.budgets(large_store, None, NODES)]


def test_a_too_large_object_store_is_an_error(no_autoscaler):
    assert store_status() == ["error"]


def test_an_autoscaler_may_enlarge_the_object_store(autoscaler):
    assert store_status() == ["warning"]
