"""Turns the rows of a request into inputs of the model, by the code of `prepare` and `predict`."""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from ray_jobs.config.errors import JobError
from ray_jobs.predict.row_sources import ERROR, decode_raw_rows, raw_row_rules
from ray_jobs.predict.trained_run import TrainedRun
from ray_jobs.prepare.cell_text import TEXT, column_text
from ray_jobs.prepare.row_validation import read_rows
from ray_jobs.prepare.shards.shard_writer import RowConverter
from ray_jobs.prepare.sources.source import ImageReader, ImageRefs, Source
from ray_jobs.serve.image_folders import ImageFolders
from ray_jobs.serve.request_schema import image_fields

Row = Mapping[str, Any]
"""A row of a request: numbers, booleans, texts or None by column, and images as bytes, as paths or
URIs in `ImageFolders`, or as `RequestReader.prepare_images` returns them."""

_KEY = "\0key"
_PATH = re.compile(r"(?<=: )\0\d+: |, \0\d+(?=: )")
"""Path of an image in an error, which means nothing to the client."""


class RequestError(Exception):
    """A request that cannot be answered as a whole; the text is for the client."""


@dataclass(frozen=True)
class _MemoryReader:
    """Reads images of requests by invented paths."""

    contents: Mapping[str, Any]

    def read(self, refs: ImageRefs) -> Iterator[Any]:
        for path in refs.path.to_pylist():
            yield self.contents[path]


class RequestReader:
    """Reads rows of requests for the model of a run.

    A row has the same inputs as in a table that `predict` reads: the rules come from the run's
    manifest. The cells of a column are read by type, as in a Parquet file, because JSON has types:
    a number is a number, whatever decimal separator the run's tables have.
    """

    def __init__(self, run: TrainedRun, folders: ImageFolders) -> None:
        self.run, self.folders, manifest = run, folders, run.decoder.manifest
        self.key_column = manifest.prepare.key_column
        # Keys of requests need not differ, so they are not read as those of a table.
        self.rules = raw_row_rules(run).model_copy(update={"key_column": _KEY})
        self.numeric_columns = manifest.numeric_columns
        words = tuple(vocabulary.column for vocabulary in manifest.vocabularies)
        self.text_columns = (*words, *manifest.text_columns)
        self.images = image_fields(run)

    def key(self, row: Row, position: int) -> str:
        """Return the name of a row in the answer: its key, or its position from 1."""
        cell = row.get(self.key_column)
        # The key column may contain the names of images, in whose place requests have images.
        if cell is None or self.key_column in self.images:
            return str(position + 1)
        return column_text(pa.chunked_array([_column([cell], is_text=True)]))[0].as_py() or ""

    def prepare_images(self, row: Row) -> Row:
        """Return a row with its images as they are stored, or the reasons why they cannot be used.

        Takes most of the time, and can run in several threads.
        """
        converted: dict[str, Any] = {}
        for name in self.images:
            content = row.get(name)
            if isinstance(content, str):
                content = self.folders.read(content) if content else None
            if isinstance(content, bytes):
                content = self._converter(()).convert_image(content)
            converted[name] = content
        return {**row, **converted}

    def is_independent(self, row: Row) -> bool:
        """Whether the cells of a row are read alike, whatever other rows there are.

        Otherwise its request must be read by itself, because the rule of a column of words without
        one in the manifest is found in the whole column.
        """
        return all(
            name in self.rules.text_rules or not isinstance(row.get(name), str)
            for name in self.text_columns
        )

    def read(self, rows: Sequence[Row]) -> pa.Table:
        """Return the rows in order, as a `Predictor` accepts them; unusable ones have an error.

        Raises:
            RequestError: If the cells of a column cannot be read at all.
        """
        kinds = [tuple(map(_kind, self._cells(row))) for row in rows]
        order = sorted(range(len(rows)), key=lambda row: kinds[row])
        parts: list[pa.Table] = []
        for _, group in groupby(order, key=lambda row: kinds[row]):
            parts += self._read_alike([rows[index] for index in group])
        table = pa.concat_tables(parts)
        return table.take(pa.array(np.argsort(order))) if order != sorted(order) else table

    def _cells(self, row: Row) -> list[Any]:
        return [row.get(name) for name in (*self.numeric_columns, *self.text_columns)]

    def _read_alike(self, rows: Sequence[Row]) -> list[pa.Table]:
        """Return rows whose cells have the same types."""
        names = [f"\0{index}" for index in range(len(rows))]
        columns = {
            name: _column([row.get(name) for row in rows], is_text=name in self.text_columns)
            for name in (*self.numeric_columns, *self.text_columns)
        }
        references, readers = {}, {}
        for position, image in enumerate(self.images):
            contents = {
                n: r[image] for n, r in zip(names, rows, strict=True) if r.get(image) is not None
            }
            path = pa.array([name if name in contents else None for name in names], TEXT)
            field = self.rules.image_columns[position] if self.rules.image_columns else ""
            references[field], readers[field] = ImageRefs(path), _MemoryReader(contents)
        table = pa.table({**columns, _KEY: pa.array(names, TEXT)})
        source = Source(table, images=references, readers=readers)
        try:
            read = read_rows(source, self.rules, self.numeric_columns, None, self.text_columns)
        except JobError as error:
            raise RequestError(without_advice(str(error))) from error
        reasons = [read.quarantined.get(row) for row in range(len(rows))]
        errors = [reason and ": ".join(reason) for reason in reasons]
        converter = self._converter(tuple(readers.values()))
        return list(map(_without_paths, decode_raw_rows(self.run, converter, read, errors)))

    def _converter(self, readers: tuple[ImageReader, ...]) -> RowConverter:
        return RowConverter(
            readers,
            self.numeric_columns,
            self.text_columns,
            self.rules,
            pixel_range=self.run.manifest.image.pixel_range,
        )


def decode_image(text: str, folders: ImageFolders) -> bytes | str:
    """Return the content of an image in base64 or a data URI, or a text that names an allowed one.

    Raises:
        RequestError: If it is none of these.
    """
    if text in folders:
        return text
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise RequestError("a data URI must contain base64: data:image/jpeg;base64,…")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            "an image must be base64 or a data URI; the server reads files only in --image_folders"
        ) from error


def without_advice(text: str) -> str:
    """Return an error without the advice to prepare the data with other settings."""
    return text.partition("; --prepare.")[0]


def _kind(cell: Any) -> str:
    """Return the type of a cell by which rows are read together."""
    if cell is None:
        return "null"
    # JSON has integers of any size.
    is_large = type(cell) is int and not -(2**63) <= cell < 2**63
    return "large int" if is_large else type(cell).__name__


def _column(cells: list[Any], is_text: bool) -> pa.Array:
    """Return cells of one type as a column; texts, and columns without any value, as text."""
    if cells[0] is None or isinstance(cells[0], str):
        # Lone surrogates cannot be stored.
        known = [cell and cell.encode("utf-8", "replace").decode() for cell in cells]
        return pa.array(known, TEXT)
    if _kind(cells[0]) != "large int":
        return pa.array(cells)
    return pa.array([str(cell) if is_text else float(str(cell)) for cell in cells])


def _without_paths(rows: pa.Table) -> pa.Table:
    """Remove the paths of images from the errors of rows."""
    errors = [error and _PATH.sub("", error) for error in rows[ERROR].to_pylist()]
    position = rows.column_names.index(ERROR)
    return rows.set_column(position, ERROR, pa.array(errors, rows[ERROR].type))
