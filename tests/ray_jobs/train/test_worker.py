"""A worker outside its loop: checkpoints, control requests, and reports of failures."""

import ast
import os
import signal
import subprocess
import sys
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
from ray_jobs.train.coordinator import WorkerFailure
from ray_jobs.train.telemetry.profiler import Profiler
from ray_jobs.train.worker import _reporting_failures, _Worker

ROOT = Path(__file__).parents[3]


@contextmanager
def worker_of(coordinator: Any, run: Path, rank: int = 0) -> Iterator[Any]:
    spec = RunSpec.model_validate({"train": {"checkpoint_every_steps": 4}})
    config = {
        "spec": spec.model_dump(mode="json"), "run": str(run), "coordinator": coordinator,
        "ray_s": 1.0, "attempt_start": time.time(),
    }  # fmt: skip
    with ThreadPoolExecutor(1) as background:
        worker = _Worker(config, rank, background)
        worker.profiler = Profiler(worker.run, None, worker._note)
        with closing(worker.watchdog):
            yield worker


@pytest.fixture
def worker(coordinator, tmp_path) -> Any:
    with worker_of(coordinator, tmp_path) as worker:
        yield worker


def test_a_worker_waits_for_a_checkpoint_before_a_failure_costs_too_many_steps(worker, monkeypatch):
    waits: list[int] = []
    monkeypatch.setattr(
        worker.checkpoints, "wait", lambda: waits.append(worker.checkpoints.written)
    )
    worker.before_step(3, 1)
    assert waits == []
    worker.before_step(4, 1)
    worker.before_step(3, 2)
    assert waits == [0, 0]
    worker.checkpoints.written = 4
    worker.before_step(4, 4)
    assert len(waits) == 2


def test_a_checkpoint_is_requested_once_before_a_preemption(worker, monkeypatch):
    import ray.train

    info: list[Any] = [None]
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: info[0])
    every = module._POLLS_PER_PREEMPTION_CHECK
    assert not any(worker.poll_control().save for _ in range(2 * every))
    info[0] = "soon"
    assert [worker.poll_control().save for _ in range(2 * every)].count(True) == 1
    assert ray.get(worker.coordinator.preemption_announced.remote())


def test_all_workers_resume_from_the_checkpoint_that_rank_0_found(
    coordinator, tmp_path, monkeypatch
):
    import ray.train.collective

    manager = CheckpointManager(Folder(tmp_path))
    for step in (4, 8):
        manager.save(Checkpoint(LoopState(step=step), {}, {}))
    manager.close()
    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", lambda own: 4)
    with worker_of(coordinator, tmp_path, rank=1) as worker:
        found = worker._shared_checkpoint()
    # This rank also sees the checkpoint after step 8, but rank 0 does not.
    assert found.state.step == 4


@pytest.mark.parametrize(
    ("saved", "text"),
    [
        (7, "stopped after step 7; its checkpoint is saved"),
        (4, "stopped after step 7, but its checkpoint could not be written; the newest checkpoint "
            "is from step 4"),
        (0, "stopped after step 7, but its checkpoint could not be written; there is no earlier "
            "checkpoint"),
    ],
)  # fmt: skip
def test_the_note_of_a_stop_names_the_saved_checkpoint(saved, text):
    assert module._stopped_text(7, saved) == text


@pytest.mark.parametrize(("step", "where"), [(None, "during start-up"), (7, "after step 7")])
def test_the_report_of_a_hang_names_the_step_and_the_setting(worker, coordinator, step, where):
    import ray

    worker.step = step
    worker._report_hang(46.2)
    text = (
        f"no progress for 46 s {where} (train.hang_timeout_s=900): this worker, or a worker that "
        "it is waiting for, is hung; increase train.hang_timeout_s if steps can take this long"
    )
    assert ray.get(coordinator.failures.remote()) == [WorkerFailure(0, text, kind="hang")]


def test_errors_are_reported_as_permanent_or_secondary_by_their_class(coordinator):
    import ray
    import tensorflow as tf

    cases = [
        (ValueError("row 'a' cannot be used"), "error", True),
        (OSError("no space left"), "error", False),
        (DamagedCheckpointError("truncated"), "error", False),
        (tf.errors.UnavailableError(None, None, "connection reset"), "secondary", False),
        (tf.errors.InternalError(None, None, "Collective ops is aborted"), "secondary", False),
        (tf.errors.InternalError(None, None, "cuDNN could not start"), "error", False),
        (tf.errors.ResourceExhaustedError(None, None, "out of memory"), "error", True),
        (tf.errors.InvalidArgumentError(None, None, "shapes"), "error", True),
    ]
    for error, _, _ in cases:
        with pytest.raises(type(error)), _reporting_failures(coordinator, 1):
            raise error
    reported = ray.get(coordinator.failures.remote())
    assert [(f.kind, f.permanent) for f in reported] == [tuple(case[1:]) for case in cases]
    assert reported[0].text == "ValueError: row 'a' cannot be used"


def test_an_error_of_a_task_is_reported_like_one_of_the_worker(coordinator):
    import ray

    @ray.remote(num_cpus=0)
    def read() -> None:
        raise ValueError("part-00000.parquet is truncated\nadvice of Ray Data")

    with pytest.raises(ValueError, match="truncated"), _reporting_failures(coordinator, 0):
        ray.get(read.remote())
    (failure,) = ray.get(coordinator.failures.remote())
    assert failure.text == "ValueError: part-00000.parquet is truncated"
    assert failure.permanent


_KILLED_WORKER = """
import os, signal, sys
from pathlib import Path
from ray_jobs.cluster.strategy import Replicas, WorkerContext, set_devices
from ray_jobs.config.spec import RunSpec
from ray_jobs.train.loop import Loop
from tests.ray_jobs.tiny import write_prepared

prepared = Path(sys.argv[1])
set_devices(1, use_gpu=False)
manifest = write_prepared(prepared, {"train": 20, "validation": 5})
spec = RunSpec.model_validate(
    {
        "data": {"prepared": str(prepared)},
        "model": {"image": {"kind": "tiny", "weights": None, "units": 4}},
        "train": {"global_batch_size": 10, "epochs": 1, "mixup_alpha": 0.2, "accumulate_steps": 2},
    }
)
loop = Loop(spec, manifest, WorkerContext())
loop.run()
loop.replicas._sum(loop.loss_sum)
print("trained", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_worker_leaves_nothing_in_the_temporary_folder(tmp_path):
    """Autograph writes generated source there, which only a regular exit deletes."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-c", _KILLED_WORKER, str(tmp_path / "prepared")]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "trained\n"), done.stderr
    assert list(temporary.iterdir()) == []


def test_no_function_is_converted_by_autograph():
    calls = [
        (path.name, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for path in (ROOT / "ray_jobs").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tf.function"
    ]
    # A killed worker would leave the generated source in the temporary folder.
    assert len(calls) >= 6
    assert [name for name, options in calls if options.get("autograph") != "False"] == []
