"""Connects a job to a Ray cluster, or starts a local Ray for it."""

import logging
import math
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ray_jobs.cluster import compat_ray
from ray_jobs.config.errors import JobError

_CONNECT_TIMEOUT_S = 5.0
_ray_owners: set[int] = set()
"""Contains the ID of this process while it runs a local Ray."""


@contextmanager
def connected(
    address: str | None,
    *,
    num_cpus: float,
    num_gpus: float = 0,
    data_cpus: int = 1,
    cpu_settings: str = "num_workers and cpus_per_worker",
    worker_logs: bool = False,
    object_store_memory: int | None = None,
) -> Iterator[None]:
    """Connect to Ray until the block ends; reuse an existing connection and leave it open.

    Args:
        address: Address of a cluster; by default $RAY_ADDRESS, else a local Ray is started.
        num_cpus: Logical CPUs of the job's processes.
        num_gpus: GPUs of the job's processes.
        data_cpus: Additional CPUs for the tasks of Ray Data; 0 if it is idle while they run.
        cpu_settings: The settings that determine `num_cpus`, for messages.
        worker_logs: Whether to print the workers' output to this terminal.
        object_store_memory: Bytes of shared memory of a local Ray; by default Ray decides.

    Raises:
        JobError: If the cluster does not answer, or a local Ray is too small.
    """
    # Read when Ray's processes start: reports wait for the controller's next poll, usage statistics
    # need the user's consent, and one heap per process lets `set_devices` keep its memory.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    import ray
    from ray.exceptions import RayError

    total_cpus = math.ceil(num_cpus) + data_cpus
    if ray.is_initialized():
        _prepare_cluster(total_cpus, num_gpus, cpu_settings)
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    options = {"log_to_driver": worker_logs, "logging_level": logging.ERROR}
    if address and address != "local":
        _require_listening(address)
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, RayError) as error:
            raise JobError(f"could not connect to the Ray cluster at {address}: {error}") from error
    else:
        local_cpus = _local_cpus(total_cpus, data_cpus, cpu_settings)
        ray.init("local", num_cpus=local_cpus, object_store_memory=object_store_memory, **options)
        _ray_owners.add(os.getpid())
    silence_ray_data()
    try:
        _prepare_cluster(total_cpus, num_gpus, cpu_settings)
        yield
    finally:
        _ray_owners.clear()
        ray.shutdown()


def owns_ray() -> bool:
    """Whether this process started a local Ray, to which no nodes can be added."""
    return os.getpid() in _ray_owners


def available_cpus() -> int:
    """Return the CPUs that the container's limit and the CPU affinity let this process use."""
    cpus = compat_ray.num_cpus()
    # Only Linux has CPU affinities.
    return min(cpus, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else cpus


def silence_ray_data() -> None:
    """Hide the progress bars and start-up messages of Ray Data; the jobs print their own."""
    import ray.data

    for name in compat_ray.PROGRESS_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


def _require_listening(address: str) -> None:
    """Check that a server listens at an address; Ray itself retries for two minutes."""
    parts = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+)\]?:(\d+)", address)
    if not parts:
        return
    try:
        socket.create_connection((parts[1], int(parts[2])), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise JobError(f"no Ray cluster answers at {address}: {error}") from error


def _local_cpus(total_cpus: int, data_cpus: int, cpu_settings: str) -> int:
    """Return the number of CPUs for a local Ray: the machine's, or more if a job needs them.

    Raises:
        JobError: If the job needs more than twice the machine's CPUs plus one.
    """
    cores = available_cpus()
    if total_cpus <= cores:
        return cores
    most = 2 * cores + 1
    text = f"{_need(total_cpus, 'CPU', cpu_settings)}, but this machine has {cores}"
    if total_cpus > most:
        raise JobError(
            f"{text}, and a local Ray starts with at most {most}; lower these settings to "
            f"{most - data_cpus} CPUs in total, or set RAY_ADDRESS to a cluster"
        )
    print(f"warning: {text}; the processes will share them", file=sys.stderr)
    return total_cpus


def _prepare_cluster(num_cpus: int, num_gpus: float, cpu_settings: str) -> None:
    """Check the size of the cluster, and start what must run on the node of this process."""
    _require_resources(num_cpus, num_gpus, cpu_settings)
    if not owns_ray():
        compat_ray.start_detached_actors()


def _require_resources(num_cpus: int, num_gpus: float, cpu_settings: str) -> None:
    """Check that the cluster is large enough, or can still grow."""
    import ray

    total = ray.cluster_resources()
    for name, needed in (("CPU", num_cpus), ("GPU", num_gpus)):
        if (found := total.get(name, 0)) >= needed:
            continue
        settings = cpu_settings if name == "CPU" else "num_workers and gpus_per_worker"
        text = f"{_need(needed, name, settings)}, but the cluster has {found:g}"
        if owns_ray():
            raise JobError(f"{text}; lower these settings, or set RAY_ADDRESS to a larger cluster")
        print(f"{text}; waiting for an autoscaler or for you to add nodes", file=sys.stderr)


def _need(amount: float, name: str, settings: str) -> str:
    with_data = " including Ray Data's" if name == "CPU" else ""
    return f"{settings} need {amount:g} {name}s{with_data}"


def root_cause(error: BaseException) -> str:
    """Return the innermost cause of a failure as text; Ray itself logs the whole chain."""
    cause: BaseException = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = inner
    return f"{type(cause).__name__} {first_line(cause)}".strip()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; Ray appends tracebacks."""
    return next(iter(str(error).strip().splitlines()), "")
