"""Draws SVG charts: scales, ticks, marks and a frame with a grid.

Horizontal positions are percentages and vertical positions are pixels, so a chart fills its card
without distorting text and dots. Only lines are in an inner drawing that stretches (`stretched`).
Labels are outside the drawing, in the padding of its frame.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ray_jobs.pages.page_kit import escape
from ray_jobs.train.telemetry.history_keys import sort_key

_PIXELS_PER_LETTER = 6.7
_FENCE = 3.0
"""Distance of Tukey's outer fence from the quartile, in interquartile ranges."""

Tick = tuple[float, str]
"""A value and its label."""


@dataclass(frozen=True)
class Scale:
    """Maps values to positions between 0 and 1."""

    low: float
    high: float
    log: bool = False
    flipped: bool = False
    """Whether the highest value is at 0."""

    def at(self, value: float) -> float:
        """Return the position of a value; positions off the scale are clipped to -0.2 and 1.2."""
        if self.log:
            value = min(max(value, self.low / 2), self.high * 2)
        low, high, value = (
            math.log10(v) if self.log else v for v in (self.low, self.high, value)
        )  # fmt: skip
        position = (value - low) / (high - low) if high > low else 0.5
        return min(max(1 - position if self.flipped else position, -0.2), 1.2)

    def ticks(self, limit: int = 5, whole: bool = False) -> list[Tick]:
        """Return at least one round value on the scale, with its label.

        Args:
            limit: Approximate number of ticks.
            whole: Whether to use integers only.
        """
        if self.high <= self.low:
            return [(self.low, _label(self.low, 0.0))]
        values = self._powers(limit) if self.log else []
        if len(values) < 2:
            return _round_ticks(self.low, self.high, limit, whole)
        return [(value, _label(value, 0.0)) for value in values]

    def _powers(self, limit: int) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for digits in ((1, 2, 5), (1, 3), (1,)):
            values = [d * 10.0**power for power in range(first, last + 1) for d in digits]
            values = [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
            if len(values) <= limit:
                return values
        return values[:: math.ceil(len(values) / limit)]


def padded(low: float, high: float) -> Scale:
    """Return a scale that extends a range by 5 % at both ends and is never empty."""
    margin = 0.05 * (high - low)
    # Treat a range that is too small for floating-point arithmetic as empty.
    if margin <= 1e-9 * max(abs(low), abs(high)):
        margin = 0.05 * abs(low) or 0.5
    return Scale(low - margin, high + margin)


def typical_range(metric: str, values: Iterable[float]) -> tuple[float, float]:
    """Return the range of the values of a metric, without outliers that are far worse.

    The range extends from the best value to Tukey's outer fence on the worse side, three
    interquartile ranges beyond the quartile. It needs at least one value.
    """
    ordered = sorted(values, key=lambda value: sort_key(metric, value))
    quartiles = [float(q) for q in np.quantile(ordered, [0.25, 0.75])]
    near, far = sorted(quartiles, key=lambda value: sort_key(metric, value))
    fence = sort_key(metric, far + _FENCE * (far - near)) if far != near else math.inf
    worst = [value for value in ordered if sort_key(metric, value) <= fence][-1]
    return min(ordered[0], worst), max(ordered[0], worst)


def stretched(paths: Iterable[str], height: float) -> str:
    """Return paths from `path` in a drawing that fills the width of the chart."""
    return (
        f"<svg viewBox='0 0 100 {height:g}' preserveAspectRatio='none' style='height:{height:g}px'>"
        f"{''.join(paths)}</svg>"
    )


def path(points: Sequence[tuple[float, float] | None], css_class: str, title: str = "") -> str:
    """Return a line through points, measured from the top left; None leaves a gap."""
    steps, pen = [], "M"
    for i, point in enumerate(points):
        if point is None:
            pen = "M"
            continue
        end = f"{100 * point[0]:.2f} {point[1]:.1f}"
        steps.append(pen + end)
        if pen == "M" and (i + 1 == len(points) or points[i + 1] is None):
            # A line of zero length is drawn as a dot, because line ends are round.
            steps.append(f"L{end}")
        pen = "L"
    return f"<path class='{css_class}' d='{''.join(steps)}'>{_hover(title)}</path>" if steps else ""


def circle(x: float, y: float, css_class: str, title: str, radius: float = 4) -> str:
    """Return a dot with a tooltip."""
    return (
        f"<circle class='{css_class}' cx='{percent(x)}' cy='{y:.1f}' r='{radius:g}'>"
        f"{_hover(title)}</circle>"
    )


def letter(x: float, y: float, text: str, css_class: str, title: str = "") -> str:
    """Return a short centred text with a tooltip."""
    return (
        f"<text class='{css_class}' x='{percent(x)}' y='{y:.1f}' text-anchor='middle'>"
        f"{escape(text)}{_hover(title)}</text>"
    )


def percent(x: float) -> str:
    """Return a horizontal position as the value of an attribute."""
    return f"{100 * x:.2f}%"


def frame(
    body: str, x: Scale, y: Scale, *, label: str, x_label: str, height: float, whole: bool = False
) -> str:
    """Return a chart with a grid and labelled ticks.

    Args:
        body: SVG to draw above the grid.
        x: Horizontal scale.
        y: Vertical scale.
        label: Description of the chart for screen readers.
        x_label: Label of the horizontal axis.
        height: Height of the drawing in pixels.
        whole: Whether the horizontal axis has integers only.
    """
    y_ticks, grid = y.ticks(5), []
    for value, name in y_ticks:
        down = height * (1 - y.at(value))
        grid.append(
            f"<line class='rule' x1='0' x2='100%' y1='{down:.1f}' y2='{down:.1f}'/>"
            f"<text x='-8' y='{down + 4:.1f}' text-anchor='end'>{name}</text>"
        )
    grid += [letter(x.at(value), height + 18, name, "tick") for value, name in x.ticks(6, whole)]
    grid.append(letter(0.5, height + 38, x_label, "across"))
    left = 14 + _PIXELS_PER_LETTER * max(len(name) for _, name in y_ticks)
    return (
        f"<div class='plot' style='padding-left:{left:.0f}px'><svg role='img' "
        f"aria-label='{escape(label)}' style='height:{height:g}px'>{''.join(grid)}{body}</svg>"
        "</div>"
    )


def _hover(title: str) -> str:
    return f"<title>{escape(title)}</title>" if title else ""


def _round_ticks(low: float, high: float, limit: int, whole: bool) -> list[Tick]:
    rough = (high - low) / max(limit, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    if whole:
        step = max(round(step), 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [i * step for i in range(first, last + 1)] or [(low + high) / 2]
    return [(value, _label(value, step)) for value in values]


def _label(value: float, step: float) -> str:
    """Return a number with as many decimals as the step between ticks needs."""
    if value == 0:
        return "0"
    if step >= 1e-7 and abs(value) < 1e5:
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        return f"{value:.{decimals}f}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return re.sub(r"e([+-])0*", lambda sign: "e" + sign[1].strip("+"), f"{value:.3g}")
