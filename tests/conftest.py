"""Shared by all tests: a quiet TensorFlow and one local Ray per session."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest

from tests.ray_jobs.heads import running_head

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Ray runs workers at a lower priority than drivers. Beside the second test process, those that wait
# for each other would starve.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray with CPUs for two workers and Ray Data, which jobs in this process use."""
    from ray_jobs.cluster.connection import connected

    with ExitStack() as stack:
        # Tests rely on exactly five CPUs, whatever the machine has.
        with patch("ray_jobs.cluster.connection.available_cpus", return_value=5):
            stack.enter_context(connected("local", num_cpus=4))
        yield


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a job that connects to a cluster before it reports an error."""
    monkeypatch.delattr("ray_jobs.cluster.connection.connected")


@pytest.fixture
def coordinator(ray_local: None) -> Iterator[Any]:
    """The mailbox between the driver and the workers of a run."""
    import ray

    from ray_jobs.train.coordinator import make_coordinator

    handle = make_coordinator()
    yield handle
    ray.kill(handle)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment for clients of a real Ray head on loopback with token authentication."""
    with running_head(tmp_path_factory.mktemp("head") / "head.log") as environment:
        yield environment
