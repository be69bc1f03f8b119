"""Renders a search as one HTML file, from tune_page.html.j2."""

from typing import Any

from markupsafe import Markup

from ray_jobs.config.text import NONE, count_text, duration_text
from ray_jobs.pages.page_kit import chart, render
from ray_jobs.tune.results import trial_charts
from ray_jobs.tune.results.leaderboard import score_text
from ray_jobs.tune.results.search_state import PARTS, Search, TrialRow, finite
from ray_jobs.tune.results.searched_settings import searched_settings, value_text
from ray_jobs.tune.results.setting_importance import MIN_TRIALS, importances
from ray_jobs.tune.results.trial_charts import STATES

_MAX_LEADERS = 25
_MAX_FAILURES = 25
_MAX_BARS = 40
_ERROR_LETTERS = 300
_VALUE_LETTERS = 24
_UNITS = {"trials": "trials", "hours": "hours", "cpu_hours": "CPU hours", "gpu_hours": "GPU hours"}


def html(search: Search) -> str:
    """Return the report page of a search."""
    first = search.objectives[0]
    counts = search.count_states().items()
    study = trial_charts.study_of(search)
    states = ", ".join(f"{count:,} {STATES.get(state, state)}" for state, count in counts)
    return render(
        "tune/results/tune_page.html.j2",
        title=f"Search {search.name}",
        search=search,
        score_text=score_text,
        no_score="No trial has a score yet.",
        states=f"{count_text(len(search.trials), 'trial')}: {states}.",
        best=next(iter(search.scored()), None),
        spent=[_spent(search, key) for key in _UNITS if key in search.spent | search.budget],
        history=chart(trial_charts.history(search, study), f"{first} of each trial"),
        settings=chart(
            trial_charts.parallel_coordinates(search, study), "Settings and scores", 380
        ),
        num_settings=len(searched_settings(search.trials)),
        curves=chart(trial_charts.learning_curves(search, study), f"{first} over the epochs"),
        **_comparison(search),
        **_leaderboard(search),
        **_failures(search),
        **_importance(search),
        **_cost(search),
        **_trade_off(search),
    )


def _spent(search: Search, key: str) -> tuple[str, str | None, str, float]:
    """Return the spent amount of one resource, its limit, its unit and the spent fraction."""
    used, limit = finite(search.spent.get(key)) or 0.0, finite(search.budget.get(key))
    if limit is None:
        return _amount(used), None, _UNITS[key], 0.0
    fraction = min(max(used / limit, 0.0), 1.0) if limit > 0 else 1.0
    return _amount(used), _amount(limit), _UNITS[key], fraction


def _amount(number: float) -> str:
    return f"{number:,.0f}" if number == int(number) else f"{number:,.2f}"


def _comparison(search: Search) -> dict[str, Any]:
    test = search.comparison
    if test is None or test.same:
        return {}
    difference = test.best - test.untuned
    return {
        "difference": f"a difference of {difference:+.4f} "
        f"(95 % bootstrap interval {test.low:+.4f} to {test.high:+.4f})",
        "interval": chart(
            trial_charts.interval(test.low, difference, test.high), "Interval of the difference", 70
        ),
    }


def _leaderboard(search: Search) -> dict[str, Any]:
    ranked, settings = search.scored(), searched_settings(search.trials)
    names = [Markup("<span title='{}'>{}</span>").format(s.path, s.name) for s in settings]
    rows = [
        [
            rank,
            trial.name,
            STATES.get(trial.state, trial.state) + ", then in full" * bool(trial.scores_in_full),
            *(score_text(trial.score(metric)) for metric in search.objectives),
            f"{NONE if trial.best_epoch is None else trial.best_epoch + 1} of {trial.epochs:,}",
            f"{trial.wall_s:,.0f}",
            *(_value(trial, setting.path) for setting in settings),
        ]
        for rank, trial in enumerate(ranked[:_MAX_LEADERS], 1)
    ]
    hidden = {
        "with a score": len(ranked) - len(rows),
        "without a score": len(search.trials) - len(ranked),
    }
    return {
        "leaders_head": ["", "trial", "state", *search.objectives, "best epoch", "seconds", *names],
        "leaders": rows,
        "hidden": ", ".join(
            f"{count_text(count, 'trial')} {which}" for which, count in hidden.items() if count
        ),
    }


def _value(trial: TrialRow, path: str) -> str:
    if path not in trial.values:
        return NONE
    text = value_text(trial.values[path])
    if len(text) <= _VALUE_LETTERS:
        return text
    return Markup("<span title='{}'>{}…</span>").format(text, text[: _VALUE_LETTERS - 1])


def _failures(search: Search) -> dict[str, Any]:
    failed = [trial for trial in search.trials if trial.state == "failed"]
    rows = []
    for trial in failed[:_MAX_FAILURES]:
        lines = (trial.error or "").strip().splitlines() or ["no error was recorded"]
        rows.append([trial.name, f"{trial.epochs:,}", lines[0][:_ERROR_LETTERS]])
    return {"failures": rows, "num_failed": len(failed)}


def _importance(search: Search) -> dict[str, Any]:
    scored, fractions = search.scored(), importances(search)
    settings = searched_settings(scored)
    if fractions:
        names = {setting.path: setting.name for setting in settings}
        figure = trial_charts.bars({names[path]: value for path, value in fractions.items()})
        return {"importance": chart(figure, "Importances", 60 + 24 * len(fractions))}
    if len(scored) < MIN_TRIALS:
        reason = (
            f"Importance needs at least {MIN_TRIALS} trials with a score; this search has "
            f"{len(scored)}."
        )
    elif all(setting.single for setting in settings):
        reason = "No setting has two values, so no setting explains a difference."
    else:
        reason = "All scores are equal, so no setting explains a difference."
    return {"importance": None, "no_importance": reason}


def _cost(search: Search) -> dict[str, Any]:
    totals = {part: sum(t.seconds.get(part, 0.0) for t in search.trials) for part in PARTS}
    # Time of trials outside the parts, so that the fractions add up to 1.
    other_s = sum(trial.wall_s for trial in search.trials) - sum(totals.values())
    totals |= {"other": max(other_s, 0.0), "search": search.idle_s()}
    if not (total_s := sum(totals.values())):
        return {"total_s": 0.0}
    timed = [trial for trial in search.ranked() if any(trial.seconds.values())]
    rows = {trial.name: trial.seconds for trial in timed[:_MAX_BARS]}
    return {
        "total_s": total_s,
        "costs": [
            [part, duration_text(seconds), f"{seconds / total_s:.1%}"]
            for part, seconds in totals.items()
        ],
        "trial_costs": chart(trial_charts.costs(rows), "Cost of each trial", 80 + 20 * len(rows)),
        "hidden_costs": len(timed) - len(rows),
    }


def _trade_off(search: Search) -> dict[str, Any]:
    if len(search.objectives) < 2:
        return {}
    front = search.pareto_front()
    return {
        "trade_off": chart(trial_charts.trade_off(search), "Trade-off between two objectives"),
        "front": [
            [trial.name, *(score_text(trial.score(metric)) for metric in search.objectives)]
            for trial in front[:_MAX_LEADERS]
        ],
        "num_front": len(front),
    }
