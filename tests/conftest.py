"""What all tests share: a quiet TensorFlow, and one local Ray a session."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray with CPUs for two workers and Ray Data; jobs called in a test find and use it."""
    from ray_jobs.cluster import connected

    with ExitStack() as stack:
        # Five CPUs, which tests count on, however many the machine has.
        with patch("os.cpu_count", return_value=1):
            stack.enter_context(connected("local", num_cpus=4))
        yield


@pytest.fixture
def board(ray_local: None) -> Iterator[Any]:
    """A board that driver and workers of a run tell each other things on."""
    import ray

    from ray_jobs.board import make_board

    made = make_board()
    yield made
    ray.kill(made)
