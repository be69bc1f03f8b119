"""Words numbers for terminal output, error messages and pages."""

from collections.abc import Iterable


def count_text(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, such as `1 row` or `2,345 rows`.

    Args:
        number: The count.
        noun: In the singular.
        plural: Of the noun; by default with an added s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def names_text(names: Iterable[str]) -> str:
    """Return names as a list such as `area, rooms`, or `none`; blank names are in quotes."""
    return ", ".join(name if name.strip() else repr(name) for name in names) or "none"
