"""Reads CSV files in any common dialect and encoding; cells stay text, since any may be a word."""

import codecs
import csv as python_csv
import io
import re
import sys
from collections import Counter
from itertools import islice
from typing import NamedTuple

import pyarrow as pa
from pyarrow import csv

from ray_jobs.config.errors import JobError
from ray_jobs.config.text import count_text
from ray_jobs.prepare.table_files.file_format import HEAD_BYTES, RawFile
from ray_jobs.prepare.table_files.text_encoding import detect_encoding, guess_encoding

_DELIMITERS = {"\t": "tabs", ";": "';'", "|": "'|'", ",": ""}
"""In order of preference, since commas are also decimal marks, and frequent in text."""
_LINE = re.compile(r"([^\r\n]*)(?:\r\n|\r|\n|$)")
_QUOTED = re.compile(r'(?<![^\r\n\t;|,])"[^"]*(?:""[^"]*)*(?:"|$)')
_SAMPLE_CHARACTERS = 200_000
_BLOCK_BYTES = 1 << 20
_MAX_BLOCK_BYTES = 1 << 30
_SHOWN_CHARACTERS = 60
_BLANK = ' \t;|,"\r\n'


class _Dialect(NamedTuple):
    """How to read a CSV file."""

    delimiter: str
    names: list[str]
    num_header_lines: int
    """Lines up to and including the names."""
    notes: tuple[str, ...]


def read_csv(file: RawFile) -> tuple[pa.Table, tuple[str, ...]]:
    """Return the rows of a CSV file, which may be none, and notes on its reading.

    Raises:
        JobError: If a row has too many or too few cells, a quote is not closed, or bytes are
            invalid in the encoding of the file. The message has the line.
    """
    head = file.head()
    encoding = detect_encoding(head)
    note = f"read as {encoding.upper()}" if encoding.startswith(("utf-16", "utf-32")) else ""
    try:
        table, notes = _read(file, head, encoding)
    except UnicodeDecodeError:
        encoding, note = guess_encoding(file, encoding)
        table, notes = _read(file, head, encoding)
    return table, (note, *notes) if note else notes


def _read(file: RawFile, head: bytes, encoding: str) -> tuple[pa.Table, tuple[str, ...]]:
    text = codecs.getincrementaldecoder(encoding)().decode(head).removeprefix("\ufeff")
    if not text.strip(_BLANK):
        raise ValueError("it is empty")
    dialect = _find_dialect(text, is_whole=len(head) < HEAD_BYTES)
    table = _parse(file, dialect, encoding)
    last = table.slice(max(table.num_rows - 1, 0)).to_pylist()
    if any("\n" in cell for cell in (last[0].values() if last else dialect.names)):
        _require_closed_quote(file, encoding)
    return table.rename_columns(dialect.names), dialect.notes


def _parse(file: RawFile, dialect: _Dialect, encoding: str) -> pa.Table:
    """Return the rows of a file; the columns are named by their positions."""
    ragged: list[csv.InvalidRow] = []

    def handle(row: csv.InvalidRow) -> str:
        if not row.text.strip(_BLANK):
            return "skip"
        ragged.append(row)
        return "error"

    names = [str(i) for i in range(len(dialect.names))]
    parse = csv.ParseOptions(
        delimiter=dialect.delimiter, newlines_in_values=True, invalid_row_handler=handle
    )
    convert = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    read = csv.ReadOptions(column_names=names, skip_rows=dialect.num_header_lines)
    read.block_size = _BLOCK_BYTES
    while True:
        try:
            with file.open() as stream:
                if encoding not in ("utf-8", "utf-8-sig"):
                    stream = pa.transcoding_input_stream(stream, encoding, "utf-8")
                return csv.read_csv(stream, read, parse, convert)
        except pa.ArrowInvalid as error:
            if ragged:
                raise _ragged_error(file, dialect, encoding, ragged[0]) from error
            if "UTF8" in str(error):
                raise UnicodeDecodeError("utf-8", b"", 0, 0, str(error)) from error
            if "Could not skip" in str(error):
                # The header ends the file, without a line break.
                return pa.table({name: pa.array([], pa.string()) for name in names})
            # A row may be longer than a block.
            if "straddl" not in str(error) or read.block_size >= _MAX_BLOCK_BYTES:
                raise
            read.block_size *= 8


def _ragged_error(file: RawFile, dialect: _Dialect, encoding: str, row: csv.InvalidRow) -> JobError:
    shown = row.text[:_SHOWN_CHARACTERS] + "…" * (len(row.text) > _SHOWN_CHARACTERS)
    quotes = " and close its quotes" if "\n" in row.text else ""
    advice = "put cells with delimiters in quotes"
    if re.search(r"[,;|\t] +\"", row.text):
        advice = "remove blanks before quotes"
    return JobError(
        f"the table {file.name} could not be read: {_find_line(file, dialect, encoding)} has "
        f"{count_text(row.actual_columns, 'cell')}, but the header has "
        f"{count_text(row.expected_columns, 'name')}: {shown!r}; correct this row{quotes}, "
        f"{advice}, or delete lines above the header"
    )


def _find_line(file: RawFile, dialect: _Dialect, encoding: str) -> str:
    """Return the line of the first ragged row, which Arrow does not know."""
    first = 1
    python_csv.field_size_limit(sys.maxsize)
    with file.open() as stream, io.TextIOWrapper(stream, encoding, newline="") as text:
        reader = python_csv.reader(text, delimiter=dialect.delimiter)
        for cells in reader:
            is_ragged = first > dialect.num_header_lines and len(cells) != len(dialect.names)
            if is_ragged and any(cell.strip(_BLANK) for cell in cells):
                break
            first = reader.line_num + 1
    return f"line {first:,}"


def _require_closed_quote(file: RawFile, encoding: str) -> None:
    """Check that the last row or header, which has a line break, does not end in an open quote."""
    tail = ""
    with file.open() as stream, io.TextIOWrapper(stream, encoding, newline="") as text:
        while block := text.read(_BLOCK_BYTES):
            tail = (tail + block)[-1024:]
    line = tail.rstrip().rpartition("\n")[2]
    if line and line.count('"') % 2 == 0:
        raise ValueError(
            f"a quote is not closed before its end, {line[-_SHOWN_CHARACTERS:]!r}; close it, or "
            "double the quotes inside cells"
        )


def _find_dialect(text: str, is_whole: bool) -> _Dialect:
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
    reader = python_csv.reader(io.StringIO(body, newline=""), delimiter=delimiter)
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
    return _Dialect(delimiter, names, num_lines, tuple(notes))


def _same_cells(line: str, other: str) -> bool:
    return any(line.count(d) == other.count(d) > 0 for d in _DELIMITERS)
