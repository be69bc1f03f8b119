import io

import pytest
from rich.console import Console

from ray_jobs.tune.results.leaderboard import LiveLeaderboard, leaderboard_table, spent_text
from ray_jobs.tune.results.search_state import Search
from tests.ray_jobs.tune.rows import trial


@pytest.fixture
def search() -> Search:
    rows = [
        trial(0, 0.5, state="finished", epochs=9),
        trial(1, 0.4, state="stopped", epochs=3),
        trial(2, None, state="failed", error="ValueError: [bold]nan[/bold]"),
        trial(3, None, state="running"),
    ]
    for row in rows:
        row.values = {"model.fusion.units": 8, "train.learning_rate": 1e-3, "model.image.units": 4}
    rows[1].values = {"model.fusion.units": 8, "train.learning_rate": 0.0025}
    spent = {"hours": 0.5, "cpu_hours": 1.0, "gpu_hours": 0.0}
    return Search("s", ["val/log_loss"], rows, spent, {"hours": 2.0})


def shown(search: Search, *ended, width: int = 200) -> str:
    stream = io.StringIO()
    with LiveLeaderboard("title", Console(file=stream, width=width, highlight=False)) as screen:
        for row in ended:
            screen.show(search, row)
    return stream.getvalue()


def test_a_trial_that_ends_is_a_line_that_says_how(search):
    lines = shown(search, *search.trials[:3]).splitlines()
    assert lines[0] == "title"
    assert "finished" in lines[1]
    assert "val/log_loss 0.5000" in lines[1]
    assert lines[2].rstrip().endswith("(units 8, learning_rate 0.0025)")
    assert "best" in lines[2]
    assert "best" not in lines[1]
    # An error's text is no markup.
    assert "ValueError: [bold]nan[/bold]" in lines[3]
    # Lines of a log are not broken.
    assert len(shown(search, search.trials[0], width=40).splitlines()) == 2


def test_the_table_holds_the_best_first_under_names_that_tell_settings_apart(search):
    stream = io.StringIO()
    Console(file=stream, width=200).print(leaderboard_table(search))
    head, *rows = stream.getvalue().splitlines()
    assert {"fusion.units", "image.units", "learning_rate"} <= set(head.split())
    assert [row.split()[1] for row in rows[:4]] == ["stopped", "finished", "failed", "running"]
    text = spent_text(search)
    assert text == "1 finished, 1 stopped, 1 failed, 1 running  0.50 of 2 h  1.00 CPU h"
