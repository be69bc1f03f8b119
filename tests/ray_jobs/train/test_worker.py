"""What a worker does around its loop: waits, wishes, and what it tells of a failure."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.config.spec import RunSpec
from ray_jobs.storage.folder import Folder
from ray_jobs.train import worker as module
from ray_jobs.train.checkpoints.checkpoint import Checkpoint, DamagedCheckpointError, LoopState
from ray_jobs.train.checkpoints.checkpoint_manager import CheckpointManager
from ray_jobs.train.coordinator import reported_failures
from ray_jobs.train.telemetry.profiler import Profiler
from ray_jobs.train.worker import _reporting_failures, _Worker


@contextmanager
def worker_of(coordinator: Any, run: Path, rank: int = 0) -> Iterator[Any]:
    spec = RunSpec.model_validate({"train": {"checkpoint_every_steps": 4}})
    config = {
        "spec": spec.model_dump(mode="json"), "run": str(run), "coordinator": coordinator,
        "ray_s": 1.0, "began": time.time(),
    }  # fmt: skip
    with ThreadPoolExecutor(1) as beside:
        made = _Worker(config, rank, beside)
        made.profiler = Profiler(made.run, None, made._note)
        with closing(made.watchdog):
            yield made


@pytest.fixture
def worker(coordinator, tmp_path) -> Any:
    with worker_of(coordinator, tmp_path) as made:
        yield made


def test_a_checkpoint_is_waited_for_before_a_failure_would_cost_too_much(worker, monkeypatch):
    waits: list[int] = []
    monkeypatch.setattr(worker.store, "wait", lambda: waits.append(worker.store.written))
    worker.before_step(3, 1)
    assert waits == []
    worker.before_step(4, 1)
    worker.before_step(3, 2)
    assert waits == [0, 0]
    worker.store.written = 4
    worker.before_step(4, 4)
    assert len(waits) == 2


def test_a_node_that_is_about_to_go_is_saved_for_once(worker, monkeypatch):
    import ray.train

    told: list[Any] = [None]
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: told[0])
    every = module._PREEMPTION_EVERY
    assert not any(worker.poll_control().save for _ in range(2 * every))
    told[0] = "soon"
    assert [worker.poll_control().save for _ in range(2 * every)].count(True) == 1


def test_all_workers_go_on_from_the_checkpoint_that_rank_0_found(
    coordinator, tmp_path, monkeypatch
):
    import ray.train.collective

    store = CheckpointManager(Folder(tmp_path))
    for step in (4, 8):
        store.save(Checkpoint(LoopState(step=step), {}, {}))
    store.close()
    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", lambda own: 4)
    with worker_of(coordinator, tmp_path, rank=1) as worker:
        found = worker._agreed_checkpoint()
    # It has found the one after step 8, which rank 0's view of the disk does not show.
    assert found.state.step == 4


@pytest.mark.parametrize(
    ("saved", "text"),
    [
        (7, "stopped after step 7, which is saved"),
        (4, "stopped after step 7, whose checkpoint could not be written; the newest is that after "
            "step 4"),
        (0, "stopped after step 7, whose checkpoint could not be written; there is none"),
    ],
)  # fmt: skip
def test_a_stop_is_told_with_what_is_saved_of_it(saved, text):
    assert module._stopped_text(7, saved) == text


@pytest.mark.parametrize(("step", "where"), [(None, "in its start"), (7, "after step 7")])
def test_a_hang_is_told_with_its_place_and_its_setting(worker, coordinator, step, where):
    worker.step = step
    worker._tell_hang(46.2)
    (told,) = reported_failures(coordinator)
    assert told["text"] == (
        f"nothing happened for 46 s {where} (train.hang_timeout_s): this worker or one that it "
        "waits for hangs"
    )
    assert (told["rank"], told["again"], told["of"]) == (0, True, "hang")


def test_what_is_tried_again_and_what_is_an_echo_follows_from_the_kind_of_an_error(coordinator):
    import tensorflow as tf

    cases = [
        (ValueError("row 'a' cannot be used"), False, "own"),
        (OSError("no space left"), True, "own"),
        (DamagedCheckpointError("cut short"), True, "own"),
        (tf.errors.UnavailableError(None, None, "connection reset"), True, "echo"),
        (tf.errors.InternalError(None, None, "Collective ops is aborted"), True, "echo"),
        (tf.errors.InternalError(None, None, "cuDNN could not start"), True, "own"),
        (tf.errors.ResourceExhaustedError(None, None, "out of memory"), False, "own"),
        (tf.errors.InvalidArgumentError(None, None, "shapes"), False, "own"),
    ]
    for error, _, _ in cases:
        with pytest.raises(type(error)), _reporting_failures(coordinator, 1):
            raise error
    told = reported_failures(coordinator)
    assert [(f["again"], f["of"]) for f in told] == [(again, of) for _, again, of in cases]
    assert told[0]["text"] == "ValueError: row 'a' cannot be used"
