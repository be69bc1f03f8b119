"""What all tests share: a quiet TensorFlow, and one local Ray a session."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray with CPUs for two workers and Ray Data; jobs called in a test find and use it."""
    from ray_jobs.cluster import connected

    with connected("local", num_cpus=4):
        yield
