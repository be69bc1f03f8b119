"""Formats counts and names for terminal output, error messages and pages."""

from collections.abc import Iterable


def count_text(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 row` or `2,345 rows`, for `noun="row"`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def names_text(names: Iterable[str]) -> str:
    """Return names as a list such as `area, rooms`, or `none`; blank names are quoted."""
    return ", ".join(name if name.strip() else repr(name) for name in names) or "none"
