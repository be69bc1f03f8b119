"""What all tests share: a quiet TensorFlow, and one local Ray a session."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest

from tests.ray_jobs.heads import running_head

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray with CPUs for two workers and Ray Data; jobs called in a test find and use it."""
    from ray_jobs.cluster.connection import connected

    with ExitStack() as stack:
        # Five CPUs, which tests count on, however many the machine has.
        with patch("os.cpu_count", return_value=1):
            stack.enter_context(connected("local", num_cpus=4))
        yield


@pytest.fixture
def coordinator(ray_local: None) -> Iterator[Any]:
    """A coordinator that driver and workers of a run tell each other things on."""
    import ray

    from ray_jobs.train.coordinator import make_coordinator

    made = make_coordinator()
    yield made
    ray.kill(made)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real Ray head on loopback with token authentication; yields its clients' environment."""
    with running_head(tmp_path_factory.mktemp("head") / "head.log") as environment:
        yield environment
