"""Formats numbers, counts and names for terminal output, error messages and pages."""

from collections.abc import Iterable

NONE = "–"
"""Shown in place of a missing number."""


def count_text(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 row` or `2,345 rows`, for `noun="row"`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def names_text(names: Iterable[str]) -> str:
    """Return names as a list such as `area, rooms`, or `none`; blank names are quoted."""
    return ", ".join(name if name.strip() else repr(name) for name in names) or "none"


def number_text(value: float | None, decimals: int | None = None) -> str:
    """Return a number as text; None as `–`.

    Without `decimals`, integers and numbers from 1,000 have no decimals, others four significant
    digits.
    """
    if value is None:
        return NONE
    if decimals is not None:
        return f"{value:.{decimals}f}"
    if abs(value) < 1e7 and (abs(value) >= 1000 or value == int(value)):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def percent_text(fraction: float | None) -> str:
    """Return a fraction as a percentage with one decimal."""
    return NONE if fraction is None else f"{fraction:.1%}"


def duration_text(seconds: float) -> str:
    """Return a duration in the unit that fits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 or not seconds else f"{seconds:.1f} s"
