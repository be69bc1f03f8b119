"""Renders a search as one HTML file, during the search and after it.

The page follows the reader's light or dark mode and has one column on a phone.
"""

from collections.abc import Iterator

from ray_jobs.config.text import count_text
from ray_jobs.pages.page_kit import NONE, document, escape, more_note, section, share_bar, table
from ray_jobs.tune.results import trial_charts
from ray_jobs.tune.results.leaderboard import score_text
from ray_jobs.tune.results.search_state import PARTS, Comparison, Search, TrialRow, finite
from ray_jobs.tune.results.searched_settings import searched_settings, value_text
from ray_jobs.tune.results.setting_importance import MIN_TRIALS, importances
from ray_jobs.tune.results.trial_charts import NO_SCORE, STATES

_MAX_LEADERS = 25
_MAX_FAILURES = 25
_MAX_BARS = 40
_ERROR_LETTERS = 300
_VALUE_LETTERS = 24
_UNITS = {"trials": "trials", "hours": "hours", "cpu_hours": "CPU hours", "gpu_hours": "GPU hours"}


def html(search: Search) -> str:
    """Return the report page of a search."""
    first = escape(search.objectives[0])
    parts = [
        *_header(search),
        *_comparison(search),
        _leaderboard(search),
        *_failures(search),
        _chart("History", f"{first} in order of suggestion", trial_charts.history(search)),
        _chart(
            "Settings",
            "Settings and score of each trial",
            trial_charts.parallel_coordinates(search),
        ),
        _importance(search),
        _chart("Learning curves", f"{first} by epoch", trial_charts.learning_curves(search)),
        _cost(search),
        *_trade_off(search),
    ]
    return document(f"Search {search.name}", parts)


def _header(search: Search) -> Iterator[str]:
    counts = search.count_states().items()
    states = ", ".join(f"{count:,} {STATES.get(state, state)}" for state, count in counts)
    yield f"<h1>{escape(search.name)}</h1>"
    yield f"<p class='muted'>{count_text(len(search.trials), 'trial')}: {states}.</p>"
    best, content = next(iter(search.scored()), None), NO_SCORE
    if best is not None:
        scores = "".join(
            f"<div><b>{score_text(best.score(metric))}</b><span class='muted small'>"
            f"{escape(metric)}</span></div>"
            for metric in search.objectives
        )
        epoch = "" if best.best_epoch is None else f", after epoch {best.best_epoch + 1}"
        content = (
            f"<p class='muted small'>Best: trial {escape(best.name)}{epoch}</p>"
            f"<div class='scores'>{scores}</div>"
        )
    yield f"<div class='card best'>{content}</div>"
    spent = [_spent(search, key) for key in _UNITS if key in search.spent or key in search.budget]
    if spent:
        yield f"<div class='tiles'>{''.join(spent)}</div>"


def _spent(search: Search, key: str) -> str:
    """Return the spent amount of one resource, with a bar if it has a limit."""
    used, limit = finite(search.spent.get(key)) or 0.0, finite(search.budget.get(key))
    of, bar = "", "<p class='muted small'>no limit</p>"
    if limit is not None:
        of = f" of {_amount(limit)}"
        bar = share_bar(min(max(used / limit, 0.0), 1.0) if limit > 0 else 1.0)
    return f"<div class='card'><p><b>{_amount(used)}</b>{of} {_UNITS[key]}</p>{bar}</div>"


def _amount(number: float) -> str:
    return f"{number:,.0f}" if number == int(number) else f"{number:,.2f}"


def _comparison(search: Search) -> Iterator[str]:
    if search.comparison is None:
        return
    test = search.comparison
    metric, rows = escape(test.metric), f"on {count_text(test.num_rows, 'test row')}"
    if test.same:
        content = (
            "<p>On the validation rows, no trial was better than the untuned model, which has "
            f"{metric} <b>{test.best:.4f}</b> {rows}.</p>"
        )
    else:
        content = (
            f"<p>The best model has {metric} <b>{test.best:.4f}</b> and the untuned model "
            f"<b>{test.untuned:.4f}</b> {rows}, which were not used to choose the model.</p>"
            f"<p>{_verdict(test)}</p>{_interval(test)}"
        )
    yield section("Comparison with the untuned model", content)


def _verdict(test: Comparison) -> str:
    difference = (
        f"a difference of {test.best - test.untuned:+.4f} "
        f"(95 % bootstrap interval {test.low:+.4f} to {test.high:+.4f})"
    )
    if test.low <= 0 <= test.high:
        return (
            f"This is {difference}. The interval contains 0, so the difference is <b>within the "
            "noise</b> and can have the opposite sign on other test rows."
        )
    word, css_class = ("better", "good") if test.best > test.untuned else ("worse", "flag")
    return (
        f"Tuning made the model <b class='{css_class}'>{word}</b>, with {difference}; the interval "
        "excludes 0."
    )


def _interval(test: Comparison) -> str:
    """Return the interval as a bar, with a mark at 0."""
    difference = test.best - test.untuned
    ends = (0.0, test.low, test.high, difference)
    low, span = min(ends), (max(ends) - min(ends)) or 1.0
    zero, start, end, center = (f"{4 + 92 * (value - low) / span:.2f}%" for value in ends)
    return (
        "<div class='interval'><svg role='img' aria-label='Interval of the difference'>"
        f"<line class='zero' x1='{zero}' x2='{zero}' y1='2' y2='30'/>"
        f"<line class='bar' x1='{start}' x2='{end}' y1='16' y2='16'/>"
        f"<circle cx='{center}' cy='16' r='6'/>"
        f"<text x='{zero}' y='46' text-anchor='middle'>0</text></svg></div>"
    )


def _leaderboard(search: Search) -> str:
    ranked = search.scored()
    settings = searched_settings(search.trials)
    metrics = [escape(metric) for metric in search.objectives]
    names = [f"<span title='{escape(s.path)}'>{escape(s.name)}</span>" for s in settings]
    head = ["", "trial", "state", *metrics, "best epoch", "seconds", *names]
    rows = [
        [
            str(rank),
            escape(trial.name),
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
    notes = ", ".join(
        f"{count_text(count, 'trial')} {which}" for which, count in hidden.items() if count
    )
    note = f"<p class='muted small note'>Not shown: {notes}.</p>" if notes else ""
    return section("Leaderboard", table(head, rows, "small leaders") + note if rows else NO_SCORE)


def _value(trial: TrialRow, path: str) -> str:
    if path not in trial.values:
        return NONE
    text = value_text(trial.values[path])
    if len(text) <= _VALUE_LETTERS:
        return escape(text)
    return f"<span title='{escape(text)}'>{escape(text[: _VALUE_LETTERS - 1])}…</span>"


def _failures(search: Search) -> Iterator[str]:
    failed = [trial for trial in search.trials if trial.state == "failed"]
    rows = []
    for trial in failed[:_MAX_FAILURES]:
        lines = (trial.error or "").strip().splitlines() or ["no error was recorded"]
        rows.append([escape(trial.name), f"{trial.epochs:,}", escape(lines[0][:_ERROR_LETTERS])])
    if rows:
        failures = table(["trial", "epochs", "error"], rows, "small bad failures")
        yield section("Failed trials", failures + more_note(len(failed) - len(rows), "more trial"))


def _chart(heading: str, title: str, chart: str) -> str:
    return section(heading, f"<h3>{title}</h3>{chart}")


def _importance(search: Search) -> str:
    if not (fractions := importances(search)):
        return section("Importance", f"<p class='muted'>{_no_importance(search)}</p>")
    names = {setting.path: setting.name for setting in searched_settings(search.trials)}
    bars = "".join(
        f"<span class='name' title='{escape(path)}'>{escape(names[path])}</span>"
        f"{share_bar(fraction, f'{fraction:.1%}')}<span>{fraction:.1%}</span>"
        for path, fraction in fractions.items()
    )
    return section(
        "Importance",
        f"<p class='muted small'>Fraction of the variance of {escape(search.objectives[0])} that "
        "each setting explains, by fANOVA (Optuna) over "
        f"{count_text(len(search.scored()), 'trial')}; trials that stopped early count with the "
        "score they had reached. Interactions between settings are not included. With few trials, "
        "the fractions are rough estimates.</p>"
        f"<div class='bars'>{bars}</div>",
    )


def _no_importance(search: Search) -> str:
    scored = search.scored()
    if len(scored) < MIN_TRIALS:
        return (
            f"Importance needs at least {MIN_TRIALS} trials with a score; this search has "
            f"{len(scored)}."
        )
    if all(setting.single for setting in searched_settings(scored)):
        return "No setting has two values, so no setting explains a difference."
    return "All scores are equal, so no setting explains a difference."


def _cost(search: Search) -> str:
    totals = {part: sum(t.seconds.get(part, 0.0) for t in search.trials) for part in PARTS}
    # Time of trials outside the parts, so that the percentages add up to 100 %.
    other_s = sum(trial.wall_s for trial in search.trials) - sum(totals.values())
    totals |= {"other": max(other_s, 0.0), "search": search.idle_s()}
    total_s = sum(totals.values())
    if not total_s:
        return section("Cost", "<p class='muted'>No time has been spent yet.</p>")
    if totals["other"] <= total_s / 500:
        del totals["other"]
    legend = "".join(
        f"<span class='part-{part}'>{part} {_duration(seconds)} ({seconds / total_s:.1%})</span>"
        for part, seconds in totals.items()
    )
    timed = [trial for trial in search.ranked() if any(trial.seconds.values())]
    longest_s = max((sum(trial.seconds.values()) for trial in timed[:_MAX_BARS]), default=1.0)
    bars = "".join(_cost_row(trial, longest_s) for trial in timed[:_MAX_BARS])
    other = "; “other” is time that trials spent outside these parts" if "other" in totals else ""
    return section(
        "Cost",
        f"<h3>All trials: {_duration(total_s)} of {count_text(search.slots, 'slot')}</h3>"
        f"<div class='stack total'>{_bar(totals, total_s)}</div><p class='legend small'>{legend}"
        "</p><p class='muted small'>“start” is imports, build and first step; “data” is time "
        f"spent waiting for rows; “search” is time that slots spent outside trials{other}.</p>"
        f"<h3>Each trial, best first</h3><div class='bars costs'>{bars}</div>"
        + more_note(len(timed) - _MAX_BARS, "more trial"),
    )


def _cost_row(trial: TrialRow, longest_s: float) -> str:
    hover = ", ".join(f"{part} {_duration(seconds)}" for part, seconds in trial.seconds.items())
    name = escape(trial.name)
    return (
        f"<span class='name' title='{name}'>{name}</span>"
        f"<div class='stack' title='{hover}'>{_bar(trial.seconds, longest_s)}</div>"
        f"<span>{_duration(sum(trial.seconds.values()))}</span>"
    )


def _bar(parts: dict[str, float], total_s: float) -> str:
    return "".join(
        f"<i class='part-{part}' style='width:{100 * seconds / total_s:.2f}%' "
        f"title='{part} {_duration(seconds)}'></i>"
        for part, seconds in parts.items()
        if seconds
    )


def _trade_off(search: Search) -> Iterator[str]:
    if len(search.objectives) < 2:
        return
    front = search.pareto_front()
    rows = [
        [escape(trial.name), *(score_text(trial.score(metric)) for metric in search.objectives)]
        for trial in front[:_MAX_LEADERS]
    ]
    metrics = [escape(metric) for metric in search.objectives]
    front_table = f"<h3>Trials on the front</h3>{table(['trial', *metrics], rows, 'small')}"
    front_table += more_note(len(front) - len(rows), "more trial")
    yield (
        "<h2>Trade-off</h2><p class='muted small'>A trial is on the Pareto front if no other trial "
        "is at least as good in every objective and better in one.</p>"
        f"<div class='grid'><div class='card'><h3>{metrics[0]} against {metrics[1]}</h3>"
        f"{trial_charts.scatter(search)}</div><div class='card'>{front_table if rows else ''}</div>"
        "</div>"
    )


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 or not seconds else f"{seconds:.1f} s"
