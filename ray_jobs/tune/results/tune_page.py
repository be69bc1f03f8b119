"""A search → one HTML file that needs no network, while it runs and after.

Light or dark as the reader's device is, one column on a phone. Everything that comes from the data
is escaped, and the page may load nothing and run nothing. Its looks are those of the inspection
page, and what page.css adds.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import resources

from ray_jobs.tune.results import figures
from ray_jobs.tune.results.charts import text
from ray_jobs.tune.results.figures import NO_SCORE, STATES, score_text
from ray_jobs.tune.results.importance import LEAST_TRIALS, importances
from ray_jobs.tune.results.search_progress import (
    finite,
    front,
    ranking,
    score,
    search_s,
    settings,
    value_text,
    wall_s,
)
from ray_jobs.tune.results.search_state import PARTS, Comparison, Search, TrialRow

LEADERS_SHOWN = 25
BARS_SHOWN = 40

_FAILURES_SHOWN = 25
_ERROR_LETTERS = 300
_VALUE_LETTERS = 24
_NONE = "–"
_LOW_IS_GOOD = ("log_loss", "brier", "ece")
"""Metrics of `metrics.json`; of the others, high is good."""
_UNITS = {
    "trials": "trials",
    "hours": "hours",
    "cpu_hours": "CPU hours",
    "gpu_hours": "GPU hours",
}


def html(search: Search) -> str:
    """Return the page."""
    sections = [
        *_header(search),
        *_comparison(search),
        *_leaderboard(search),
        *_failures(search),
        *_charts(search),
        *_importance(search),
        *_curves(search),
        *_cost(search),
        *_front(search),
    ]
    css = "\n".join(
        resources.files(package).joinpath(name).read_text("utf-8")
        for package, name in (("ray_jobs.pages", "page.css"), ("ray_jobs.tune.results", "tune.css"))
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Search {text(search.name)}</title><style>\n{css}</style></head>\n"
        "<body><main>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


def _header(search: Search) -> Iterator[str]:
    yield f"<h1>{text(search.name)}</h1>"
    counts = Counter(trial.state for trial in search.trials)
    named = [f"{counts[state]:,} {word}" for state, word in _COUNTED.items()]
    named += [f"{number:,} {state}" for state, number in counts.items() if state not in _COUNTED]
    yield f"<p class='muted'>{_count(len(search.trials), 'trial')}: {', '.join(named)}.</p>"
    ranked = ranking(search)
    if not ranked:
        yield f"<div class='card best'>{NO_SCORE}</div>"
    else:
        best = ranked[0]
        scores = "".join(
            f"<div><b>{score_text(score(best, o))}</b><span class='muted small'>"
            f"{text(o.metric)}</span></div>"
            for o in search.objectives
        )
        epoch = "" if best.best_epoch is None else f", after epoch {best.best_epoch + 1}"
        yield (
            f"<div class='card best'><p class='muted small'>Best: trial {text(best.name)}{epoch}"
            f"</p><div class='scores'>{scores}</div></div>"
        )
    spent = [_spent(search, key) for key in _UNITS if key in search.spent or key in search.budget]
    if spent:
        yield f"<div class='tiles'>{''.join(spent)}</div>"


_COUNTED = {"finished": "finished", "stopped": "stopped early", "failed": "failed"}


def _spent(search: Search, key: str) -> str:
    """Return what was spent of one thing, with a bar where there is a limit."""
    used, limit = finite(search.spent.get(key)) or 0.0, finite(search.budget.get(key))
    of, bar = "", "<p class='muted small'>no limit</p>"
    if limit is not None:
        share = min(max(used / limit, 0.0), 1.0) if limit > 0 else 1.0
        of = f" of {_amount(limit)}"
        bar = f"<div class='stack'><i style='width:{100 * share:.1f}%'></i></div>"
    return f"<div class='card'><p><b>{_amount(used)}</b>{of} {_UNITS[key]}</p>{bar}</div>"


def _amount(number: float) -> str:
    return f"{number:,.0f}" if number == int(number) else f"{number:,.2f}"


def _comparison(search: Search) -> Iterator[str]:
    if search.comparison is None:
        return
    found = search.comparison
    yield "<h2>Against the untuned model</h2>"
    values = [found.best, found.untuned, found.low, found.high]
    if found.same:
        yield (
            "<p class='card'>On the validation rows no trial was better than the untuned model, "
            f"which has {text(found.metric)} <b>{found.best:.4f}</b> on "
            f"{found.num_rows:,} test rows.</p>"
        )
        return
    numbers = [number for number in map(finite, values) if number is not None]
    if len(numbers) < len(values):
        yield f"<p class='card'>{text(found.metric)} cannot be told of both models.</p>"
        return
    yield (
        f"<div class='card'><p>On {found.num_rows:,} test row{'s' * (found.num_rows != 1)}, which "
        f"had no part in the choice, the best model has {text(found.metric)} <b>{found.best:.4f}"
        f"</b> and the untuned one <b>{found.untuned:.4f}</b>.</p><p>{_verdict(found)}</p>"
        f"{_interval(found)}</div>"
    )


def _verdict(found: Comparison) -> str:
    gain = found.best - found.untuned
    if found.metric.rpartition("/")[2] in _LOW_IS_GOOD:
        gain = -gain
    interval = f"95 % bootstrap interval {found.low:+.4f} to {found.high:+.4f}"
    difference = f"a difference of {found.best - found.untuned:+.4f} ({interval})"
    if found.low <= 0 <= found.high:
        return (
            f"That is {difference}. The interval contains 0, so the difference is <b>within the "
            "noise</b>: other test rows may well turn it round."
        )
    if gain > 0:
        return f"Tuning made it <b class='good'>better</b>: {difference}, which leaves 0 out."
    return f"Tuning made it <b class='flag'>worse</b>: {difference}, which leaves 0 out."


def _interval(found: Comparison) -> str:
    """Return the interval as a bar beside the mark of no difference."""
    difference = found.best - found.untuned
    ends = (0.0, found.low, found.high, difference)
    low, span = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float) -> str:
        return f"{4 + 92 * (value - low) / span:.2f}%"

    return (
        "<div class='interval'><svg role='img' aria-label='Interval of the difference'>"
        f"<line class='zero' x1='{place(0)}' x2='{place(0)}' y1='2' y2='30'/>"
        f"<line class='bar' x1='{place(found.low)}' x2='{place(found.high)}' y1='16' y2='16'/>"
        f"<circle cx='{place(difference)}' cy='16' r='6'/>"
        f"<text x='{place(0)}' y='46' text-anchor='middle'>0</text></svg></div>"
    )


def _leaderboard(search: Search) -> Iterator[str]:
    yield "<h2>Leaderboard</h2>"
    ranked = ranking(search)
    if not ranked:
        yield NO_SCORE
        return
    found = settings(search.trials)
    metrics = [text(objective.metric) for objective in search.objectives]
    names = [f"<span title='{text(s.path)}'>{text(s.name)}</span>" for s in found]
    head = ["", "trial", "state", *metrics, "best epoch", "seconds", *names]
    rows = [
        [str(rank), *_leader(trial, search), *(_value(trial, s.path) for s in found)]
        for rank, trial in enumerate(ranked[:LEADERS_SHOWN], 1)
    ]
    table = _table(head, rows, "small leaders")
    more, lacking = len(ranked) - len(rows), len(search.trials) - len(ranked)
    notes = [f"{more:,} more with a score"] if more else []
    notes += [f"{lacking:,} without one"] if lacking else []
    note = f"<p class='muted small note'>And {', '.join(notes)}.</p>" if notes else ""
    yield f"<div class='card'>{table}{note}</div>"


def _leader(trial: TrialRow, search: Search) -> list[str]:
    state = STATES.get(trial.state, trial.state) + ", then in full" * bool(trial.scores_in_full)
    best = _NONE if trial.best_epoch is None else f"{trial.best_epoch + 1:,}"
    scores = [score_text(score(trial, objective)) for objective in search.objectives]
    return [
        text(trial.name),
        state,
        *scores,
        f"{best} of {trial.epochs:,}",
        f"{wall_s(trial):,.0f}",
    ]


def _value(trial: TrialRow, path: str) -> str:
    if path not in trial.values:
        return _NONE
    whole = value_text(trial.values[path])
    if len(whole) <= _VALUE_LETTERS:
        return text(whole)
    return f"<span title='{text(whole)}'>{text(whole[: _VALUE_LETTERS - 1])}…</span>"


def _failures(search: Search) -> Iterator[str]:
    failed = [trial for trial in search.trials if trial.state == "failed"]
    if not failed:
        return
    rows = []
    for trial in failed[:_FAILURES_SHOWN]:
        lines = (trial.error or "").strip().splitlines() or ["no error was recorded"]
        rows.append([text(trial.name), f"{trial.epochs:,}", text(lines[0][:_ERROR_LETTERS])])
    more = len(failed) - len(rows)
    note = f"<p class='muted small note'>And {more:,} more.</p>" if more else ""
    table = _table(["trial", "epochs", "error"], rows, "small bad failures")
    yield f"<h2>Failed</h2><div class='card'>{table}{note}</div>"


def _charts(search: Search) -> Iterator[str]:
    metric = text(search.objectives[0].metric)
    yield (
        f"<h2>History</h2><div class='card'><h3>{metric} in order of suggestion</h3>"
        f"{figures.history(search)}</div>"
    )
    yield (
        "<h2>Settings</h2><div class='card'><h3>Every trial's settings and score</h3>"
        f"{figures.parallel(search)}</div>"
    )


def _importance(search: Search) -> Iterator[str]:
    yield "<h2>What matters</h2>"
    shares = importances(search)
    if not shares:
        yield f"<p class='card muted'>{_no_importance(search)}</p>"
        return
    names = {setting.path: setting.name for setting in settings(search.trials)}
    rows = [
        f"<span class='name' title='{text(path)}'>{text(names[path])}</span>"
        f"<div class='stack' title='{share:.1%}'><i style='width:{100 * share:.1f}%'></i></div>"
        f"<span>{share:.1%}</span>"
        for path, share in shares.items()
    ]
    yield (
        "<div class='card'><p class='muted small'>Share of each setting alone in the spread of "
        f"{text(search.objectives[0].metric)}, by fANOVA (Optuna) over "
        f"{len(ranking(search)):,} trials; those stopped early count with what they had reached. "
        "What settings do only together is left out. With few trials this is a rough guess.</p>"
        f"<div class='bars'>{''.join(rows)}</div></div>"
    )


def _no_importance(search: Search) -> str:
    ranked = ranking(search)
    if len(ranked) < LEAST_TRIALS:
        return (
            f"Which setting matters can be told from {LEAST_TRIALS} trials with a score on; there "
            f"{'is' if len(ranked) == 1 else 'are'} {len(ranked)}."
        )
    if all(setting.single for setting in settings(ranked)):
        return "No setting had two values, so none explains a difference."
    return "The scores do not differ with the settings, so none of them explains a difference."


def _curves(search: Search) -> Iterator[str]:
    metric = text(search.objectives[0].metric)
    yield (
        f"<h2>Learning curves</h2><div class='card'><h3>{metric} over the epochs</h3>"
        f"{figures.curves(search)}</div>"
    )


def _cost(search: Search) -> Iterator[str]:
    yield "<h2>Cost</h2>"
    totals = {part: sum(_part_s(trial, part) for trial in search.trials) for part in PARTS}
    parts_s = sum(totals.values())
    # What a trial took beyond its parts; without it the shares would not be of all that was paid.
    totals["other"] = max(sum(map(wall_s, search.trials)) - parts_s, 0.0)
    totals["search"] = search_s(search)
    whole = sum(totals.values())
    if not whole:
        yield "<p class='muted'>No time was spent yet.</p>"
        return
    shown = {part: s for part, s in totals.items() if part in (*PARTS, "search") or s > whole / 500}
    legend = "".join(
        f"<span class='part-{part}'>{part} {_time(seconds)} ({seconds / whole:.1%})</span>"
        for part, seconds in shown.items()
    )
    ranked = ranking(search)
    names = {trial.name for trial in ranked}
    order = ranked + [trial for trial in search.trials if trial.name not in names]
    order = [trial for trial in order if any(_part_s(trial, part) for part in PARTS)]
    longest = max((sum(_part_s(t, p) for p in PARTS) for t in order[:BARS_SHOWN]), default=1.0)
    rows = [_cost_row(trial, longest) for trial in order[:BARS_SHOWN]]
    more = len(order) - len(rows)
    note = f"<p class='muted small note'>And {_count(more, 'more trial')}.</p>" if more else ""
    yield (
        f"<div class='card'><h3>All trials: {_time(whole)} of {_count(search.slots, 'slot')}</h3>"
        f"<div class='stack total'>{_bar(shown, whole)}</div><p class='legend small'>{legend}</p>"
        "<p class='muted small'>“start” is imports, build and first step, “data” waiting for rows, "
        "“search” a slot's time outside of every trial"
        + ("; “other” is a trial's time outside of its parts" if "other" in shown else "")
        + f".</p><h3>Each trial, the best first</h3><div class='bars costs'>{''.join(rows)}</div>"
        f"{note}</div>"
    )


def _cost_row(trial: TrialRow, longest: float) -> str:
    parts = {part: _part_s(trial, part) for part in PARTS}
    hover = ", ".join(f"{part} {_time(seconds)}" for part, seconds in parts.items())
    return (
        f"<span class='name' title='{text(trial.name)}'>{text(trial.name)}</span>"
        f"<div class='stack' title='{hover}'>{_bar(parts, longest)}</div>"
        f"<span>{_time(sum(parts.values()))}</span>"
    )


def _bar(seconds: dict[str, float], whole: float) -> str:
    shares = {part: f"width:{100 * s / whole:.2f}%" for part, s in seconds.items() if s}
    return "".join(
        f"<i class='part-{part}' style='{share}' title='{part} {_time(seconds[part])}'></i>"
        for part, share in shares.items()
    )


def _part_s(trial: TrialRow, part: str) -> float:
    return max(finite(trial.seconds.get(part)) or 0.0, 0.0)


def _front(search: Search) -> Iterator[str]:
    if len(search.objectives) < 2:
        return
    best = front(search)
    rows = [
        [text(trial.name), *(score_text(score(trial, o)) for o in search.objectives)]
        for trial in best[:LEADERS_SHOWN]
    ]
    more = len(best) - len(rows)
    note = f"<p class='muted small note'>And {more:,} more.</p>" if more else ""
    head = ["trial", *(text(objective.metric) for objective in search.objectives)]
    table = f"<h3>Trials of the front</h3>{_table(head, rows, 'small')}{note}" if rows else ""
    first, second = (text(objective.metric) for objective in search.objectives[:2])
    yield (
        "<h2>Trade-off</h2><p class='muted small'>On the Pareto front are the trials that no other "
        "one beats in one objective without being worse in another.</p>"
        f"<div class='grid'><div class='card'><h3>{first} against {second}</h3>"
        f"{figures.scatter(search)}</div><div class='card'>{table}</div></div>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    names = "".join(f"<th>{name}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return (
        f"<div class='scroll'><table class='{kind}'><thead><tr>{names}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 or not seconds else f"{seconds:.1f} s"
