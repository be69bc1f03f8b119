"""Connects a job to Ray: to the cluster that it is told of, or to a local one of its own."""

import logging
import math
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ray_jobs.config.errors import JobError

_ANSWERS_S = 5.0
"""In which a cluster's head takes a connection."""
_started: set[int] = set()
"""This process, while it holds a local Ray of its own, to which nobody will add a node."""


@contextmanager
def connected(
    address: str | None,
    *,
    num_cpus: float,
    num_gpus: float = 0,
    data_cpus: int = 1,
    worker_logs: bool = False,
    object_store_memory: int | None = None,
) -> Iterator[None]:
    """Hold a connection to Ray; one that was there before is used and left open.

    Args:
        address: of a cluster; None for $RAY_ADDRESS, and without that for a local Ray.
        num_cpus: logical CPUs that the job's processes take.
        num_gpus: GPUs that they take.
        data_cpus: CPUs beside them for Ray Data, which waits for ever where workers hold every one;
            0 where it has nothing to do while they run.
        worker_logs: whether workers' output comes to this terminal.
        object_store_memory: bytes of a local Ray's shared memory; Ray's own choice by default.

    Raises:
        JobError: if the cluster does not answer, or a local Ray is too small.
    """
    # Both are read when Ray starts: a report waits for the controller's next look, and no one who
    # runs a job was asked whether usage may be reported.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.exceptions import RayError

    needed = math.ceil(num_cpus) + data_cpus
    if ray.is_initialized():
        _require(needed, num_gpus)
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    options = {"log_to_driver": worker_logs, "logging_level": logging.ERROR}
    if address and address != "local":
        _require_answer(address)
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, RayError) as error:
            raise JobError(f"no Ray cluster lets us in at {address}: {error}") from error
    else:
        num_cpus = max(os.cpu_count() or 1, needed)
        ray.init("local", num_cpus=num_cpus, object_store_memory=object_store_memory, **options)
        _started.add(os.getpid())
    quiet()
    try:
        _require(needed, num_gpus)
        yield
    finally:
        _started.clear()
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Check that something listens at an address; Ray itself gives up after two minutes."""
    parts = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+)\]?:(\d+)", address)
    if not parts:
        return
    try:
        socket.create_connection((parts[1], int(parts[2])), timeout=_ANSWERS_S).close()
    except OSError as error:
        raise JobError(f"no Ray cluster answers at {address}: {error}") from error


def is_our_own() -> bool:
    """Whether Ray is a local one that this process started, to which nobody adds nodes."""
    return os.getpid() in _started


def quiet() -> None:
    """Keep Ray Data's bars and start-up lines off the terminal; the jobs show their own."""
    import ray.data

    for name in ("ray.data", "ray.data._internal.progress", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


def _require(num_cpus: int, num_gpus: float) -> None:
    """Check that the cluster is large enough, or can still become so."""
    import ray

    total = ray.cluster_resources()
    for name, needed in (("CPU", num_cpus), ("GPU", num_gpus)):
        if (found := total.get(name, 0)) >= needed:
            continue
        text = (
            f"the job needs {needed:g} {name}s (with what Ray Data takes) and the cluster has "
            f"{found:g}"
        )
        if is_our_own():
            raise JobError(f"{text}; lower num_workers or cpus_per_worker, or add nodes")
        print(f"{text}; waiting for its autoscaler, or for you, to add nodes", file=sys.stderr)


def reason(error: BaseException) -> str:
    """Return the innermost cause of a failure inside Ray, which has printed the way to it."""
    cause: BaseException = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = inner
    return f"{type(cause).__name__} {first_line(cause)}".strip()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; Ray's go on with tracebacks."""
    return next(iter(str(error).strip().splitlines()), "")
