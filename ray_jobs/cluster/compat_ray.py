"""Every private API of Ray that ray_jobs uses, with the reason for each.

tests/ray_jobs/cluster/test_compat_ray.py checks them against the installed Ray and fails when an
upgrade changes one. Ray is imported inside the functions, so that importing this module does not
import Ray.
"""

import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient
    from ray.train.v2.tensorflow.tensorflow_trainer import TensorflowTrainer
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

PROGRESS_LOGGERS = ("ray.data", "ray.data._internal.progress", "ray.train")
"""Loggers that report progress; Ray Data itself sets the level of the second one."""
SNAPSHOT_LOGGER = "ray.tune.execution.experiment_state"
"""Logger that reports problems with the snapshots of a search."""
_COORDINATOR_TIMEOUT_S = 5.0


def free_resources() -> dict[str, dict[str, float]]:
    """Return the free resources by node ID; `ray.available_resources()` returns only the sum."""
    from ray._private.state import available_resources_per_node

    return {node: dict(resources) for node, resources in available_resources_per_node().items()}


def autoscaler_groups() -> list[tuple[dict[str, float], int]]:
    """Return the resources and the maximum count of each node group that KubeRay reported.

    No public API returns the limits of an autoscaler. The count is negative if unlimited.
    """
    from ray._private.state import state

    config = state.get_cluster_config()
    groups = config.node_group_configs if config is not None else ()
    return [(dict(group.resources), group.max_count) for group in groups]


def request_capacity(
    requester: str, bundles: list[dict[str, float]], expire_after_s: float
) -> None:
    """Request resources from an autoscaler, in place of this requester's previous request.

    `ray.autoscaler.sdk.request_resources` would also replace the requests of all other jobs; Ray
    Train and Ray Data use this coordinator instead.

    Raises:
        RayError: If the coordinator does not answer.
    """
    call = _autoscaling_coordinator().request_resources.remote(
        requester_id=requester, resources=bundles, expire_after_s=expire_after_s
    )
    _wait_for(call)


def withdraw_capacity(requester: str) -> None:
    """Withdraw a request of `request_capacity`, if there is one.

    Raises:
        RayError: If the coordinator does not answer.
    """
    _wait_for(_autoscaling_coordinator().cancel_request.remote(requester))


def start_detached_actors() -> None:
    """Start the actors of Ray Data that live as long as the cluster, on the node of this process.

    Otherwise, Ray starts them on the node of the first process that needs them, and an autoscaler
    can never remove that node.
    """
    from ray.data._internal.stats import get_or_create_stats_actor

    _autoscaling_coordinator()
    get_or_create_stats_actor()


def _autoscaling_coordinator() -> Any:
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator

    return get_or_create_autoscaling_coordinator()


def _wait_for(call: Any) -> None:
    import ray

    ray.get(call, timeout=_COORDINATOR_TIMEOUT_S)


def num_cpus() -> int:
    """Return the CPUs of this machine or, if fewer, of this container.

    `os.cpu_count` ignores the container's limit.
    """
    from ray._private.utils import get_num_cpus

    return max(int(get_num_cpus(override_docker_cpu_warning=True)), 1)


def memory_fraction() -> float:
    """Return the used fraction of the machine's or the container's memory.

    psutil ignores the container's limit.
    """
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    return get_used_memory() / get_system_memory()


def serve_http_options() -> Any:
    """Return the HTTP options of the Ray Serve that this process is connected to."""
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    return client.http_config


def psutil() -> ModuleType:
    """Return psutil, which Ray bundles and adds to `sys.path`."""
    import ray  # noqa: F401 - adds the bundled packages to the path

    return import_module("psutil")


def nvml() -> ModuleType | None:
    """Return the NVML bindings that Ray bundles, or None if they are missing."""
    try:
        from ray._private.thirdparty import pynvml
    except ImportError:
        return None
    return pynvml


def packaged_files(folder: Path, excludes: Sequence[str]) -> list[Path]:
    """Return the files that Ray uploads with a job from a working directory.

    Only Ray's own function applies `excludes`, .gitignore and .rayignore as the upload does.
    """
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    paths: list[Path] = []
    is_excluded = packaging._get_excludes(folder, [*get_runtime_env_default_excludes(), *excludes])
    # Ray's own logger would print a line for each .gitignore.
    packaging._dir_travel(folder, [is_excluded], paths.append, True, logging.getLogger(__name__))
    return [path for path in paths if path.is_file()]


def job_client(address: str, timeout_s: float) -> "JobSubmissionClient":
    """Return a job client with a timeout; Ray's own client waits forever for a silent server."""
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, *args: Any, **options: Any) -> Any:
            return super()._do_request(*args, **{"timeout": timeout_s, **options})

    return Client(address)


def tensorflow_trainer() -> "type[TensorflowTrainer]":
    """Return `ray.train.tensorflow.TensorflowTrainer`; importing that package loads TensorFlow."""
    from ray.train.v2.tensorflow.tensorflow_trainer import TensorflowTrainer

    return TensorflowTrainer


def is_startup_timeout(error: Exception) -> bool:
    """Whether workers could not be placed in time; this error has no public class."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(error, WorkerGroupStartupTimeoutError)


def is_startup_failure(error: Exception) -> bool:
    """Whether a worker died while it started; this error has no public class."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    return isinstance(error, WorkerGroupStartupFailedError)


def health_check_cause(error: Exception) -> Exception:
    """Return the error of a worker that a failed health check wraps, or the error itself."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else error


def pause_trial(controller: "TuneController", trial: "Trial") -> None:
    """Mark a trial as paused, which a resumed HyperBand search requires; no public API does so."""
    controller._set_trial_status(trial, trial.PAUSED)


def live_trials(bracket: object) -> dict["Trial | None", object] | None:
    """Return the running trials of a HyperBand bracket, which pickling must map to new trials.

    Returns None for anything else.
    """
    return getattr(bracket, "_live_trials", None)


def is_pending_result(value: object) -> bool:
    """Whether a value is a request to a running trial, which cannot be stored."""
    from ray import ObjectRef
    from ray.train._internal.session import _FutureTrainingResult

    return isinstance(value, (ObjectRef, _FutureTrainingResult))


def propagated_env_vars() -> set[str]:
    """Return the names of the environment variables that Tune copies to trials and logs.

    Tune uses changes to this set. No public setting excludes the AWS keys.
    """
    from ray.tune.execution import class_cache

    return class_cache.ENV_VARS_TO_PROPAGATE
