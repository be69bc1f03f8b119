"""SVG for the page: scales, ticks, and a frame to draw in.

Across, places are percentages, and down they are pixels: a chart fills its card without stretching
its texts and dots. Only lines lie in a drawing of their own, which stretches (`stretched`).
Labels stand outside of the drawing, in the padding of its frame.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

_PIXELS_A_LETTER = 6.7
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")

Tick = tuple[float, str]
"""A value and its label."""


@dataclass(frozen=True)
class Scale:
    """From values to places between 0 and 1."""

    low: float
    high: float
    log: bool = False
    flipped: bool = False
    """Whether the highest value is at 0."""

    def at(self, value: float) -> float:
        """Return the place of a value; one beyond the ends is a little beyond 0 or 1."""
        if self.log:
            value = min(max(value, self.low / 2), self.high * 2)
        low, high, value = (self._bent(v) for v in (self.low, self.high, value))
        place = (value - low) / (high - low) if high > low else 0.5
        return min(max(1 - place if self.flipped else place, -0.2), 1.2)

    def ticks(self, most: int = 5, whole: bool = False) -> list[Tick]:
        """Return round values within the scale with their labels, at least one.

        Args:
            most: ticks, about.
            whole: whether only integers count.
        """
        if self.high <= self.low:
            return [(self.low, _label(self.low, 0.0))]
        values = self._powers(most) if self.log else []
        if len(values) < 2:
            return _round_ticks(self.low, self.high, most, whole)
        return [(value, _label(value, 0.0)) for value in values]

    def _bent(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def _powers(self, most: int) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for digits in ((1, 2, 5), (1, 3), (1,)):
            values = [d * 10.0**power for power in range(first, last + 1) for d in digits]
            values = [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
            if len(values) <= most:
                return values
        return values[:: math.ceil(len(values) / most)]


def padded(low: float, high: float, share: float = 0.05) -> Scale:
    """Return a scale a little longer than a range, and not empty where the range is."""
    margin = share * (high - low)
    # A span that floats cannot divide is none.
    if margin <= 1e-9 * max(abs(low), abs(high)):
        margin = 0.05 * abs(low) or 0.5
    return Scale(low - margin, high + margin)


def text(value: object) -> str:
    """Return text from the data, escaped; what XML has no place for is shown as �."""
    return escape(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def percent(place: float) -> str:
    """Return a place across as an attribute's value."""
    return f"{100 * place:.2f}%"


def stretched(paths: Iterable[str], height: float) -> str:
    """Return paths, made by `path`, in a drawing that fills the chart's width."""
    return (
        f"<svg viewBox='0 0 100 {height:g}' preserveAspectRatio='none' style='height:{height:g}px'>"
        f"{''.join(paths)}</svg>"
    )


def path(points: Sequence[tuple[float, float] | None], kind: str, title: str = "") -> str:
    """Return a line through places across and pixels down; None is a gap in it."""
    steps, pen = [], "M"
    for i, point in enumerate(points):
        if point is None:
            pen = "M"
            continue
        here = f"{100 * point[0]:.2f} {point[1]:.1f}"
        steps.append(pen + here)
        alone = pen == "M" and (i + 1 == len(points) or points[i + 1] is None)
        # A line to where it is makes a dot, by its round ends.
        steps += [f"L{here}"] if alone else []
        pen = "L"
    hover = f"<title>{text(title)}</title>" if title else ""
    return f"<path class='{kind}' d='{''.join(steps)}'>{hover}</path>" if steps else ""


def circle(place: float, down: float, kind: str, title: str, radius: float = 4) -> str:
    """Return a dot with a text on hovering."""
    return (
        f"<circle class='{kind}' cx='{percent(place)}' cy='{down:.1f}' r='{radius:g}'>"
        f"<title>{text(title)}</title></circle>"
    )


def letter(place: float, down: float, sign: str, kind: str, title: str = "") -> str:
    """Return a short text centred on a place."""
    hover = f"<title>{text(title)}</title>" if title else ""
    return (
        f"<text class='{kind}' x='{percent(place)}' y='{down:.1f}' text-anchor='middle'>"
        f"{text(sign)}{hover}</text>"
    )


def frame(
    body: str,
    x: Scale,
    y: Scale,
    *,
    label: str,
    across: str,
    height: float,
    whole: bool = False,
) -> str:
    """Return a chart: grid, ticks with numbers, and what is drawn in it.

    Args:
        body: SVG to draw above the grid.
        x: scale across.
        y: scale up.
        label: what the chart shows, for those who hear it.
        across: what the scale across counts.
        height: of the drawing, in pixels.
        whole: whether the scale across has only integers.
    """
    rises, runs = y.ticks(5), x.ticks(6, whole)
    grid = []
    for value, name in rises:
        down = height * (1 - y.at(value))
        grid.append(
            f"<line class='rule' x1='0' x2='100%' y1='{down:.1f}' y2='{down:.1f}'/>"
            f"<text x='-8' y='{down + 4:.1f}' text-anchor='end'>{name}</text>"
        )
    for value, name in runs:
        grid.append(letter(x.at(value), height + 18, name, "tick"))
    grid.append(letter(0.5, height + 38, across, "across"))
    left = 14 + _PIXELS_A_LETTER * max(len(name) for _, name in rises)
    return (
        f"<div class='plot' style='padding-left:{left:.0f}px'><svg role='img' "
        f"aria-label='{text(label)}' style='height:{height:g}px'>{''.join(grid)}{body}</svg></div>"
    )


def _round_ticks(low: float, high: float, most: int, whole: bool) -> list[Tick]:
    rough = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    if whole:
        step = max(round(step), 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [i * step for i in range(first, last + 1)] or [(low + high) / 2]
    return [(value, _label(value, step)) for value in values]


def _label(value: float, step: float) -> str:
    """Return a tick's number with the decimals that its step needs."""
    if value == 0:
        return "0"
    if step >= 1e-7 and abs(value) < 1e5:
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        return f"{value:.{decimals}f}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return re.sub(r"e([+-])0*", lambda sign: "e" + sign[1].strip("+"), f"{value:.3g}")
