"""What the HTML pages share."""

NONE = "–"
"""Stands for a missing number."""


def number_text(value: float | None, decimals: int | None = None) -> str:
    """Return a number as people read it: four significant digits, or so many decimals."""
    if value is None:
        return NONE
    if decimals is not None:
        return f"{value:.{decimals}f}"
    if value == int(value) and abs(value) < 1e7:
        return f"{value:,.0f}"
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.4g}"
