"""Draws charts of a search with Optuna and plotly.

Each function returns a figure, or None if there is nothing to draw. Outliers are drawn at the edge
of a chart, so one diverged trial does not flatten all others; their tooltips show the true values.
"""

import math
from collections.abc import Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

from ray_jobs.config.text import duration_text
from ray_jobs.train.telemetry.history_keys import EPOCH, MINIMIZED
from ray_jobs.tune.results.leaderboard import score_text
from ray_jobs.tune.results.optuna_study import make_study
from ray_jobs.tune.results.search_state import Search, TrialRow, finite, typical_range
from ray_jobs.tune.results.searched_settings import Setting, searched_settings, value_text

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from plotly.graph_objects import Figure

# plotly reads texts as HTML, but does not decode quotes.
_escape = partial(escape, quote=False)
STATES = {"stopped": "stopped early"}
"""States that have another name on the page."""

_NUM_BEST = 5
_NUM_SHADES = 6
_MAX_LETTERS = 60
_COST_COLORS = {
    "start": "c4", "data": "c2", "compute": "c1", "validation": "c3", "checkpoint": "c5",
    "other": "bar", "search": "rest",
}  # fmt: skip


def history(search: Search, study: "Study") -> "Figure | None":
    """Return the scores in order of suggestion, with a line for the best so far."""
    from optuna.visualization import plot_optimization_history

    if not search.scored():
        return None
    figure: Any = plot_optimization_history(study, target_name=_escape(search.objectives[0]))
    scores, best = figure.data[:2]
    trials = [search.trials[number] for number in scores.x]
    symbols = ["circle" if trial.state == "finished" else "circle-open" for trial in trials]
    scores.update(
        name="trial (filled: finished)",
        marker={"color": "var(--c1)", "size": 8, "symbol": symbols},
        **_tooltips(trials, search),
    )
    best.update(name="best so far", line={"color": "var(--c2)", "shape": "hv"}, hoverinfo="skip")
    figure.data = [best, scores]
    figure.update_xaxes(title="trial, in order of suggestion")
    return figure


def parallel_coordinates(search: Search, study: "Study") -> "Figure | None":
    """Return an axis for each setting and for the score, and a line for each trial."""
    from optuna.visualization import plot_parallel_coordinate

    first = search.objectives[0]
    if not any(trial.values for trial in search.scored()):
        return None
    figure: Any = plot_parallel_coordinate(study, target_name=_escape(first))
    # The last trace is a color bar, which the axis of the score makes redundant.
    figure.data = figure.data[:-1]
    # The first axis is the score, from 0 to 1.
    goodness = [1 - line.y[0] if first in MINIMIZED else line.y[0] for line in figure.data]
    for line, value in zip(figure.data, goodness, strict=True):
        line.line.color = f"var(--q{min(int(value * _NUM_SHADES), _NUM_SHADES - 1)})"
    best = figure.data[goodness.index(max(goodness))]
    best.update(line={"color": "var(--c2)", "width": 3}, opacity=1, name="best trial")
    best.showlegend = True
    figure.update_annotations(font_color="var(--muted)")
    return figure


def learning_curves(search: Search, study: "Study") -> "Figure | None":
    """Return the first objective over the epochs, with the best trials in color."""
    from optuna.visualization import plot_intermediate_values

    first = search.objectives[0]
    trials = [search.trials[t.number] for t in study.trials if t.intermediate_values]
    if not trials:
        return None
    figure: Any = plot_intermediate_values(study)
    names = {trial.name for trial in trials}
    best = [trial.name for trial in search.scored() if trial.name in names][:_NUM_BEST]
    shown = [*best, *(trial.name for trial in trials if trial.name not in best)][: len(best) + 1]
    for trial, curve in zip(trials, figure.data, strict=True):
        name, rank, line = "others", len(best), {"color": "var(--rest)", "width": 1.2}
        if trial.name in best:
            rank = best.index(trial.name)
            name = f"{_escape(trial.name)} {score_text(trial.score(first))}"
            line = {"color": f"var(--c{rank + 1})", "width": 2.2}
        curve.update(
            name=name,
            legendgroup=name,
            legendrank=rank,
            showlegend=trial.name in shown,
            line=line,
            marker_size=4,
            opacity=0.4 if name == "others" else 1,
            hovertemplate=f"{_tooltip(trial, search)}<br>epoch %{{x}}: %{{y:.4g}}<extra></extra>",
        )
    figure.update_xaxes(title="epoch")
    figure.update_yaxes(title=_escape(first))
    figure.update_layout(showlegend=True)
    return figure


def trade_off(search: Search) -> "Figure | None":
    """Return the first objective against the second, with the Pareto front marked."""
    from plotly.graph_objects import Figure

    first, second = search.objectives[:2]
    trials = [t for t in search.trials if None not in (t.score(first), t.score(second))]
    if not trials:
        return None
    x, y = (_clip([trial.score(m) for trial in trials], m) for m in (second, first))
    points = list(zip(trials, x, y, strict=True))
    front = {trial.name for trial in search.pareto_front()}
    figure: Any = Figure()
    for name, color, is_front in (("other trials", "c1", False), ("Pareto front", "c2", True)):
        shown = [point for point in points if (point[0].name in front) == is_front]
        figure.add_scatter(
            x=[x for _, x, _ in shown],
            y=[y for _, _, y in shown],
            mode="markers",
            name=name,
            marker={"color": f"var(--{color})", "size": 8},
            **_tooltips([trial for trial, _, _ in shown], search),
        )
    figure.update_xaxes(title=_direction(second))
    figure.update_yaxes(title=_direction(first))
    return figure


def bars(fractions: dict[str, float]) -> "Figure":
    """Return a bar with a percentage for each name, in descending order from the top."""
    from plotly.graph_objects import Bar, Figure

    names, values = list(fractions)[::-1], list(fractions.values())[::-1]
    texts = [f"{value:.1%}" for value in values]
    figure: Any = Figure(Bar(y=[*map(_escape, names)], x=values, text=texts, orientation="h"))
    figure.update_traces(marker_color="var(--c1)", hoverinfo="skip")
    figure.update_xaxes(tickformat=".0%")
    return figure


def costs(rows: dict[str, dict[str, float]]) -> "Figure":
    """Return a stacked bar for each row, with the seconds of each part."""
    from plotly.graph_objects import Figure

    names = list(rows)[::-1]
    figure: Any = Figure()
    for part in dict.fromkeys(part for parts in rows.values() for part in parts):
        seconds = [rows[name].get(part, 0.0) for name in names]
        figure.add_bar(
            y=[*map(_escape, names)],
            x=seconds,
            name=part,
            orientation="h",
            marker_color=f"var(--{_COST_COLORS[part]})",
            text=[duration_text(value) for value in seconds],
            textposition="none",
            hovertemplate=f"{part} %{{text}}<extra></extra>",
        )
    figure.update_layout(barmode="stack", legend_traceorder="normal", bargap=0.3)
    figure.update_xaxes(title="seconds")
    return figure


def interval(low: float, difference: float, high: float) -> "Figure":
    """Return a difference with its interval, and a line at 0."""
    from plotly.graph_objects import Figure

    error = {"array": [high - difference], "arrayminus": [difference - low], "symmetric": False}
    figure: Any = Figure()
    figure.add_scatter(
        x=[difference], y=[""], error_x={**error, "thickness": 4, "width": 0}, mode="markers",
        marker={"color": "var(--c1)", "size": 12}, hoverinfo="skip",
    )  # fmt: skip
    figure.add_vline(0, line={"color": "var(--muted)", "dash": "dot"})
    figure.update_yaxes(visible=False)
    return figure


def study_of(search: Search) -> "Study":
    """Return the search as an Optuna study with outliers clipped; trial numbers are indices."""
    from optuna.trial import TrialState, create_trial

    first = search.objectives[0]
    settings = {setting.path: setting for setting in searched_settings(search.trials)}
    scores = _clip([trial.score(first) for trial in search.trials], first)
    curves = [
        {record[EPOCH] + 1: finite(record.get(first)) for record in trial.history}
        for trial in search.trials
    ]
    points = iter(_clip([value for curve in curves for value in curve.values()], first))
    trials = []
    for trial, score, curve in zip(search.trials, scores, curves, strict=True):
        own = [(settings[path], value) for path, value in trial.values.items()]
        clipped = {epoch: next(points) for epoch in curve}
        has_curve = any(value is not None for value in clipped.values())
        gapped = {epoch: math.nan if v is None else v for epoch, v in clipped.items()}
        trials.append(
            create_trial(
                state=TrialState.PRUNED if score is None else TrialState.COMPLETE,
                value=score,
                params={_escape(s.name): _parameter(s, value) for s, value in own},
                distributions={_escape(s.name): _distribution(s) for s, _ in own},
                intermediate_values=gapped if has_curve else {},
            )
        )
    return make_study(trials, "minimize" if first in MINIMIZED else "maximize")


def _parameter(setting: Setting, value: object) -> float | str | None:
    return _escape(value_text(value)) if setting.words else finite(value)


def _distribution(setting: Setting) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if setting.words:
        return CategoricalDistribution([*map(_escape, setting.words)])
    return FloatDistribution(setting.low, setting.high, log=setting.log)


def _clip(values: Sequence[float | None], metric: str) -> list[float | None]:
    """Return the values of a metric, with outliers at the end of the typical range."""
    low, high = typical_range(metric, [value for value in values if value is not None])
    return [None if value is None else min(max(value, low), high) for value in values]


def _tooltips(trials: Sequence[TrialRow], search: Search) -> dict[str, Any]:
    """Return the arguments of a trace that show a trial for each of its points."""
    texts = [_tooltip(trial, search) for trial in trials]
    return {"text": texts, "hovertemplate": "%{text}<extra></extra>"}


def _tooltip(trial: TrialRow, search: Search) -> str:
    lines = [f"{trial.name}, {STATES.get(trial.state, trial.state)}"]
    lines += [f"{name} {score_text(trial.score(name))}" for name in search.objectives]
    lines += [f"{path} {value_text(value)}" for path, value in trial.values.items()]
    return "<br>".join(_escape(line[:_MAX_LETTERS]) for line in lines)


def _direction(metric: str) -> str:
    return _escape(f"{metric} ({'lower' if metric in MINIMIZED else 'higher'} is better)")
