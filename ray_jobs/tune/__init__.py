"""The parts of `tune.py`, in running order.

In parentheses stands what does a part of it.

    spec.py         settings of a search
    space.py        what is tried, checked before anything starts
    features.py     a frozen backbone's features, computed once (cheap.py: whether, and which)
    slots.py        how many trials a cluster can hold at once
    run.py          Ray Tune, from the begin or from where it stopped (whole_files.py)
    searcher.py     who chooses the next trial's values
    scheduler.py    who stops, pauses or clones trials (scheduler_state.py: across restarts)
    trial.py        one trial after another in one actor (group.py: its processes)
    follow.py       what Tune tells of trials: state, budget, checkpoints that may go (kept.py)
    result.py       what is known of a search and its trials
    screen.py       the leaderboard on the terminal
    finish.py       the best trained in full, evaluated, written down
    page.py         tune.html (figures.py charts.py standing.py importance.py)
"""

from ray_jobs.tune.job import search

__all__ = ["search"]
