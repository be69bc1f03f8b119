"""Builds the common parts of all HTML pages.

A page is a single file that loads no resources and runs no scripts. Callers pass text from the data
through `escape`; all other arguments are HTML.
"""

import html
import re
from collections.abc import Iterable, Sequence
from importlib import resources

from ray_jobs.config.text import count_text

NONE = "–"
"""Shown in place of a missing number."""

_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def document(title: str, parts: Iterable[str]) -> str:
    """Return a whole page.

    Args:
        title: Plain text.
        parts: HTML of the body, in order.
    """
    css = resources.files("ray_jobs.pages").joinpath("page.css").read_text("utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{css}</style></head>\n"
        "<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def escape(value: object) -> str:
    """Return a value as escaped text, with � for characters that XML forbids."""
    return html.escape(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def section(heading: str, content: str) -> str:
    """Return a heading with a card below it."""
    return f"<h2>{heading}</h2><div class='card'>{content}</div>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], css_class: str = "") -> str:
    """Return a table that scrolls sideways if the page is too narrow."""
    names = "".join(f"<th>{name}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<div class='scroll'><table class='{css_class}'><thead><tr>{names}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def share_bar(share: float, title: str = "") -> str:
    """Return a bar filled to a fraction between 0 and 1."""
    hover = f" title='{title}'" if title else ""
    return f"<div class='stack'{hover}><i style='width:{100 * share:.1f}%'></i></div>"


def more_note(number: int, noun: str) -> str:
    """Return a note on the entries that a list omits, or an empty string if there are none."""
    return f"<p class='muted small note'>And {count_text(number, noun)}.</p>" if number > 0 else ""


def number_text(value: float | None, decimals: int | None = None) -> str:
    """Return a number with the given decimals, or with four significant digits."""
    if value is None:
        return NONE
    if decimals is not None:
        return f"{value:.{decimals}f}"
    if abs(value) < 1e7 and (abs(value) >= 1000 or value == int(value)):
        return f"{value:,.0f}"
    return f"{value:.4g}"
