"""Tests that fail when an upgrade of Ray changes a private API that ray_jobs uses."""

import inspect
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from ray_jobs.cluster import compat_ray


def test_free_resources_are_listed_per_node(ray_local):
    import ray

    ((node, resources),) = compat_ray.free_resources().items()
    assert 0 <= resources["CPU"] <= ray.cluster_resources()["CPU"]
    assert node == ray.nodes()[0]["NodeID"]


def test_the_detached_actors_start_under_the_names_that_ray_data_uses(ray_local):
    import ray

    compat_ray.start_detached_actors()
    names = {
        "datasets_stats_actor": "_dataset_stats_actor",
        "AutoscalingCoordinator": "AutoscalingCoordinator",
    }
    for name, namespace in names.items():
        ray.get(ray.get_actor(name, namespace).__ray_ready__.remote())


def test_requests_to_the_autoscaler_add_up_until_they_are_withdrawn_or_expire(ray_local):
    import ray

    def requested() -> dict[str, list[dict[str, float]]]:
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        requests = ray.get(coordinator.__ray_call__.remote(lambda self: self._ongoing_reqs))
        return {name: r.requested_resources for name, r in requests.items() if name in ("a", "b")}

    compat_ray.request_capacity("a", [{"CPU": 1.0}], 60)
    compat_ray.request_capacity("b", [{"CPU": 2.0}] * 2, 60)
    compat_ray.request_capacity("a", [{"CPU": 1.0}] * 3, 60)
    assert requested() == {"a": [{"CPU": 1.0}] * 3, "b": [{"CPU": 2.0}] * 2}
    compat_ray.withdraw_capacity("b")
    compat_ray.withdraw_capacity("b")
    compat_ray.request_capacity("a", [{"CPU": 1.0}], 0)
    # Another request drops what has expired.
    compat_ray.request_capacity("c", [], 0)
    assert requested() == {}


def test_autoscaler_groups_are_read_from_the_cluster_configuration(ray_local, monkeypatch):
    from ray._private.state import state
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

    assert compat_ray.autoscaler_groups() == []
    group = NodeGroupConfig(resources={"CPU": 4, "GPU": 1}, min_count=0, max_count=3, name="gpu")
    unlimited = NodeGroupConfig(resources={"CPU": 2}, max_count=-1, name="cpu")
    config = ClusterConfig(node_group_configs=[group, unlimited])
    monkeypatch.setattr(state, "get_cluster_config", lambda: config)
    assert compat_ray.autoscaler_groups() == [({"CPU": 4, "GPU": 1}, 3), ({"CPU": 2}, -1)]


def test_machines_are_measured_with_what_ray_bundles(monkeypatch):
    from ray._private import utils

    monkeypatch.setattr(utils, "_get_docker_cpus", lambda: 1.0)
    assert compat_ray.num_cpus() == 1
    assert 0 < compat_ray.memory_fraction() < 1
    assert compat_ray.psutil().Process().memory_full_info().rss > 0
    nvml = compat_ray.nvml()
    assert nvml is not None
    assert callable(nvml.nvmlInit)


def test_packaged_files_are_those_that_ray_uploads(tmp_path):
    from ray._private.runtime_env.packaging import get_uri_for_directory

    for name in ("a.py", "logs/b.txt", "excluded/c.bin", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".gitignore").write_text("logs/\n")
    files = compat_ray.packaged_files(tmp_path, ["excluded"])
    assert {file.relative_to(tmp_path).as_posix() for file in files} == {"a.py", ".gitignore"}
    # Ray's own upload takes the same arguments.
    assert {"directory", "excludes"} <= set(inspect.signature(get_uri_for_directory).parameters)


def test_requests_of_the_job_client_time_out():
    import requests

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            released.wait(30)

    released = threading.Event()
    with HTTPServer(("127.0.0.1", 0), Silent) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(requests.exceptions.ReadTimeout):
                compat_ray.job_client(f"http://127.0.0.1:{server.server_port}", timeout_s=0.2)
        finally:
            released.set()
            server.shutdown()
            thread.join()


def test_the_trainer_is_the_public_one_and_loads_without_tensorflow():
    code = (
        "import sys\n"
        "from ray_jobs.cluster.compat_ray import tensorflow_trainer\n"
        "tensorflow_trainer()\n"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    from ray.train.tensorflow import TensorflowTrainer

    import ray_jobs.cluster.tf_backend as backend

    assert compat_ray.tensorflow_trainer() is TensorflowTrainer
    parent = backend.KerasTrainer.__mro__[2]
    assert "backend_config" in inspect.signature(parent.__init__).parameters


def test_errors_of_ray_train_are_told_apart():
    from ray.train.v2._internal.exceptions import (
        WorkerGroupStartupFailedError,
        WorkerGroupStartupTimeoutError,
        WorkerHealthCheckFailedError,
    )

    timeout, cause = WorkerGroupStartupTimeoutError(2), RuntimeError("lost")
    assert compat_ray.is_startup_timeout(timeout)
    assert not compat_ray.is_startup_failure(timeout)
    assert compat_ray.is_startup_failure(WorkerGroupStartupFailedError("died"))
    assert compat_ray.health_check_cause(WorkerHealthCheckFailedError("failed", cause)) is cause
    assert compat_ray.health_check_cause(cause) is cause


def test_the_controller_of_tune_can_pause_a_trial():
    # The scheduler's tests pause a trial by `pause_trial`, which calls this method.
    from ray.tune.execution.tune_controller import TuneController

    parameters = inspect.signature(TuneController._set_trial_status).parameters
    assert list(parameters) == ["self", "trial", "status"]


def test_a_hyperband_bracket_maps_its_trials_to_results():
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import HyperBandScheduler

    scheduler = HyperBandScheduler(metric="loss", mode="min", max_t=9)
    trial = Trial("Trial", stub=True)
    scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    (bracket,) = [b for band in scheduler._hyperbands for b in band if b is not None]
    assert compat_ray.live_trials(bracket) == {trial: None}
    assert compat_ray.live_trials(scheduler) is None


def test_pending_results_are_recognised(ray_local):
    import ray
    from ray.train._internal.session import _FutureTrainingResult
    from ray.tune.schedulers import pbt

    reference = ray.put(1)
    assert compat_ray.is_pending_result(reference)
    assert compat_ray.is_pending_result(_FutureTrainingResult(reference))
    assert not compat_ray.is_pending_result(1)
    assert pbt._FutureTrainingResult is _FutureTrainingResult


def test_trials_inherit_only_listed_variables(monkeypatch):
    from ray.tune.execution import class_cache

    def inherited() -> set[str]:
        actor = class_cache._ActorClassCache().get(type("Trial", (), {}))
        return set(actor._default_options["runtime_env"]["env_vars"])

    keys = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    for name in keys:
        monkeypatch.setenv(name, "secret")
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", {*class_cache.ENV_VARS_TO_PROPAGATE})
    assert keys <= inherited()
    listed = compat_ray.propagated_env_vars()
    listed -= keys
    assert not keys & inherited()


def test_loggers_of_ray_exist():
    import ray.data._internal.progress
    from ray.tune.execution import experiment_state

    assert experiment_state.logger.name == compat_ray.SNAPSHOT_LOGGER
    assert ray.data._internal.progress.__name__ in compat_ray.PROGRESS_LOGGERS


def test_private_apis_are_reached_in_this_module_only():
    package = Path(compat_ray.__file__).parents[1]
    private = ("ray._private", "ray._common", "._internal", "ray.train.v2")
    found = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in package.rglob("*.py")
        if path.name != "compat_ray.py"
        for line in path.read_text().splitlines()
        if "import" in line and any(name in line for name in private)
    ]
    assert found == []
