"""Draws charts of trials: history, parallel coordinates, learning curves and a scatter plot.

Each function takes a search and returns HTML: a chart, or a sentence if there is nothing to draw.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ray_jobs.config.text import count_text
from ray_jobs.pages.page_kit import NONE, escape, number_text
from ray_jobs.train.telemetry.history_keys import EPOCH, MINIMIZED, sort_key
from ray_jobs.tune.results import svg_charts
from ray_jobs.tune.results.leaderboard import score_text
from ray_jobs.tune.results.search_state import Search, TrialRow, finite
from ray_jobs.tune.results.searched_settings import Setting, searched_settings, value_text
from ray_jobs.tune.results.svg_charts import Scale, Tick, padded, typical_range

NO_SCORE = "<p class='muted'>No trial has a score yet.</p>"
STATES = {"stopped": "stopped early"}
"""States that have another name on the page."""

_NUM_BEST = 5
_NUM_SHADES = 6
_HEIGHT = 240
_TALL = 320
_LANE = 30
"""Pixels at the bottom of parallel coordinates for trials without a value."""
_PIXELS_PER_AXIS = 112
_PIXELS_PER_TICK = 15
_MAX_LETTERS = 15
_CROWDED = 150
"""Above this number of trials, dots are small."""

Point = tuple[float, float]
"""A position: a fraction of the width from the left, and pixels from the top."""


def history(search: Search) -> str:
    """Return a chart of the scores in order of suggestion, with a line for the best so far."""
    first, trials = search.objectives[0], search.trials
    scores = [trial.score(first) for trial in trials]
    present = [score for score in scores if score is not None]
    if not present:
        return NO_SCORE
    low, high = typical_range(first, present)
    x, y = Scale(0.5, len(trials) + 0.5), padded(low, high)
    mark, edge = ("▴", 11) if first in MINIMIZED else ("▾", _HEIGHT - 3)
    radius = 4 if len(trials) <= _CROWDED else 2.5
    marks: list[str] = []
    line: list[Point | None] = []
    best, best_down = None, 0.0
    for i, (trial, score) in enumerate(zip(trials, scores, strict=True), 1):
        left, hover = x.at(i), _hover(trial, search)
        if score is None:
            if trial.state == "failed":
                marks.append(svg_charts.letter(left, _HEIGHT - 3, "×", "lost", hover))
            continue
        down = _down(y, score)
        if low <= score <= high:
            css_class = "dot-done" if trial.state == "finished" else "dot-open"
            marks.append(svg_charts.circle(left, down, css_class, hover, radius))
        else:
            marks.append(svg_charts.letter(left, edge, mark, "out", hover))
        if best is not None:
            line.append((left, best_down))
        if sort_key(first, score) < sort_key(first, best):
            best, best_down = score, down
            line.append((left, down))
    line.append((1.0, best_down))
    keys = [("mark-done", "finished"), ("mark-open", "other"), ("mark-best", "best so far")]
    if any("class='lost'" in drawn for drawn in marks):
        keys.append(("mark-lost", "failed without a score"))
    return (
        _legend(keys)
        + svg_charts.frame(
            svg_charts.stretched([svg_charts.path(line, "best-line")], _HEIGHT) + "".join(marks),
            x,
            y,
            label=f"{first} of each trial in order of suggestion",
            x_label="trial, in order of suggestion",
            height=_HEIGHT,
            whole=True,
        )
        + _outlier_note(_beyond(present, low, high), first, "trial", f", marked {mark}")
    )


def parallel_coordinates(search: Search) -> str:
    """Return a chart with an axis for each setting and for the score, and a line for each trial."""
    trials = search.scored()
    if not trials:
        return NO_SCORE
    first, settings = search.objectives[0], searched_settings(trials)
    if not settings:
        return "<p class='muted'>No setting was searched.</p>"
    scores = [trial.score(first) or 0.0 for trial in trials]
    low, high = typical_range(first, scores)
    goodness = Scale(low, high, flipped=first in MINIMIZED)
    gaps = [any(s.path not in trial.values for trial in trials) for s in settings] + [False]
    floor = _TALL - _LANE * any(gaps)
    axes = [*map(_setting_axis, settings), _score_axis(first, goodness)]
    last = len(axes) - 1
    lines = []
    for rank, (trial, score) in reversed(list(enumerate(zip(trials, scores, strict=True)))):
        positions = [axis.at(trial) for axis in axes]
        points = [
            (i / last, _TALL - 8 if position is None else floor * (1 - position))
            for i, position in enumerate(positions)
        ]
        shade = min(max(int(goodness.at(score) * _NUM_SHADES), 0), _NUM_SHADES - 1)
        css_class = f"trial q{shade}" + " strong" * (rank < _NUM_BEST) + " winner" * (rank == 0)
        lines.append(svg_charts.path(points, css_class, _hover(trial, search)))
    drawn = [
        _draw_axis(axis, i / last, floor, gaps[i], is_last=i == last) for i, axis in enumerate(axes)
    ]
    left = 22 + 7 * max(len(_shorten(name)) for _, name in axes[0].ticks)
    left = max(left, 4 * len(_shorten(axes[0].title)))
    ramp = "".join(f"<i class='q{i}'></i>" for i in range(_NUM_SHADES))
    return (
        f"<p class='legend small muted'>poor <span class='ramp'>{ramp}</span> good "
        "<span class='mark-winner'>best trial</span></p>"
        "<div class='scroll'><div class='plot lines' "
        f"style='min-width:{_PIXELS_PER_AXIS * len(axes)}px;padding-left:{left}px'>"
        "<svg role='img' aria-label='Settings and score of each trial' "
        f"style='height:{_TALL}px'>{svg_charts.stretched(lines, _TALL)}{''.join(drawn)}</svg></div>"
        "</div>"
        + _outlier_note(
            _beyond(scores, low, high), first, "trial", ", drawn at the end of the axis"
        )
    )


def learning_curves(search: Search) -> str:
    """Return a chart of the first objective over the epochs, with the best trials in color."""
    first = search.objectives[0]
    curves = [
        (trial, [(record[EPOCH] + 1, finite(record.get(first))) for record in trial.history])
        for trial in search.ranked()
    ]
    curves = [(trial, curve) for trial, curve in curves if any(v is not None for _, v in curve)]
    if not curves:
        return f"<p class='muted'>No epoch with {escape(first)} yet.</p>"
    low, high = typical_range(first, [v for _, curve in curves for _, v in curve if v is not None])
    epochs = [epoch for _, curve in curves for epoch, _ in curve]
    x, y = Scale(1, max(2, *epochs)), padded(low, high)
    best = [trial for trial, _ in curves if trial.score(first) is not None][:_NUM_BEST]
    paths, outliers = [], []
    for i, (trial, curve) in reversed(list(enumerate(curves))):
        outliers += _beyond((v for _, v in curve if v is not None), low, high)[:1]
        points = [None if v is None else (x.at(epoch), _down(y, v)) for epoch, v in curve]
        css_class = f"curve c{i + 1}" if i < len(best) else "faint"
        css_class += " lone" * (sum(point is not None for point in points) == 1)
        paths.append(svg_charts.path(points, css_class, _hover(trial, search)))
    keys = [
        (f"c{i} mark-line", f"{trial.name} {score_text(trial.score(first))}")
        for i, trial in enumerate(best, 1)
    ]
    if len(curves) > len(best):
        keys.append(("faint mark-line", "others"))
    return (
        _legend(keys)
        + svg_charts.frame(
            svg_charts.stretched(paths, _HEIGHT),
            x,
            y,
            label=f"{first} of each trial over its epochs",
            x_label="epoch",
            height=_HEIGHT,
            whole=True,
        )
        + _outlier_note(outliers, first, "curve")
    )


def scatter(search: Search) -> str:
    """Return a chart of the first objective against the second, with the Pareto front marked."""
    first, second = search.objectives[:2]
    points: dict[str, tuple[float, float]] = {}
    for trial in search.trials:
        across, up = trial.score(second), trial.score(first)
        if across is not None and up is not None:
            points[trial.name] = across, up
    if not points:
        return "<p class='muted'>No trial has both scores yet.</p>"
    front = {trial.name: points[trial.name] for trial in search.pareto_front()}
    # The scales always include the front, even where one of its scores is an outlier.
    x, y = (
        _range_with([p[i] for p in points.values()], [p[i] for p in front.values()], metric)
        for i, metric in enumerate((second, first))
    )
    dots, outside = {True: "", False: ""}, 0
    for trial in search.trials:
        if trial.name not in points:
            continue
        across, up = points[trial.name]
        if x.low <= across <= x.high and y.low <= up <= y.high:
            css_class = "dot-front" if trial.name in front else "dot-open"
            dots[trial.name in front] += svg_charts.circle(
                x.at(across), _down(y, up), css_class, _hover(trial, search)
            )
        else:
            outside += 1
    steps: list[Point] = []
    if len(search.objectives) == 2:
        # On the front, the first score improves while the second one gets worse.
        for across, up in sorted(front.values(), key=lambda p: sort_key(second, p[0])):
            if steps:
                steps.append((x.at(across), steps[-1][1]))
            steps.append((x.at(across), _down(y, up)))
    lines = [svg_charts.path(steps, "best-line")] if len(steps) > 1 else []
    trials = count_text(outside, "trial")
    note = f"<p class='muted small'>{trials} off the scale.</p>" if outside else ""
    return (
        _legend([("mark-front", "Pareto front"), ("mark-open", "other trials")])
        + f"<p class='muted small'>Vertical: {escape(_direction(first))}</p>"
        + svg_charts.frame(
            svg_charts.stretched(lines, _HEIGHT) + dots[False] + dots[True],
            x,
            y,
            label=f"{first} against {second}",
            x_label=_direction(second),
            height=_HEIGHT,
        )
        + note
    )


@dataclass(frozen=True)
class _Axis:
    """An axis of parallel coordinates, with positions from 0 at the bottom to 1 at the top."""

    title: str
    ticks: Sequence[Tick]
    at: Callable[[TrialRow], float | None]
    hover: str


def _setting_axis(setting: Setting) -> _Axis:
    if setting.words:
        last = max(len(setting.words) - 1, 1)
        offset = 0.5 if setting.single else 0.0
        positions = {word: i / last + offset for i, word in enumerate(setting.words)}

        def at_word(trial: TrialRow) -> float | None:
            if setting.path not in trial.values:
                return None
            return positions[value_text(trial.values[setting.path])]

        ticks = [(position, word) for word, position in positions.items()]
        return _Axis(setting.name, ticks, at_word, setting.path)
    scale = Scale(setting.low, setting.high, setting.log)

    def at_number(trial: TrialRow) -> float | None:
        number = finite(trial.values.get(setting.path))
        return None if number is None else scale.at(number)

    if len(setting.numbers) <= 7:
        ticks = [(scale.at(number), number_text(number)) for number in setting.numbers]
    else:
        ticks = [(scale.at(v), name) for v, name in scale.ticks(6, setting.whole)]
    return _Axis(setting.name, ticks, at_number, setting.path + ", logarithmic" * setting.log)


def _score_axis(metric: str, goodness: Scale) -> _Axis:
    ticks = [(goodness.at(value), name) for value, name in goodness.ticks(6)]

    def at(trial: TrialRow) -> float | None:
        # Outliers are drawn at the end, and a note reports them.
        return min(max(goodness.at(trial.score(metric) or 0.0), 0.0), 1.0)

    return _Axis(metric, ticks, at, _direction(metric))


def _draw_axis(axis: _Axis, position: float, floor: float, has_gap: bool, *, is_last: bool) -> str:
    x = svg_charts.percent(position)
    side = "dx='8' text-anchor='start'" if is_last else "dx='-8' text-anchor='end'"
    parts = [
        f"<line class='axis-line' x1='{x}' x2='{x}' y1='0' y2='{floor:g}'/>",
        f"<text class='name' x='{x}' y='-14' text-anchor='middle'>{escape(_shorten(axis.title))}"
        f"<title>{escape(axis.hover)}</title></text>",
    ]
    ticks = [(floor * (1 - at), name) for at, name in axis.ticks]
    if has_gap:
        ticks.append((_TALL - 8.0, NONE))
        parts.append(
            f"<line class='axis-line gap' x1='{x}' x2='{x}' y1='{floor:g}' y2='{_TALL - 8}'/>"
        )
    taken: list[float] = []
    for down, name in ticks:
        if any(abs(down - other) < _PIXELS_PER_TICK for other in taken):
            continue
        taken.append(down)
        parts.append(
            f"<circle class='tick' cx='{x}' cy='{down:.1f}' r='2.2'/>"
            f"<text class='value' x='{x}' y='{down + 4:.1f}' {side}>{escape(_shorten(name))}"
            f"<title>{escape(name)}</title></text>"
        )
    return "".join(parts)


def _down(scale: Scale, value: float) -> float:
    return _HEIGHT * (1 - scale.at(value))


def _range_with(values: Sequence[float], needed: Sequence[float], metric: str) -> Scale:
    low, high = typical_range(metric, values)
    return padded(min(low, *needed), max(high, *needed))


def _beyond(values: Iterable[float], low: float, high: float) -> list[float]:
    return [value for value in values if not low <= value <= high]


def _outlier_note(values: Sequence[float], metric: str, what: str, where: str = "") -> str:
    """Return a note on outliers, which are not drawn at their true positions."""
    if not values:
        return ""
    worst = max(values, key=lambda value: sort_key(metric, value))
    direction = "up" if metric in MINIMIZED else "down"
    return (
        f"<p class='muted small note'>{count_text(len(values), what)} off the scale, with "
        f"{escape(metric)} {direction} to {number_text(worst)}{where}.</p>"
    )


def _hover(trial: TrialRow, search: Search) -> str:
    scores = [f"{name} {score_text(trial.score(name))}" for name in search.objectives]
    values = [f"{path} {_shorten(value_text(value), 60)}" for path, value in trial.values.items()]
    return "\n".join([f"{trial.name}, {STATES.get(trial.state, trial.state)}", *scores, *values])


def _legend(keys: Sequence[tuple[str, str]]) -> str:
    marks = "".join(f"<span class='{css_class}'>{escape(name)}</span>" for css_class, name in keys)
    return f"<p class='legend small'>{marks}</p>"


def _direction(metric: str) -> str:
    return f"{metric} ({'lower' if metric in MINIMIZED else 'higher'} is better)"


def _shorten(text: str, limit: int = _MAX_LETTERS) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
