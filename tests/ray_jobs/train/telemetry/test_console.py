import io
import threading
from typing import Any

import pytest
from rich.console import Console

from ray_jobs.train.telemetry import console
from ray_jobs.train.telemetry import history_keys as keys
from ray_jobs.train.telemetry.console import ProgressConsole, show_progress

HEADER = "  epoch   step  rows/s  data wait  train loss  val loss  val AUC  val acc"


def epoch_event(epoch: int = 0, changes: console.Event | None = None) -> console.Event:
    return {
        "kind": "epoch", "best": False, keys.EPOCH: epoch, keys.STEP: 40 * (epoch + 1),
        keys.ROWS_PER_S: 123.4, keys.DATA_WAIT_S: 0.5, keys.EPOCH_S: 2.0,
        keys.TRAIN_LOSS: 0.65432, keys.VAL_LOG_LOSS: 0.6, keys.VAL_ROC_AUC: 0.75,
        keys.VAL_ACCURACY: 0.7, **(changes or {}),
    }  # fmt: skip


def step_event(epoch: int, done: int) -> console.Event:
    return {
        "kind": "step", keys.EPOCH: epoch, "done": done, "total": 40,
        keys.ROWS_PER_S: 1234.0, keys.TRAIN_LOSS: 0.7,
    }  # fmt: skip


def console_of(width: int, **options: Any) -> tuple[ProgressConsole, io.StringIO]:
    file = io.StringIO()
    shown = Console(file=file, width=width, highlight=False, **options)
    return ProgressConsole("a run", shown), file


def test_a_title_a_header_and_lines_of_epochs_and_events_are_printed():
    progress, file = console_of(80)
    parts = {
        keys.STARTUP_RAY_S: 4.2,
        keys.STARTUP_WORKERS_S: 6.0,
        keys.STARTUP_IMPORTS_S: 7.5,
        keys.STARTUP_BUILD_S: 3.44,
        keys.STARTUP_CHECKPOINT_S: 0.0,  # Too short to be printed.
        keys.STARTUP_FIRST_STEP_S: 2.0,
    }
    failure = {"kind": "failure", "text": "worker 1 died: [red]lost[/red]\n its node", "attempt": 1}
    undefined = {keys.VAL_ROC_AUC: None, keys.EPOCH_S: 0.0, keys.DATA_WAIT_S: 0.0}
    great = {"best": True, keys.ROWS_PER_S: 99_999.0, keys.TRAIN_LOSS: 1234.5}
    with progress:
        progress.show({"kind": "startup", "parts": parts})
        progress.show(step_event(0, 1))
        progress.show({"kind": "checkpoint", "step": 1040})
        progress.show(epoch_event(0, {"best": True}))
        progress.show({"kind": "note", "text": "writing the best model"})
        progress.show({"kind": "stage", "text": "epochs 1 to 3: backbone [frozen]"})
        progress.show({"kind": "of a later version"})
        progress.show({**failure, "most": 3})
        progress.show({**failure, "most": -1})
        progress.show(epoch_event(1, undefined))
        progress.show(epoch_event(998, great))
    assert file.getvalue().splitlines() == [
        "a run",
        "  started in 23.1 s: Ray 4.2, workers 6.0, imports 7.5, build 3.4,",
        "    first step 2.0",
        HEADER,
        "      1     40     123       25 %      0.6543    0.6000   0.7500   0.7000  best",
        "  writing the best model",
        "  epochs 1 to 3: backbone [frozen]",
        "  failure 1 of at most 3: worker 1 died: [red]lost[/red]  its node",
        "  failure 1: worker 1 died: [red]lost[/red]  its node",
        "      2     80     123        0 %      0.6543    0.6000        -   0.7000",
        "    999  39960  99,999       25 %   1234.5000    0.6000   0.7500   0.7000  best",
    ]


def test_a_terminal_shows_the_steps_and_checkpoints_in_a_bar_and_failures_in_yellow():
    progress, file = console_of(100, force_terminal=True)
    with progress:
        progress.show({"kind": "checkpoint", "step": 1040})
        progress.show(step_event(2, 7))
        progress.bar.refresh()
        for text in ("epoch 3", "7/40", "1,234 rows/s", "loss 0.7000  saved at 1,040"):
            assert text in file.getvalue()
        progress.show({"kind": "failure", "text": "worker 1 died", "attempt": 1, "most": 3})
        assert "\x1b[33m  failure 1 of at most 3: worker 1 died\x1b[0m\n" in file.getvalue()
        file.truncate(0)
        progress.bar.refresh()
        assert "starting workers" in file.getvalue()
        assert "0/?" in file.getvalue()


# -- the coordinator --------------------------------------------------------------------------


def wait_for_death(coordinator: Any) -> None:
    """Wait until a killed actor is dead; until then, it may still answer calls."""
    import ray
    from ray.exceptions import RayActorError

    try:
        while True:
            ray.get(coordinator.take.remote())
    except RayActorError:
        return


def test_a_dead_coordinator_does_not_delay_the_end_of_the_work(coordinator, capsys):
    import ray

    with show_progress(coordinator, "a run"):
        ray.get(coordinator.post.remote(epoch_event()))
        ray.kill(coordinator)
        wait_for_death(coordinator)
        coordinator.post.remote(epoch_event())  # Workers post without waiting.
    assert capsys.readouterr().out.startswith("a run\n")
    assert "progress" not in [thread.name for thread in threading.enumerate()]


def test_an_error_ends_the_progress_and_the_coordinator(coordinator):
    with pytest.raises(ValueError, match="the work failed"), show_progress(coordinator, "a run"):
        raise ValueError("the work failed")
    wait_for_death(coordinator)
    assert "progress" not in [thread.name for thread in threading.enumerate()]


def test_all_events_before_the_end_are_printed_in_order_despite_a_late_answer(
    coordinator, capsys, monkeypatch
):
    import ray
    from ray.exceptions import GetTimeoutError

    get, late = ray.get, threading.Event()

    def slow_once(*arguments, **options):
        if not late.is_set():
            late.set()
            raise GetTimeoutError("slow")
        return get(*arguments, **options)

    get(coordinator.post.remote(epoch_event(0)))
    monkeypatch.setattr(ray, "get", slow_once)
    with show_progress(coordinator, "a run"):
        assert late.wait(timeout=60)
        coordinator.post.remote(epoch_event(1))
        get(coordinator.post.remote({"kind": "note", "text": "the last word"}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["a run", HEADER]
    assert [line.split()[0] for line in lines[2:]] == ["1", "2", "the"]
