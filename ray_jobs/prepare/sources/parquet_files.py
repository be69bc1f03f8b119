"""Parquet files with images in a column → a `Source`.

Enters: files whose rows hold an image's bytes (or Hugging Face's struct of bytes and path) and,
unless there is a table, the numbers.  Leaves: file and row of each image; pixels are not read.

Imports neither Ray nor TensorFlow.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm_model.nearest_match import did_you_mean
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import PrepareSpec
from ray_jobs.data.images import BadImage
from ray_jobs.prepare.number_parsing import texts
from ray_jobs.prepare.sources.containers import (
    Index,
    file_of_each,
    find_files,
    in_threads,
    join,
    read_user_table,
    require_key_column,
    stack,
)
from ray_jobs.prepare.sources.refs import ImageReader, ImageRefs, Source
from ray_jobs.storage.folder import Folder

DEFAULT_COLUMN = "image"
_ROWS_AT_ONCE = 16
_BUFFER_BYTES = {True: 1 << 20, False: 8 << 20}
"""By whether the files are local: read at once of each column, in place of whole column chunks."""


def open_source(spec: PrepareSpec, categorical: Sequence[str], labelled: bool) -> Source:
    """Return the rows of the Parquet files that `prepare.images` names.

    The image is in `prepare.image_column`, by default `image`, or several are in
    `prepare.image_columns`. All columns but those of bytes, lists and structs are the table, or
    with `prepare.table` only the key, by which both are joined.

    Raises:
        JobError: if a file is missing or damaged, or lacks an image column or the key.
    """
    folder, names = find_files(spec.images, is_parquet, "Parquet files")
    table_path = Folder(spec.table).path if spec.table else None
    names = [name for name in names if folder.locate(name) != table_path]
    if not names:
        raise JobError(f"prepare.images={spec.images!r}: the only Parquet file is prepare.table")
    columns = {
        name: name or spec.image_column or DEFAULT_COLUMN for name in spec.image_columns or ("",)
    }
    tables = in_threads(partial(_read_columns, folder, columns, spec), names)
    paths = file_of_each(names, map(len, tables))
    refs = ImageRefs(paths, np.concatenate([np.arange(len(t), dtype=np.int64) for t in tables]))
    readers: dict[str, ImageReader] = {
        name: ParquetReader(folder, column) for name, column in columns.items()
    }
    own = stack(tables)
    if not spec.table:
        return Source(own, dict.fromkeys(columns, refs), readers)
    table = read_user_table(spec)
    index = Index(texts(own.column(spec.key_column)), refs)
    images, unmatched = join(table, spec, dict.fromkeys(columns, index))
    # All images of a row stand in one row of the files, and are reported once.
    return Source(table, images, readers, tuple(dict.fromkeys(unmatched)))


def is_parquet(name: str) -> bool:
    """Whether a file's name is that of a Parquet file."""
    return name.lower().endswith((".parquet", ".parq", ".pq"))


@dataclass
class ParquetReader:
    """Reads images by file and row, a few rows at a time: a file once where rows only ascend."""

    folder: Folder
    column: str
    in_containers: bool = True

    def read(self, refs: ImageRefs) -> Iterator[bytes | BadImage]:
        """Yield the content of each image, in order, or why there is none."""
        for path, rows in _runs(refs):
            if path is None:
                yield BadImage("missing_image", "there is no image of this key")
                continue
            given = 0
            try:
                for image in self._read_run(path, rows):
                    yield image
                    given += 1
            except FileNotFoundError:
                bad = BadImage("missing_image", f"no such file in {self.folder}")
                yield from [bad] * (len(rows) - given)
            except (OSError, pa.ArrowException) as error:
                bad = BadImage("unreadable_file", str(error))
                yield from [bad] * (len(rows) - given)

    def _read_run(self, path: str, rows: np.ndarray) -> Iterator[bytes | BadImage]:
        with (
            self.folder.filesystem.open_input_file(self.folder.locate(path)) as stream,
            pq.ParquetFile(
                stream, buffer_size=_BUFFER_BYTES[self.folder.is_local], pre_buffer=False
            ) as file,
        ):
            ends = np.cumsum([file.metadata.row_group(g).num_rows for g in range(_groups(file))])
            # Hugging Face's struct holds a path beside the bytes.
            kind = file.schema_arrow.field(self.column).type
            column = f"{self.column}.bytes" if pa.types.is_struct(kind) else self.column
            group_of = np.searchsorted(ends, rows, side="right")
            for group in np.unique(group_of):
                if group == len(ends):
                    raise pa.ArrowInvalid(f"it has no row {rows[-1]}; it has changed meanwhile")
                first = int(ends[group - 1]) if group else 0
                wanted = rows[group_of == group] - first
                given = 0
                try:
                    for image in _read_group(file, int(group), column, wanted):
                        yield image
                        given += 1
                # The other row groups may be whole.
                except (OSError, pa.ArrowException) as error:
                    detail = f"row group {group}: {error}"
                    yield from [BadImage("unreadable_file", detail)] * (len(wanted) - given)


def _read_group(
    file: pq.ParquetFile, group: int, column: str, wanted: np.ndarray
) -> Iterator[bytes | BadImage]:
    """Yield the images of some rows of a row group, which ascend."""
    place, first = 0, 0
    batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[column])
    for batch in batches:
        cells = batch.column(0)
        if pa.types.is_struct(cells.type):
            cells = cells.flatten()[0]
        while place < len(wanted) and wanted[place] < first + len(batch):
            content = cells[int(wanted[place]) - first].as_py()
            yield content or BadImage("missing_image", f"{column} is empty")
            place += 1
        if place == len(wanted):
            return
        first += len(batch)


def _read_columns(
    folder: Folder, columns: dict[str, str], spec: PrepareSpec, name: str
) -> pa.Table:
    """Return a file's columns but those of bytes, lists and structs; only the key for a join."""
    try:
        with (
            folder.filesystem.open_input_file(folder.locate(name)) as stream,
            pq.ParquetFile(stream, pre_buffer=not folder.is_local) as file,
        ):
            schema = file.schema_arrow
            _require_images(schema, columns.values(), f"{folder}/{name}")
            flat = [f.name for f in schema if not _is_bulky(f.type)]
            if spec.table:
                require_key_column(flat, spec, f"{folder}/{name}")
                flat = [spec.key_column]
            if duplicated := [n for n in flat if flat.count(n) > 1]:
                raise JobError(f"{folder}/{name} has more than one column {duplicated[0]!r}")
            return file.read(columns=flat)
    except (pa.ArrowException, OSError) as error:
        raise JobError(f"{folder}/{name} cannot be read as Parquet: {error}") from error


def _require_images(schema: pa.Schema, columns: Iterable[str], what: str) -> None:
    images = [field.name for field in schema if _holds_images(field.type)]
    for column in columns:
        if column not in images:
            there = f"(there are: {', '.join(images)})" if images else "(there is none)"
            problem = (
                f"has no column {column!r}{did_you_mean(column, images)}"
                if column not in schema.names
                else f"has in column {column!r} values of type {schema.field(column).type}"
            )
            raise JobError(
                f"{what} {problem}; prepare.image_column must name a column of images' bytes "
                f"{there}, or prepare.image_columns several"
            )


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        field = kind.get_field_index("bytes")
        return field >= 0 and _is_binary(kind.field(field).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )


def _is_bulky(kind: pa.DataType) -> bool:
    return pa.types.is_nested(kind) or _is_binary(kind)


def _groups(file: pq.ParquetFile) -> int:
    return file.metadata.num_row_groups


def _runs(refs: ImageRefs) -> Iterator[tuple[str | None, np.ndarray]]:
    """Yield file and rows of neighbouring images in one file whose rows do not descend."""
    if refs.start is None:
        raise ValueError("images of Parquet files are found by their rows")
    paths = refs.path.to_pylist()
    first = 0
    for row in range(1, len(paths) + 1):
        if (
            row == len(paths)
            or paths[row] is None
            or paths[row] != paths[first]
            or refs.start[row] < refs.start[row - 1]
        ):
            yield paths[first], refs.start[first:row]
            first = row
