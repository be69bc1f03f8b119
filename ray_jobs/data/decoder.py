"""Turns stored rows into the arrays of a batch; decodes images at the model's size.

If the shards contain features instead of images, the batch has `features` instead of `image`.
Imports neither Ray nor TensorFlow.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from mm_model.backbones.tokenizer import TextReader
from ray_jobs.data.batch import (
    CATEGORY,
    FEATURES,
    IMAGE,
    IMAGE_MASK,
    INPUT_TYPES,
    KEY,
    LABEL,
    NUMERIC,
    TEXT,
    TEXT_CUT,
    TEXT_MASK,
    WEIGHT,
)
from ray_jobs.data.images import decode_stored, resize
from ray_jobs.data.manifest import Manifest
from ray_jobs.data.reader import StoredRows

Batch = dict[str, np.ndarray]
OnError = Callable[[int, ValueError], None]

ALIGNMENT_BYTES = 64
"""TensorFlow copies arrays whose address is not a multiple of this."""

_GREY = 128


class RowDecoder:
    """Turns stored rows into batches.

    Args:
        manifest: The manifest of the prepared data.
        with_image: Whether the model uses images or image features.
        size: Side in pixels of the model's images; None for the stored size.
        text: Reader of the texts that the model uses, or None.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        with_image: bool,
        size: int | None = None,
        text: TextReader | None = None,
    ) -> None:
        info = manifest.image
        self.manifest, self.text = manifest, text
        self.image_columns = info.columns if with_image else ()
        self.stored_shape = (info.height, info.width, 3)
        self.pixel_shape = (size, size, 3) if size else self.stored_shape
        self.features_shape = info.features
        self.image_input = FEATURES if info.features else IMAGE
        """Model input that is read from the image columns."""
        self.multi_image = with_image and info.has_nulls
        # Only rows without any image use it; close to photos' mean, it hardly moves batch norms.
        self.placeholder = _GREY if info.optional and not info.features else 0

    @property
    def columns(self) -> list[str]:
        """Columns of the shards to read."""
        categories = [vocabulary.column for vocabulary in self.manifest.vocabularies]
        weight = [WEIGHT] if self.manifest.is_weighted else []
        numeric = self.manifest.numeric_columns
        texts = () if self.text is None else self.text.columns
        return [KEY, *self.image_columns, *numeric, *categories, *texts, LABEL, *weight]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of the images or features of a row."""
        shape = self.features_shape or self.pixel_shape
        return (len(self.image_columns), *shape) if self.multi_image else shape

    @property
    def row_bytes(self) -> int:
        """Bytes of the decoded images or the features of a row."""
        item_bytes = np.dtype(INPUT_TYPES[self.image_input]).itemsize
        return int(np.prod(self.row_shape)) * item_bytes if self.image_columns else 0

    def decode(self, table: pa.Table, on_error: OnError | None = None) -> Batch:
        """Return the batch of all rows of a table; see `fill_images` for `on_error`."""
        stored, rows = StoredRows([table]), np.arange(table.num_rows)
        batch = self.make_batch(stored, rows)
        self.fill_images(batch, stored, rows, on_error=on_error)
        return batch

    def make_batch(self, stored: StoredRows, rows: np.ndarray) -> Batch:
        """Return the batch of some stored rows with uninitialized images."""
        names = [n for n in self.columns if n not in (KEY, *self.image_columns)]
        table = stored.take(names, rows)
        count = len(rows)
        numbers = [_floats(table[name]) for name in self.manifest.numeric_columns]
        batch = {
            NUMERIC: np.stack(numbers, axis=1) if numbers else np.empty((count, 0), np.float32),
            LABEL: _floats(table[LABEL])[:, None],
            WEIGHT: np.ones((count, 1), np.float32),
        }
        if self.manifest.is_weighted:
            batch[WEIGHT] = _floats(table[WEIGHT])[:, None]
        if self.manifest.vocabularies:
            codes = [v.codes(table[v.column].to_pylist()) for v in self.manifest.vocabularies]
            batch[CATEGORY] = np.stack(codes, axis=1)
        if self.text is not None:
            texts = [table[name].to_pylist() for name in self.text.columns]
            batch[TEXT], batch[TEXT_MASK], batch[TEXT_CUT] = self.text(texts)
        if self.image_columns:
            batch[self.image_input] = aligned_array(
                (count, *self.row_shape), INPUT_TYPES[self.image_input]
            )
        if self.multi_image:
            batch[IMAGE_MASK] = np.ones((count, len(self.image_columns)), np.float32)
        return batch

    def fill_images(
        self,
        batch: Batch,
        stored: StoredRows,
        rows: np.ndarray,
        first: int = 0,
        on_error: OnError | None = None,
    ) -> None:
        """Decode the images of some rows into a batch.

        Args:
            batch: Batch from `make_batch`.
            stored: Rows to choose from.
            rows: Indices into `stored`.
            first: Batch index of the first row.
            on_error: Called with the batch index and the error of each row with a damaged image,
                whose pixels become zero.

        Raises:
            ValueError: If an image is damaged and `on_error` is not given; it names the row.
        """
        for i, row in enumerate(rows.tolist(), start=first):
            try:
                for n, column in enumerate(self.image_columns):
                    self._fill_image(batch, i, n, stored.cell(column, row))
            except ValueError as error:
                if on_error is None:
                    raise _damaged(stored.cell(KEY, row), error) from error
                batch[self.image_input][i] = 0
                on_error(i, error)

    def decode_images(self, table: pa.Table) -> pa.Table:
        """Return a table with its encoded images replaced by pixels at the model's size."""
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

    def _fill_image(self, batch: Batch, row: int, n: int, cell: Any) -> None:
        images = batch[self.image_input]
        target = images[row, n] if self.multi_image else images[row]
        if self.multi_image and not cell.is_valid:
            target[:] = self.placeholder
            batch[IMAGE_MASK][row, n] = 0
            return
        target[:] = self._features(cell) if self.features_shape else self._pixels(cell)

    def _features(self, cell: Any) -> np.ndarray:
        content = cell.as_buffer() if cell.is_valid else b""
        features, shape = np.frombuffer(content, np.float32), self.features_shape or ()
        if features.size != int(np.prod(shape)):
            raise ValueError(f"it has {features.size} features, but the manifest says {shape}")
        return features.reshape(shape)

    def _pixels(self, cell: Any) -> np.ndarray:
        if not cell.is_valid:
            raise ValueError("it is missing")
        content = cell.as_buffer()
        if pa.types.is_fixed_size_binary(cell.type):
            pixels = np.frombuffer(content, np.uint8)
            for shape in (self.pixel_shape, self.stored_shape):
                # Cached images have the model's size, images in a shard the stored size.
                if pixels.size == int(np.prod(shape)):
                    return resize(pixels.reshape(shape), self.pixel_shape)
            raise ValueError(
                f"it has {pixels.size} bytes, but the manifest says {self.stored_shape}"
            )
        return decode_stored(content, self.stored_shape, self.pixel_shape)


def _damaged(key: Any, error: ValueError) -> ValueError:
    return ValueError(
        f"the stored image of row {key.as_py()!r} is damaged: {error}; prepare the data again"
    )


def bytes_column(array: np.ndarray, missing: Any = None) -> pa.Array:
    """Return an array as a fixed-size binary column with one cell per row, without a copy.

    Args:
        array: Array of any type, rows first.
        missing: Boolean Arrow column, true for null cells.
    """
    kind = pa.binary(array.itemsize * int(np.prod(array.shape[1:])))
    validity = None
    if missing is not None and missing.to_numpy().any():
        validity = pa.py_buffer(np.packbits(~missing.to_numpy(), bitorder="little"))
    content = pa.py_buffer(np.ascontiguousarray(array))
    return pa.Array.from_buffers(kind, len(array), [validity, content])


def column_values(column: pa.ChunkedArray, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return the values of a column from `bytes_column` as an array of rows × shape."""
    array = column.combine_chunks()
    values = np.frombuffer(array.buffers()[1], dtype).reshape(-1, *shape)
    return values[array.offset : array.offset + len(array)]


def aligned_array(shape: tuple[int, ...], kind: Any = np.uint8) -> np.ndarray:
    """Return an uninitialized array that TensorFlow can use without a copy."""
    num_bytes = int(np.prod(shape)) * np.dtype(kind).itemsize
    buffer = np.empty(num_bytes + ALIGNMENT_BYTES, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT_BYTES
    return buffer[start : start + num_bytes].view(kind).reshape(shape)


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    """Return a numeric column as float32, with NaN for missing numbers."""
    return column.to_numpy().astype(np.float32)
