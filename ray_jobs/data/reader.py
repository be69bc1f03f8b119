"""Stored rows → the arrays of a batch: reads row groups, decodes images at the model's size.

Reads: the shards that a manifest lists.  Leaves: batches as `ray_jobs.data.batch` defines them.
Imports neither Ray nor TensorFlow.

    B rows of a batch   N images a row   H × W pixels   F numeric, C categorical columns

Where the shards hold features in place of images, `features` take the place of `image`.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.data.batch import (
    CATEGORY,
    FEATURES,
    IMAGE,
    IMAGE_MASK,
    INPUT_TYPES,
    KEY,
    LABEL,
    NUMERIC,
    WEIGHT,
)
from ray_jobs.data.images import decode_stored, resized
from ray_jobs.data.manifest import Manifest, Shard
from ray_jobs.data.sampler import RowRange
from ray_jobs.storage.folder import Folder

Batch = dict[str, np.ndarray]

ALIGNMENT = 64
"""Bytes at a multiple of which an array must begin for TensorFlow to take it as it is."""
_FOOTERS = 256


class ShardReader:
    """Reads row groups of a split's shards as Arrow tables, in any number of threads.

    Args:
        folder: prepared data.
        shards: of one split.
        columns: to read.
    """

    def __init__(self, folder: Folder, shards: Sequence[Shard], columns: Sequence[str]) -> None:
        self.folder, self.shards, self.columns = folder, shards, list(columns)
        self._footers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the footers behind, which no other process needs."""
        return ShardReader, (self.folder, self.shards, self.columns)

    def read_groups(self, shard: int, groups: Sequence[int]) -> list[pa.Table]:
        """Return some row groups of one shard."""
        path = self.folder.locate(self.shards[shard].path)
        with (
            self.folder.filesystem.open_input_file(path) as stream,
            pq.ParquetFile(stream, metadata=self._footers.get(shard)) as file,
        ):
            self._remember(shard, file.metadata)
            return [file.read_row_group(g, columns=self.columns, use_threads=False) for g in groups]

    def read(self, ranges: Sequence[RowRange]) -> "StoredRows":
        """Return the rows of all ranges, in their order; each row group is read once."""
        tables = {}
        for shard, groups in groups_of(ranges).items():
            for group, table in zip(groups, self.read_groups(shard, groups), strict=True):
                tables[shard, group] = table
        return StoredRows.of(ranges, tables)

    def _remember(self, shard: int, footer: Any) -> None:
        with self._lock:
            self._footers[shard] = footer
            if len(self._footers) > _FOOTERS:
                del self._footers[next(iter(self._footers))]


def groups_of(ranges: Sequence[RowRange]) -> dict[int, list[int]]:
    """Return the row groups that ranges lie in, by shard."""
    found: dict[int, set[int]] = {}
    for piece in ranges:
        found.setdefault(piece.shard, set()).add(piece.group)
    return {shard: sorted(groups) for shard, groups in sorted(found.items())}


class StoredRows:
    """Rows of several row groups, in order, none of them copied.

    They are not one Arrow table, since images may be encoded in some row groups and, from a cache,
    pixels in others.

    Args:
        tables: with the same columns.
    """

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        self.tables = tables
        self.starts = np.cumsum([0, *(table.num_rows for table in tables)])
        self.num_rows = int(self.starts[-1])
        self._small: pa.Table | None = None

    @classmethod
    def of(
        cls, ranges: Sequence[RowRange], tables: dict[tuple[int, int], pa.Table]
    ) -> "StoredRows":
        """Return the rows of ranges from the tables of their row groups."""
        return cls([tables[r.shard, r.group].slice(r.start, r.num_rows) for r in ranges])

    def take(self, columns: Sequence[str], rows: np.ndarray) -> pa.Table:
        """Return some columns of some rows; for what is small, since it is copied."""
        small = self._small
        if small is None or small.column_names != list(columns):
            small = self._small = pa.concat_tables([table.select(columns) for table in self.tables])
        return small.take(pa.array(rows))

    def cell(self, column: str, row: int) -> Any:
        """Return one cell as an Arrow scalar, which refers to its row group."""
        position = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.tables[position].column(column)[row - int(self.starts[position])]


class RowDecoder:
    """Turns stored rows into the arrays of a batch.

    Args:
        manifest: of the rows.
        with_image: whether the model takes images, or features of them.
        size: side in pixels at which it takes them; None for the stored size.
    """

    def __init__(self, manifest: Manifest, *, with_image: bool, size: int | None = None) -> None:
        info = manifest.image
        self.manifest = manifest
        self.image_columns = info.columns if with_image else ()
        self.stored_shape = (info.height, info.width, 3)
        self.pixel_shape = (size, size, 3) if size else self.stored_shape
        self.features_shape = info.features
        self.image_input = FEATURES if info.features else IMAGE
        """Which input of the model holds what is in the image columns."""
        self.several = with_image and bool(info.names)

    @property
    def columns(self) -> list[str]:
        """Columns of the shards that are needed."""
        categories = [vocabulary.column for vocabulary in self.manifest.vocabularies]
        return [KEY, *self.image_columns, *self.manifest.numeric_columns, *categories, LABEL]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row's images, or of their features."""
        shape = self.features_shape or self.pixel_shape
        return (len(self.image_columns), *shape) if self.several else shape

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's images, decoded, or of their features."""
        item_bytes = np.dtype(INPUT_TYPES[self.image_input]).itemsize
        return int(np.prod(self.row_shape)) * item_bytes if self.image_columns else 0

    def batch(self, stored: StoredRows, rows: np.ndarray) -> Batch:
        """Return the batch of some stored rows, pixels not yet filled in, weights 1."""
        names = [n for n in self.columns if n not in (KEY, *self.image_columns)]
        small = stored.take(names, rows)
        count = len(rows)
        numbers = [floats(small[name]) for name in self.manifest.numeric_columns]
        batch = {
            NUMERIC: np.stack(numbers, axis=1) if numbers else np.empty((count, 0), np.float32),
            LABEL: floats(small[LABEL])[:, None],
            WEIGHT: np.ones((count, 1), np.float32),
        }
        if self.manifest.vocabularies:
            codes = [v.codes(small[v.column].to_pylist()) for v in self.manifest.vocabularies]
            batch[CATEGORY] = np.stack(codes, axis=1)
        if self.image_columns:
            batch[self.image_input] = aligned(
                (count, *self.row_shape), INPUT_TYPES[self.image_input]
            )
        if self.several:
            batch[IMAGE_MASK] = np.ones((count, len(self.image_columns)), np.float32)
        return batch

    def fill(
        self,
        batch: Batch,
        stored: StoredRows,
        rows: np.ndarray,
        first: int = 0,
        on_error: Callable[[int, ValueError], None] | None = None,
    ) -> None:
        """Decode the images of some rows into a batch.

        Args:
            batch: from `batch`.
            stored: what the rows are of.
            rows: to decode.
            first: place in the batch of the first of them.
            on_error: takes the place of a row whose image cannot be used, and why; its pixels are
                zeros then.

        Raises:
            ValueError: without `on_error`, naming the row.
        """
        for place, row in enumerate(rows.tolist(), start=first):
            try:
                for n, column in enumerate(self.image_columns):
                    self._fill_image(batch, place, n, stored.cell(column, row))
            except ValueError as error:
                if on_error is None:
                    raise _damaged(stored.cell(KEY, row), error) from error
                batch[self.image_input][place] = 0
                on_error(place, error)

    def decode(self, table: pa.Table) -> Batch:
        """Return the batch of all rows of a table, every weight 1."""
        stored, rows = StoredRows([table]), np.arange(table.num_rows)
        batch = self.batch(stored, rows)
        self.fill(batch, stored, rows)
        return batch

    def decoded(self, table: pa.Table) -> pa.Table:
        """Return a table with pixels at the model's size in place of encoded images."""
        if self.features_shape:
            return table
        for name in self.image_columns:
            cells = table.column(name)
            pixels = np.zeros((table.num_rows, *self.pixel_shape), np.uint8)
            for row in np.flatnonzero(cells.is_valid().to_numpy()):
                try:
                    pixels[row] = self._pixels(cells[int(row)])
                except ValueError as error:
                    raise _damaged(table.column(KEY)[int(row)], error) from error
            table = table.set_column(
                table.column_names.index(name), name, bytes_column(pixels, cells.is_null())
            )
        return table

    def _fill_image(self, batch: Batch, place: int, n: int, cell: Any) -> None:
        images = batch[self.image_input]
        target = images[place, n] if self.several else images[place]
        if self.several and not cell.is_valid:
            target[:] = 0
            batch[IMAGE_MASK][place, n] = 0
            return
        target[:] = self._features(cell) if self.features_shape else self._pixels(cell)

    def _features(self, cell: Any) -> np.ndarray:
        content = cell.as_buffer() if cell.is_valid else b""
        features, shape = np.frombuffer(content, np.float32), self.row_shape[-2:]
        if features.size != int(np.prod(shape)):
            raise ValueError(f"it has {features.size} features, the manifest says {shape}")
        return features.reshape(shape)

    def _pixels(self, cell: Any) -> np.ndarray:
        if not cell.is_valid:
            raise ValueError("there is none")
        content = cell.as_buffer()
        if pa.types.is_fixed_size_binary(cell.type):
            pixels = np.frombuffer(content, np.uint8)
            for shape in (self.pixel_shape, self.stored_shape):
                # Of the model's size where a cache holds them, else of the store's.
                if pixels.size == int(np.prod(shape)):
                    return resized(pixels.reshape(shape), self.pixel_shape)
            raise ValueError(f"it has {pixels.size} bytes, the manifest says {self.stored_shape}")
        return decode_stored(content, self.stored_shape, self.pixel_shape)


def _damaged(key: Any, error: ValueError) -> ValueError:
    return ValueError(
        f"the stored image of row {key.as_py()!r} cannot be used: {error}; the prepared data is "
        "damaged, prepare it again"
    )


def bytes_column(array: np.ndarray, missing: Any = None) -> pa.Array:
    """Return an array as a column of fixed-size binary, a cell for each of its rows, not copied.

    Args:
        array: of any type, rows first.
        missing: boolean Arrow column that says which cells are null.
    """
    kind = pa.binary(array.itemsize * int(np.prod(array.shape[1:])))
    validity = None
    if missing is not None and missing.to_numpy().any():
        validity = pa.py_buffer(np.packbits(~missing.to_numpy(), bitorder="little"))
    content = pa.py_buffer(np.ascontiguousarray(array))
    return pa.Array.from_buffers(kind, len(array), [validity, content])


def aligned(shape: tuple[int, ...], kind: Any = np.uint8) -> np.ndarray:
    """Return an array, not initialised, that TensorFlow can take without a copy."""
    num_bytes = int(np.prod(shape)) * np.dtype(kind).itemsize
    buffer = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + num_bytes].view(kind).reshape(shape)


def floats(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of numbers as float32, NaN where one is missing."""
    return column.to_numpy().astype(np.float32)
