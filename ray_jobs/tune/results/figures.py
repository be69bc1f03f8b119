"""The page's charts of trials: history, parallel coordinates, learning curves, objectives.

Each enters a search and leaves HTML: a drawing, or a sentence where there is nothing to draw.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ray_jobs.pages.page_kit import number_text
from ray_jobs.train.telemetry.console import EPOCH
from ray_jobs.tune.results import charts
from ray_jobs.tune.results.charts import Scale, Tick, padded, text
from ray_jobs.tune.results.search_progress import (
    Setting,
    finite,
    front,
    ranking,
    score,
    settings,
    typical,
    value_text,
)
from ray_jobs.tune.results.search_state import Objective, Search, TrialRow

BEST_SHOWN = 5
NO_SCORE = "<p class='muted'>No trial has a score yet.</p>"
STATES = {"stopped": "stopped early"}
"""Words for the states that need more than their own."""

_SHADES = 6
_HEIGHT = 240
_TALL = 320
_LANE = 30
"""Pixels at the bottom of parallel coordinates for trials without a value."""
_PIXELS_AN_AXIS = 112
_PIXELS_A_TICK = 15
_LETTERS = 15
_CROWDED = 150
"""Dots from which on they are small."""
_ABSENT = "–"


def score_text(value: float | None) -> str:
    """Return a score with the same decimals as its neighbours in a table have."""
    if value is None:
        return _ABSENT
    return f"{value:.4f}" if 0.01 <= abs(value) < 100 else number_text(value)


def history(search: Search) -> str:
    """Return each trial's score in order of suggestion, and the best so far as a line."""
    first, trials = search.objectives[0], search.trials
    scores = [score(trial, first) for trial in trials]
    there = [value for value in scores if value is not None]
    if not there:
        return NO_SCORE
    low, high = typical(there, first.mode)
    x, y = Scale(0.5, len(trials) + 0.5), padded(low, high)
    sign, far = ("▴", 11) if first.mode == "min" else ("▾", _HEIGHT - 3)
    radius = 4 if len(trials) <= _CROWDED else 2.5
    dots: list[str] = []
    line: list[tuple[float, float] | None] = []
    best: float | None = None
    for i, (trial, value) in enumerate(zip(trials, scores, strict=True), 1):
        place = x.at(i)
        if value is None:
            if trial.state == "failed":
                dots.append(charts.letter(place, _HEIGHT - 3, "×", "lost", _hover(trial, search)))
            continue
        if low <= value <= high:
            kind = "dot-done" if trial.state == "finished" else "dot-open"
            dots.append(
                charts.circle(
                    place, _HEIGHT * (1 - y.at(value)), kind, _hover(trial, search), radius
                )
            )
        else:
            dots.append(charts.letter(place, far, sign, "out", _hover(trial, search)))
        if best is not None:
            line.append((place, _HEIGHT * (1 - y.at(best))))
        if best is None or first.rank(value) < first.rank(best):
            best = value
            line.append((place, _HEIGHT * (1 - y.at(best))))
    line.append((1.0, _HEIGHT * (1 - y.at(best or 0.0))))
    body = charts.stretched([charts.path(line, "best-line")], _HEIGHT) + "".join(dots)
    label = f"{first.metric} of each trial in order of suggestion"
    keys = [("mark-done", "finished"), ("mark-open", "other"), ("mark-best", "best so far")]
    if any("class='lost'" in dot for dot in dots):
        keys.append(("mark-lost", "failed without a score"))
    return (
        _legend(keys)
        + charts.frame(
            body, x, y, label=label, across="trial, in order", height=_HEIGHT, whole=True
        )
        + _outside([v for v in there if not low <= v <= high], first, "trial", f", marked {sign}")
    )


def parallel(search: Search) -> str:
    """Return a line for each trial across one axis per setting, and the score at the end."""
    trials = ranking(search)
    if not trials:
        return NO_SCORE
    first, found = search.objectives[0], settings(trials)
    if not found:
        return "<p class='muted'>No setting was searched.</p>"
    low, high = typical([score(trial, first) or 0.0 for trial in trials], first.mode)
    goodness = Scale(low, high, flipped=first.mode == "min")
    lacking = [any(s.path not in trial.values for trial in trials) for s in found] + [False]
    floor = _TALL - _LANE * any(lacking)
    axes = [_setting_axis(setting) for setting in found]
    axes.append(_score_axis(first, goodness))
    lines = []
    for rank in reversed(range(len(trials))):
        trial, points = trials[rank], []
        for i, axis in enumerate(axes):
            place = axis.at(trial)
            down = _TALL - 8 if place is None else floor * (1 - place)
            points.append((i / (len(axes) - 1), down))
        kind = f"trial q{_shade(goodness.at(score(trial, first) or 0.0))}"
        kind += " strong" * (rank < BEST_SHOWN) + " winner" * (rank == 0)
        lines.append(charts.path(points, kind, _hover(trial, search)))
    marks = [
        _drawn(axis, i / (len(axes) - 1), floor, lacking[i], last=i == len(axes) - 1)
        for i, axis in enumerate(axes)
    ]
    left = 22 + 7 * max(len(_cut(name)) for _, name in axes[0].ticks)
    left = max(left, 4 * len(_cut(axes[0].title)))
    scale = "".join(f"<i class='q{i}'></i>" for i in range(_SHADES))
    return (
        f"<p class='legend small muted'>poor <span class='ramp'>{scale}</span> good "
        "<span class='mark-winner'>best trial</span></p>"
        "<div class='scroll'><div class='plot lines' "
        f"style='min-width:{_PIXELS_AN_AXIS * len(axes)}px;padding-left:{left}px'>"
        "<svg role='img' aria-label='Settings and score of each trial' "
        f"style='height:{_TALL}px'>{charts.stretched(lines, _TALL)}{''.join(marks)}</svg></div>"
        f"</div>{_outside(_beyond(trials, first, low, high), first, 'trial', ', drawn at the end')}"
    )


def curves(search: Search) -> str:
    """Return the first objective's metric over the epochs, the best trials in colour."""
    first = search.objectives[0]
    ranked = ranking(search)
    ranked_names = {trial.name for trial in ranked}
    order = ranked + [trial for trial in search.trials if trial.name not in ranked_names]
    found = {trial.name: _curve(trial, first) for trial in order}
    values = [v for curve in found.values() for _, v in curve if v is not None]
    if not values:
        return f"<p class='muted'>No epoch with {text(first.metric)} yet.</p>"
    order = [trial for trial in order if any(v is not None for _, v in found[trial.name])]
    low, high = typical(values, first.mode)
    epochs = [epoch for trial in order for epoch, _ in found[trial.name]]
    x, y = Scale(1, max(2, *epochs)), padded(low, high)
    best = [trial for trial in order if trial.name in ranked_names][:BEST_SHOWN]
    paths, beyond = [], []
    for i in reversed(range(len(order))):
        trial = order[i]
        curve = found[trial.name]
        beyond += [[v for _, v in curve if v is not None and not low <= v <= high]]
        points = [
            None if v is None else (x.at(epoch), _HEIGHT * (1 - y.at(v))) for epoch, v in curve
        ]
        kind = f"curve c{i + 1}" if i < len(best) else "faint"
        kind += " lone" * (len([point for point in points if point]) == 1)
        paths.append(charts.path(points, kind, _hover(trial, search)))
    keys = [
        (f"c{i} mark-line", f"{t.name} {score_text(score(t, first))}")
        for i, t in enumerate(best, 1)
    ]
    if len(order) > len(best):
        keys.append(("faint mark-line", "others"))
    return (
        _legend(keys)
        + charts.frame(
            charts.stretched(paths, _HEIGHT),
            x,
            y,
            label=f"{first.metric} of each trial over its epochs",
            across="epoch",
            height=_HEIGHT,
            whole=True,
        )
        + _outside([first_of for part in beyond for first_of in part[:1]], first, "curve")
    )


def scatter(search: Search) -> str:
    """Return the first objective against the second, with the Pareto front marked."""
    first, second = search.objectives[:2]
    there = [t for t in search.trials if score(t, first) is not None]
    there = [t for t in there if score(t, second) is not None]
    if not there:
        return "<p class='muted'>No trial has both scores yet.</p>"
    best = front(search)
    names = {trial.name for trial in best}
    places = [(score(t, second) or 0.0, score(t, first) or 0.0) for t in there]
    # The front is always within, however far a trial of it is from the rest in one objective.
    of_front = [place for t, place in zip(there, places, strict=True) if t.name in names]
    x = _range([p[0] for p in places], [p[0] for p in of_front], second)
    y = _range([p[1] for p in places], [p[1] for p in of_front], first)
    dots = {True: "", False: ""}
    outside = 0
    for trial, (across, up) in zip(there, places, strict=True):
        if not (x.low <= across <= x.high and y.low <= up <= y.high):
            outside += 1
            continue
        kind = "dot-front" if trial.name in names else "dot-open"
        dots[trial.name in names] += charts.circle(
            x.at(across), _HEIGHT * (1 - y.at(up)), kind, _hover(trial, search)
        )
    steps: list[tuple[float, float] | None] = []
    if len(search.objectives) == 2:
        # By the second objective from its best: the first one only gets better.
        rising = sorted(of_front, key=lambda place: second.rank(place[0]))
        for across, up in rising:
            if steps and steps[-1]:
                steps.append((x.at(across), steps[-1][1]))
            steps.append((x.at(across), _HEIGHT * (1 - y.at(up))))
    body = charts.stretched([charts.path(steps, "best-line")] if len(steps) > 1 else [], _HEIGHT)
    note = f"<p class='muted small'>{_count(outside, 'trial')} outside.</p>" if outside else ""
    return (
        _legend([("mark-front", "Pareto front"), ("mark-open", "other trials")])
        + f"<p class='muted small'>{text(_wish(first))}, upward</p>"
        + charts.frame(
            body + dots[False] + dots[True],
            x,
            y,
            label=f"{first.metric} against {second.metric}",
            across=_wish(second),
            height=_HEIGHT,
        )
        + note
    )


@dataclass(frozen=True)
class _Axis:
    """An axis of parallel coordinates; places are from 0 at the bottom to 1."""

    title: str
    ticks: Sequence[Tick]
    at: Callable[[TrialRow], float | None]
    hover: str


def _setting_axis(setting: Setting) -> _Axis:
    if setting.words:
        last = max(len(setting.words) - 1, 1)
        rest = 0.5 if setting.single else 0.0
        places = {word: i / last + rest for i, word in enumerate(setting.words)}
        ticks = [(place, word) for word, place in places.items()]

        def at_word(trial: TrialRow) -> float | None:
            return (
                places[value_text(trial.values[setting.path])]
                if setting.path in trial.values
                else None
            )

        return _Axis(setting.name, ticks, at_word, setting.path)
    scale = Scale(setting.low, setting.high, setting.log)

    def at_number(trial: TrialRow) -> float | None:
        number = finite(trial.values.get(setting.path))
        return None if number is None else scale.at(number)

    if len(setting.numbers) <= 7:
        ticks = [(scale.at(number), number_text(number)) for number in setting.numbers]
    else:
        ticks = [(scale.at(v), name) for v, name in scale.ticks(6, setting.whole)]
    return _Axis(setting.name, ticks, at_number, setting.path + ", by powers" * setting.log)


def _score_axis(objective: Objective, goodness: Scale) -> _Axis:
    ticks = [(goodness.at(value), name) for value, name in goodness.ticks(6)]

    def at(trial: TrialRow) -> float | None:
        # A score far out is at the end, where its note says so.
        return min(max(goodness.at(score(trial, objective) or 0.0), 0.0), 1.0)

    return _Axis(objective.metric, ticks, at, _wish(objective))


def _drawn(axis: _Axis, place: float, floor: float, lacking: bool, *, last: bool) -> str:
    x = charts.percent(place)
    side = "dx='8' text-anchor='start'" if last else "dx='-8' text-anchor='end'"
    parts = [
        f"<line class='axis-line' x1='{x}' x2='{x}' y1='0' y2='{floor:g}'/>",
        f"<text class='name' x='{x}' y='-14' text-anchor='middle'>{text(_cut(axis.title))}"
        f"<title>{text(axis.hover)}</title></text>",
    ]
    ticks = [(floor * (1 - at), name) for at, name in axis.ticks]
    if lacking:
        ticks.append((_TALL - 8.0, _ABSENT))
        parts.append(
            f"<line class='axis-line gap' x1='{x}' x2='{x}' y1='{floor:g}' y2='{_TALL - 8}'/>"
        )
    taken: list[float] = []
    for down, name in ticks:
        if any(abs(down - other) < _PIXELS_A_TICK for other in taken):
            continue
        taken.append(down)
        parts.append(
            f"<circle class='tick' cx='{x}' cy='{down:.1f}' r='2.2'/>"
            f"<text class='value' x='{x}' y='{down + 4:.1f}' {side}>{text(_cut(name))}"
            f"<title>{text(name)}</title></text>"
        )
    return "".join(parts)


def _curve(trial: TrialRow, objective: Objective) -> list[tuple[int, float | None]]:
    """Return epochs, counted from 1, and the values that are numbers."""
    points = []
    for i, record in enumerate(trial.history):
        epoch = finite(record.get(EPOCH))
        points.append((i if epoch is None else int(epoch), finite(record.get(objective.metric))))
    return [(epoch + 1, value) for epoch, value in points]


def _range(values: Sequence[float], needed: Sequence[float], objective: Objective) -> Scale:
    low, high = typical(values, objective.mode)
    return padded(min(low, *needed), max(high, *needed))


def _beyond(
    trials: Sequence[TrialRow], objective: Objective, low: float, high: float
) -> list[float]:
    scores = (score(trial, objective) for trial in trials)
    return [value for value in scores if value is not None and not low <= value <= high]


def _outside(values: Sequence[float], objective: Objective, what: str, where: str = "") -> str:
    """Return a note on those that are too far out to be drawn where they are."""
    if not values:
        return ""
    worst = max(values, key=objective.rank)
    way = "up" if objective.mode == "min" else "down"
    return (
        f"<p class='muted small note'>{_count(len(values), what)} far out, with "
        f"{text(objective.metric)} {way} to {number_text(worst)}{where}.</p>"
    )


def _hover(trial: TrialRow, search: Search) -> str:
    scores = [f"{o.metric} {score_text(score(trial, o))}" for o in search.objectives]
    values = [f"{path} {_cut(value_text(value), 60)}" for path, value in trial.values.items()]
    return "\n".join([f"{trial.name}, {STATES.get(trial.state, trial.state)}", *scores, *values])


def _legend(keys: Sequence[tuple[str, str]]) -> str:
    marks = "".join(f"<span class='{kind}'>{text(name)}</span>" for kind, name in keys)
    return f"<p class='legend small'>{marks}</p>"


def _shade(goodness: float) -> int:
    return min(max(int(goodness * _SHADES), 0), _SHADES - 1)


def _wish(objective: Objective) -> str:
    return f"{objective.metric} ({'low' if objective.mode == 'min' else 'high'} is good)"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _cut(words: str, letters: int = _LETTERS) -> str:
    return words if len(words) <= letters else words[: letters - 1] + "…"
