"""Shared by all tests: a quiet TensorFlow and one local Ray per session."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest

from tests.ray_jobs.heads import running_head

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The OpenMP threads of one test process would spin while they wait for the cores of the other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
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
def predict_here(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads and predicts rows in this process, because an actor needs seconds for TensorFlow."""
    from ray_jobs.predict import predictor

    def blocks(run: Any, source: Any, spec: Any, with_distance: bool) -> Iterator[Any]:
        settings = (spec.batch_size, spec.cpus_per_worker, spec.use_gpu, with_distance)
        predict = predictor.Predictor(run, *settings)
        for task in source.tasks():
            for rows in source.read(task):
                yield from predict(rows)

    # TensorFlow is already initialized in this process, so its threads cannot be set.
    monkeypatch.setattr("ray_jobs.cluster.strategy.set_devices", lambda num_cpus, use_gpu: None)
    monkeypatch.setattr(predictor, "_predicted_blocks", blocks)


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
