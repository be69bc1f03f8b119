from functools import partial

from ray_jobs.checks import resources
from ray_jobs.checks.finding import Finding
from ray_jobs.checks.probe import Node
from ray_jobs.config.spec import RunSpec

NODES = [Node("0" * 40, "a", {"CPU": 2.0, "object_store_memory": 4e9, "memory": 8e9})]


def test_workers_must_fit_on_the_nodes_and_those_of_the_autoscaler(monkeypatch):
    def found(num_workers: int, added: int) -> Finding:
        monkeypatch.setattr(resources, "possible_nodes", lambda: [{"CPU": 4.0}] * added)
        changes = {"train.num_workers": num_workers, "train.global_batch_size": 16}
        (finding,) = resources.workers(RunSpec().overlay(changes), NODES)
        return finding

    assert found(8, added=0).severity == "error"
    assert found(8, added=0).text == (
        "train.num_workers=8: the cluster has 2 CPU and cannot run 8 workers with 1 CPU each with "
        "one CPU left for Ray Data"
    )
    assert found(8, added=3).severity == "ok"
    assert "8 workers with 1 CPU each once the autoscaler has added nodes" in found(8, added=3).text
    grown = "the cluster has 2 CPU, or with the autoscaler 3 × 4 CPU, and cannot"
    assert grown in found(16, added=3).text


def test_a_too_large_object_store_is_an_error_unless_an_autoscaler_may_enlarge_it(monkeypatch):
    large_store = RunSpec().overlay({"data.object_store_memory": 10**10})
    for nodes, status in (([], "error"), ([{"CPU": 4.0}] * 3, "warning")):
        monkeypatch.setattr(resources, "possible_nodes", partial(list, nodes))
        assert [f.severity for f in resources.budgets(large_store, None, NODES)] == [status]
