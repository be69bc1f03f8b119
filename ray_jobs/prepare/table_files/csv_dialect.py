"""Finds delimiter and header of a CSV file in a sample of its text."""

import csv
import io
import re
from collections import Counter
from itertools import islice
from typing import NamedTuple

_DELIMITERS = {"\t": "tabs", ";": "';'", "|": "'|'", ",": ""}
"""In order of preference, since commas are also decimal marks, and frequent in text."""
_LINE = re.compile(r"([^\r\n]*)(?:\r\n|\r|\n|$)")
_QUOTED = re.compile(r'(?<![^\r\n\t;|,])"[^"]*(?:""[^"]*)*(?:"|$)')
_SAMPLE_CHARACTERS = 200_000


class Dialect(NamedTuple):
    """How to read a CSV file."""

    delimiter: str
    names: list[str]
    num_header_lines: int
    """Lines up to and including the names."""
    notes: tuple[str, ...]


def find_dialect(text: str, is_whole: bool) -> Dialect:
    """Return how to read a file that begins with a text.

    The delimiter splits most rows into as many cells as the header, which may lack one name: rows
    end in a delimiter, or begin with a row number, as R writes them. Before the header there may be
    Excel's `sep=;`, comments, and lines without cells.
    """
    start = num_lines = 0
    delimiters, notes = list(_DELIMITERS), []
    while start < len(text) and (line := _LINE.match(text, start)):
        content, following = line[1], _LINE.match(text, line.end())
        if not num_lines and (named := re.fullmatch(r'"?sep=(.)"?[,;]*', content, re.I)):
            delimiters = [named[1]]
        elif re.match(r"#\S", content) and following and _same_cells(content, following[1]):
            break
        elif content.startswith("#"):
            notes = ["skipped comments before the header"]
        elif content.strip(" \t;|,"):
            break
        start, num_lines = line.end(), num_lines + 1
    body = text[start:]
    sample = _QUOTED.sub('""', body[:_SAMPLE_CHARACTERS])
    rows = [row for row in re.split(r"[\r\n]+", sample) if row.strip()]
    if not is_whole or len(body) > _SAMPLE_CHARACTERS:
        # The last one may be incomplete.
        rows = rows[: max(len(rows) - 1, 1)]
    best, delimiter, has_extra_cell = (False, 0.0), ",", False
    for choice in delimiters:
        header, *counts = [row.count(choice) for row in rows] or [0]
        usual, frequency = Counter(counts or [header]).most_common(1)[0]
        fits = 0 < header <= usual <= header + 1
        score = fits, frequency / max(len(counts), 1) if usual else 0.0
        if score > best:
            best, delimiter, has_extra_cell = score, choice, fits and usual > header
    reader = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter)
    names = next(reader, [])
    num_lines += reader.line_num
    if has_extra_cell and all(row.endswith(delimiter) for row in rows[1:]):
        names.append("")
    # A single row, or other row names, may as well have too many cells.
    elif (
        has_extra_cell
        and len(rows) > 2
        and all(c[:1] == [str(i)] for i, c in enumerate(islice(filter(None, reader), 100), 1))
    ):
        names.insert(0, "")
        notes.append("the first column has no name, but row numbers")
    if cells := _DELIMITERS.get(delimiter, repr(delimiter)):
        notes.append(f"{cells} between cells")
    return Dialect(delimiter, names, num_lines, tuple(notes))


def _same_cells(line: str, other: str) -> bool:
    return any(line.count(d) == other.count(d) > 0 for d in _DELIMITERS)
