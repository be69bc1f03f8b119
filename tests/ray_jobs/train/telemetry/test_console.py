import io
import threading
from typing import Any

import pytest
from rich.console import Console

from ray_jobs.train.coordinator import make_coordinator
from ray_jobs.train.telemetry import console
from ray_jobs.train.telemetry.console import ProgressConsole, rank, shown

HEADER = "  epoch   step  rows/s  data wait  train loss  val loss  val AUC  val acc"


def epoch_event(epoch: int = 0, changes: console.Event | None = None) -> console.Event:
    return {
        "kind": "epoch", "best": False, console.EPOCH: epoch, console.STEP: 40 * (epoch + 1),
        console.ROWS_PER_S: 123.4, console.DATA_WAIT_S: 0.5, console.EPOCH_S: 2.0,
        console.TRAIN_LOSS: 0.65432, console.VAL_LOG_LOSS: 0.6, console.VAL_ROC_AUC: 0.75,
        console.VAL_ACCURACY: 0.7, **(changes or {}),
    }  # fmt: skip


def step_event(epoch: int, done: int) -> console.Event:
    return {
        "kind": "step", console.EPOCH: epoch, "done": done, "total": 40,
        console.ROWS_PER_S: 1234.0, console.TRAIN_LOSS: 0.7,
    }  # fmt: skip


def screen_of(width: int) -> tuple[ProgressConsole, io.StringIO]:
    file = io.StringIO()
    return ProgressConsole("a run", Console(file=file, width=width, highlight=False)), file


def test_a_log_loss_that_falls_is_better():
    assert rank("val/log_loss", 0.4) < rank("val/log_loss", 0.5)


@pytest.mark.parametrize("key", ["val/roc_auc", "val/pr_auc", "val/accuracy"])
def test_any_other_metric_that_rises_is_better(key):
    assert rank(key, 0.9) < rank(key, 0.8)


@pytest.mark.parametrize("key", ["val/log_loss", "val/roc_auc"])
def test_any_value_is_better_than_none(key):
    assert rank(key, 100.0) < rank(key, None)


@pytest.mark.parametrize("width", [80, 100])
def test_the_screen_shows_a_title_a_header_and_one_line_an_epoch(width):
    screen, file = screen_of(width)
    with screen:
        screen.show(step_event(0, 1))
        screen.show(epoch_event(0, {"best": True}))
        screen.show({"kind": "note", "text": "writing the best model"})
        screen.show(epoch_event(1))
    assert file.getvalue().splitlines() == [
        "a run",
        HEADER,
        "      1     40     123       25 %      0.6543    0.6000   0.7500   0.7000  best",
        "  writing the best model",
        "      2     80     123       25 %      0.6543    0.6000   0.7500   0.7000",
    ]


def test_an_epoch_of_great_numbers_stays_one_line_of_80_columns():
    screen, file = screen_of(80)
    with screen:
        great = {"best": True, console.ROWS_PER_S: 99_999.0, console.TRAIN_LOSS: 1234.5}
        screen.show(epoch_event(998, great))
    lines = file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[2].split() == [
        "999", "39960", "99,999", "25", "%", "1234.5000", "0.6000", "0.7500", "0.7000", "best",
    ]  # fmt: skip


def test_columns_stand_below_their_names():
    screen, file = screen_of(100)
    with screen:
        screen.show(epoch_event())
    _, header, line = file.getvalue().splitlines()
    assert len(line) == len(header)


def test_a_metric_that_could_not_be_computed_is_a_dash():
    screen, file = screen_of(80)
    with screen:
        screen.show(epoch_event(0, {console.VAL_ROC_AUC: None}))
    _, header, line = file.getvalue().splitlines()
    assert line[: header.index("val acc")].endswith(" -  ")


def test_an_epoch_in_no_time_is_shown():
    screen, file = screen_of(80)
    with screen:
        screen.show(epoch_event(0, {console.EPOCH_S: 0.0, console.DATA_WAIT_S: 0.0}))
    assert " 0 % " in file.getvalue()


def test_a_terminal_shows_the_steps_of_an_epoch():
    file = io.StringIO()
    screen = ProgressConsole("a run", Console(file=file, width=100, force_terminal=True))
    with screen:
        screen.show(step_event(2, 7))
        screen.bar.refresh()
    for text in ("epoch 3", "7/40", "1,234 rows/s", "loss 0.7000"):
        assert text in file.getvalue()


PARTS = {
    console.STARTUP_RAY_S: 4.2,
    console.STARTUP_WORKERS_S: 6.0,
    console.STARTUP_IMPORTS_S: 7.5,
    console.STARTUP_BUILD_S: 3.44,
    console.STARTUP_CHECKPOINT_S: 0.0,  # A part that took no time is not worth saying.
    console.STARTUP_FIRST_STEP_S: 2.0,
}


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (90, ["  started in 23.1 s: Ray 4.2, workers 6.0, imports 7.5, build 3.4, "
              "first step 2.0"]),
        (80, ["  started in 23.1 s: Ray 4.2, workers 6.0, imports 7.5, build 3.4,",
              "    first step 2.0"]),
    ],
)  # fmt: skip
def test_a_start_is_a_line_with_its_parts(width, lines):
    screen, file = screen_of(width)
    with screen:
        screen.show({"kind": "startup", "parts": PARTS})
    assert file.getvalue().splitlines()[1:] == lines


@pytest.mark.parametrize(
    ("most", "begins"),
    [(3, "  failure 1 of at most 3: worker 1 died"), (-1, "  failure 1: worker 1 died"),
     (0, "  failure 1 of at most 0: worker 1 died")],
)  # fmt: skip
def test_a_failure_is_counted_and_its_text_is_no_markup(most, begins):
    screen, file = screen_of(60)
    text = "worker 1 died: [node 10.0.0.3] [red]was taken away[/red] by\n its provider"
    with screen:
        screen.show({"kind": "failure", "text": text, "attempt": 1, "most": most})
    _, *lines = file.getvalue().splitlines()
    assert lines[0].startswith(begins)
    assert all(line.startswith("    ") for line in lines[1:])
    assert text.split() == " ".join(lines).split(": ", 1)[1].split()


def test_a_failure_is_yellow_and_puts_the_bar_back_to_the_start():
    file = io.StringIO()
    screen = ProgressConsole("a run", Console(file=file, width=100, force_terminal=True))
    with screen:
        screen.show(step_event(0, 7))
        screen.show({"kind": "failure", "text": "worker 1 died", "attempt": 1, "most": 3})
        assert "\x1b[33m  failure 1 of at most 3: worker 1 died\x1b[0m\n" in file.getvalue()
        assert "\x1b[33mstarting" not in file.getvalue()
        file.truncate(0)
        screen.bar.refresh()
        assert "starting workers" in file.getvalue()
        assert "0/?" in file.getvalue()


def test_a_checkpoint_is_seen_in_the_bar_alone():
    file = io.StringIO()
    screen = ProgressConsole("a run", Console(file=file, width=100, force_terminal=True))
    with screen:
        screen.show({"kind": "checkpoint", "step": 1040})
        screen.show(step_event(0, 7))
        screen.bar.refresh()
    assert "loss 0.7000  saved at 1,040" in file.getvalue()
    screen, plain = screen_of(100)
    with screen:
        screen.show({"kind": "checkpoint", "step": 1040})
        screen.show(step_event(0, 7))
    assert plain.getvalue() == "a run\n"


def test_a_stage_is_a_line_and_an_event_of_another_kind_is_none():
    screen, file = screen_of(80)
    with screen:
        screen.show({"kind": "stage", "text": "epochs 1 to 3: backbone [frozen]"})
        screen.show({"kind": "of a later version"})
    assert file.getvalue().splitlines() == ["a run", "  epochs 1 to 3: backbone [frozen]"]


# -- the coordinator --------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_local")
def test_everything_posted_before_the_end_is_shown_in_order(capsys):
    import ray

    coordinator = make_coordinator()
    with shown(coordinator, "a run"):
        for epoch in range(3):
            coordinator.post.remote(epoch_event(epoch))
        ray.get(coordinator.post.remote({"kind": "note", "text": "the last word"}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["a run", HEADER]
    assert [line.split()[0] for line in lines[2:]] == ["1", "2", "3", "the"]


def wait_for_the_end_of(coordinator: Any) -> None:
    """Return when an actor that was killed is gone: a call may still be answered before."""
    import ray
    from ray.exceptions import RayActorError

    try:
        while True:
            ray.get(coordinator.take.remote())
    except RayActorError:
        return


@pytest.mark.usefixtures("ray_local")
def test_the_end_of_the_work_is_not_held_up_by_a_board_that_died(capsys):
    import ray

    coordinator = make_coordinator()
    with shown(coordinator, "a run"):
        ray.get(coordinator.post.remote(epoch_event()))
        ray.kill(coordinator)
        wait_for_the_end_of(coordinator)
        coordinator.post.remote(epoch_event())  # what a worker does; it never waits
    assert capsys.readouterr().out.startswith("a run\n")
    assert "progress" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.usefixtures("ray_local")
def test_an_error_in_the_work_ends_the_show_and_the_board():
    coordinator = make_coordinator()
    with pytest.raises(ValueError, match="the work failed"), shown(coordinator, "a run"):
        raise ValueError("the work failed")
    wait_for_the_end_of(coordinator)
    assert "progress" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.usefixtures("ray_local")
def test_a_board_that_was_slow_once_is_shown_all_the_same(capsys, monkeypatch):
    import ray
    from ray.exceptions import GetTimeoutError

    get, late = ray.get, threading.Event()

    def slow_once(*arguments, **options):
        if not late.is_set():
            late.set()
            raise GetTimeoutError("slow")
        return get(*arguments, **options)

    coordinator = make_coordinator()
    get(coordinator.post.remote(epoch_event(0)))
    monkeypatch.setattr(ray, "get", slow_once)
    with shown(coordinator, "a run"):
        assert late.wait(timeout=60)
        get(coordinator.post.remote(epoch_event(1)))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["1", "2"]
