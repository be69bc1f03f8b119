"""Reads Parquet files with images in a column.

Input: files whose rows contain encoded images (or Hugging Face's structs of bytes and path) and,
unless `prepare.table` is set, the numbers. Output: the file and row of each image; image bytes are
not read.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm_model.nearest_match import did_you_mean
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.config.text import names_text
from ray_jobs.data.images import BadImage
from ray_jobs.prepare.cell_text import column_text
from ray_jobs.prepare.sources.find_key import add_key, describe_found
from ray_jobs.prepare.sources.key_join import ImageIndex, join_images, read_keyed_table
from ray_jobs.prepare.sources.source import ImageRefs, Source, repeat_paths
from ray_jobs.prepare.sources.source_files import find_files, map_in_threads
from ray_jobs.prepare.table import require_column
from ray_jobs.prepare.table_files.record_table import stack
from ray_jobs.storage.folder import Folder

DEFAULT_COLUMN = "image"
_BATCH_ROWS = 16
_BUFFER_BYTES = {True: 1 << 20, False: 8 << 20}
"""Buffer per column, keyed by whether the files are local; replaces reading whole column chunks."""


def open_source(spec: PrepareSpec, may_find: bool = True) -> Source:
    """Return the rows of the Parquet files in `prepare.images`.

    The image is in the column that `prepare.image_column` names, by default `image`; several images
    per row are in the columns that `prepare.image_columns` names. The table consists of all columns
    except bytes, lists and structs; one of them may be found as the key, if `may_find`. With
    `prepare.table`, only the key column is read from the files, and their rows and the table are
    joined by key.
    """
    folder, names, notes = find_files(spec.images, is_parquet, "Parquet files")
    table_path = Folder(spec.table).path if spec.table else None
    names = [name for name in names if folder.locate(name) != table_path]
    if not names:
        raise JobError(
            f"prepare.images={spec.images!r}: the only Parquet file is prepare.table; give the "
            "files with the images"
        )
    columns = {
        name: name or spec.image_column or DEFAULT_COLUMN for name in spec.image_columns or ("",)
    }
    tables = map_in_threads(partial(_read_columns, folder, columns, spec), names)
    num_rows = [table.num_rows for table in tables]
    rows = np.concatenate([np.arange(n, dtype=np.int64) for n in num_rows])
    refs = ImageRefs(repeat_paths(names, num_rows), rows)
    readers = {name: ParquetReader(folder, column) for name, column in columns.items()}
    own = stack(tables)
    if not spec.table:
        own, found = add_key(own, spec, refs, may_find)
        notes = (*notes, *describe_found(found))
        return Source(own, dict.fromkeys(columns, refs), readers, settings=found, notes=notes)
    table, table_notes, _ = read_keyed_table(spec)
    notes = (*table_notes, *notes)
    index = ImageIndex(column_text(own.column(spec.key_column)), refs)
    images, unmatched = join_images(table, spec, dict.fromkeys(columns, index))
    # All images of a row are in one row of the files, so report that row once.
    return Source(table, images, readers, tuple(dict.fromkeys(unmatched)), notes=notes)


def is_parquet(name: str) -> bool:
    """Return whether a file name is that of a Parquet file."""
    return name.lower().endswith((".parquet", ".parq", ".pq"))


@dataclass
class ParquetReader:
    """Reads images by file and row, a few at a time; reads a file once if its rows are in order."""

    folder: Folder
    column: str

    def read(self, refs: ImageRefs) -> Iterator[bytes | BadImage]:
        """Yield each image's content, or why it cannot be read, in order."""
        for path, rows in _runs(refs):
            if path is None:
                yield BadImage("missing_image", "the row has no image")
                continue
            num_read = 0
            try:
                for image in self._read_run(path, rows):
                    yield image
                    num_read += 1
                continue
            except FileNotFoundError:
                bad = BadImage("missing_image", f"no such file in {self.folder}")
            except (OSError, pa.ArrowException) as error:
                bad = BadImage("unreadable_file", str(error))
            yield from [bad] * (len(rows) - num_read)

    def _read_run(self, path: str, rows: np.ndarray) -> Iterator[bytes | BadImage]:
        with (
            self.folder.filesystem.open_input_file(self.folder.locate(path)) as stream,
            pq.ParquetFile(
                stream, buffer_size=_BUFFER_BYTES[self.folder.is_local], pre_buffer=False
            ) as file,
        ):
            metadata = file.metadata
            num_groups = metadata.num_row_groups
            ends = np.cumsum([metadata.row_group(g).num_rows for g in range(num_groups)])
            # Hugging Face's struct has a path next to the bytes.
            kind = file.schema_arrow.field(self.column).type
            column = f"{self.column}.bytes" if pa.types.is_struct(kind) else self.column
            group_of = np.searchsorted(ends, rows, side="right")
            for group in np.unique(group_of):
                if group == num_groups:
                    raise pa.ArrowInvalid(
                        f"row {rows[-1]} does not exist; the file was changed after it was indexed"
                    )
                first = int(ends[group - 1]) if group else 0
                wanted = rows[group_of == group] - first
                num_read = 0
                try:
                    for image in _read_group(file, int(group), column, wanted):
                        yield image
                        num_read += 1
                # Other row groups may be intact.
                except (OSError, pa.ArrowException) as error:
                    detail = f"row group {group}: {error}"
                    yield from [BadImage("unreadable_file", detail)] * (len(wanted) - num_read)


def _read_group(
    file: pq.ParquetFile, group: int, column: str, wanted: np.ndarray
) -> Iterator[bytes | BadImage]:
    """Yield the images of some rows of a row group; the rows ascend."""
    position, first = 0, 0
    for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column]):
        cells = batch.column(0)
        if pa.types.is_struct(cells.type):
            cells = cells.flatten()[0]
        while position < len(wanted) and wanted[position] < first + len(batch):
            content = cells[int(wanted[position]) - first].as_py()
            yield content or BadImage("missing_image", f"{column} is empty")
            position += 1
        if position == len(wanted):
            return
        first += len(batch)


def _read_columns(
    folder: Folder, columns: dict[str, str], spec: PrepareSpec, name: str
) -> pa.Table:
    """Return a file's columns except bytes, lists and structs; only the key for a join."""
    try:
        with (
            folder.filesystem.open_input_file(folder.locate(name)) as stream,
            pq.ParquetFile(stream, pre_buffer=not folder.is_local) as file,
        ):
            schema = file.schema_arrow
            _require_images(schema, columns.values(), f"{folder}/{name}")
            flat = [
                f.name for f in schema if not (pa.types.is_nested(f.type) or _is_binary(f.type))
            ]
            if spec.table:
                require_column(flat, spec.key_column, "prepare.key_column", f"{folder}/{name}")
                flat = [spec.key_column]
            if duplicates := [n for n in flat if flat.count(n) > 1]:
                raise JobError(f"{folder}/{name} has more than one column named {duplicates[0]!r}")
            return file.read(columns=flat)
    except (pa.ArrowException, OSError) as error:
        raise JobError(f"{folder}/{name} cannot be read as Parquet: {error}") from error


def _require_images(schema: pa.Schema, columns: Iterable[str], file: str) -> None:
    images = [field.name for field in schema if _holds_images(field.type)]
    for column in columns:
        if column not in images:
            problem = (
                f"has no column {column!r}{did_you_mean(column, images)}"
                if column not in schema.names
                else f"has values of type {schema.field(column).type} in column {column!r}"
            )
            raise JobError(
                f"{file} {problem}; prepare.image_column must name a column of image bytes "
                f"(columns of bytes: {names_text(images)}), or prepare.image_columns several"
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


def _runs(refs: ImageRefs) -> Iterator[tuple[str | None, np.ndarray]]:
    """Yield runs of images in one file with ascending or equal rows: the file and the rows."""
    if refs.start is None:
        raise ValueError("references to images in Parquet files need row numbers")
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
