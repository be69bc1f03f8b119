"""Writes the rows of one shard to a Parquet file, as one task of `prepare`.

Input: keys, image references, numbers, words and labels. Output: the file, and facts about it.

The columns of a shard, in order (nullable columns are null where a value is missing):

    key                  string
    image                binary (JPEG) or fixed-size binary (pixels), nullable with
                         `prepare.missing_image=keep`; if rows have several images, there is a
                         nullable column image_NAME for each
    numeric columns      float32, nullable
    categorical columns  string, nullable
    text columns         string, nullable
    fold                 string, if `prepare.fold_column` is set
    group                string, if `prepare.group_column` is set
    label                int8
    weight               float32, only with `prepare.weight_column`
    original_pixels      int32, pixels of the largest image before it was resized, nullable like
                         image

The content of a file does not depend on when or where it was written.
"""

# pyright: reportAttributeAccessIssue=false

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mm_model.spec import Spec
from ray_jobs.config.prepare_spec import PrepareSpec, Split
from ray_jobs.data.batch import FOLD, GROUP, KEY, LABEL, ORIGINAL_PIXELS, WEIGHT
from ray_jobs.data.images import EIGHT_BITS, BadImage, PixelRange, StoredImage, prepare_image
from ray_jobs.data.manifest import ImageInfo, Shard
from ray_jobs.prepare.row_validation import Rows
from ray_jobs.prepare.sources.source import ImageReader, ImageRefs
from ray_jobs.storage.folder import Folder

StoredImages = tuple[StoredImage | None, ...]
"""The images of a row, None for a missing one."""

# Settings that a shard's bytes and row groups depend on.
_RULES = (
    "source",
    "images",
    "image_column",
    "image_columns",
    "store",
    "image_size",
    "aspect",
    "jpeg_quality",
    "max_image_pixels",
    "rows_per_shard",
    "rows_per_group",
)
# A task keeps a whole shard in memory, and a feed keeps many row groups.
_MAX_SHARD_BYTES = 1 << 28
_MAX_GROUP_BYTES = 1 << 22


class BadRow(Spec):
    """A row whose images cannot be used, and why."""

    key: str
    reason: str
    detail: str


class ShardFacts(Spec):
    """Facts about one shard for the driver."""

    split: Split
    index: int
    shard: Shard | None
    """None if no row was usable."""
    bad_rows: tuple[BadRow, ...]


@dataclass(frozen=True)
class RowConverter:
    """Converts rows and their images to the columns of a shard, for `prepare` and `predict`."""

    readers: tuple[ImageReader, ...]
    """One reader per image name, in the order of `image_columns`."""
    numeric_columns: tuple[str, ...]
    categorical: tuple[str, ...]
    spec: PrepareSpec
    pixel_range: PixelRange | None = field(default=None, kw_only=True)
    """Values of black and white in images with more than 8 bits, as set or found."""

    @cached_property
    def image(self) -> ImageInfo:
        """Format of the stored images."""
        return ImageInfo.of(self.spec, self.pixel_range)

    @cached_property
    def schema(self) -> pa.Schema:
        """Columns of a shard."""
        image = pa.binary(self.spec.image_size**2 * 3 if self.spec.store == "raw" else -1)
        optional = {FOLD: self.spec.fold_column, GROUP: self.spec.group_column}
        names = [name for name, column in optional.items() if column]
        weight = [pa.field(WEIGHT, pa.float32(), nullable=False)]
        return pa.schema(
            [
                pa.field(KEY, pa.string(), nullable=False),
                *(pa.field(n, image, nullable=self.image.has_nulls) for n in self.image.columns),
                *(pa.field(name, pa.float32()) for name in self.numeric_columns),
                *(pa.field(name, pa.string()) for name in self.categorical),
                *(pa.field(name, pa.string(), nullable=False) for name in names),
                pa.field(LABEL, pa.int8(), nullable=False),
                *(weight if self.spec.weight_column else ()),
                pa.field(ORIGINAL_PIXELS, pa.int32(), nullable=self.image.has_nulls),
            ]
        )

    def convert_images(self, rows: Rows) -> Iterator[StoredImages | BadImage]:
        """Yield the stored images of each row, or why the row cannot be used."""
        columns = [
            _read_present(refs, reader)
            for refs, reader in zip(rows.images, self.readers, strict=True)
        ]
        for row, contents in enumerate(zip(*columns, strict=True)):
            yield self._convert_row(rows, row, contents)

    def table(self, rows: Rows, images: Sequence[StoredImages]) -> pa.Table:
        """Return rows and their stored images as columns of a shard."""
        stored = zip(*images, strict=True)
        known = [[image.original_pixels for image in row if image] for row in images]
        columns = [
            rows.keys,
            *(
                pa.array([image and image.content for image in column], self.schema.field(n).type)
                for n, column in zip(self.image.columns, stored, strict=True)
            ),
            # from_pandas: NaN becomes null.
            *(pa.array(column, from_pandas=True) for column in rows.numeric_RF.T),
            *rows.categories.values(),
            *_present(rows.folds, rows.groups),
            pa.array(rows.labels, pa.int8()),
            *(() if rows.weights is None else (pa.array(rows.weights),)),
            pa.array([max(pixels, default=None) for pixels in known], pa.int32()),
        ]
        return pa.Table.from_arrays(columns, schema=self.schema)

    def _convert_row(
        self, rows: Rows, row: int, contents: Sequence[bytes | StoredImage | BadImage | None]
    ) -> StoredImages | BadImage:
        """Return the stored images of one row, or why the row cannot be used."""
        stored: list[StoredImage | None] = []
        for position, content in enumerate(contents):
            image = self.convert_image(content) if isinstance(content, bytes) else content
            if isinstance(image, BadImage):
                # Sources name only files that exist, so a file that does not was just deleted.
                is_empty = image.reason == "missing_image" and rows.images[position].in_containers
                if not (self.image.has_nulls and is_empty):
                    prefix = f"{self.image.names[position]}, " if self.image.names else ""
                    detail = f"{prefix}{rows.images[position].name(row)}: {image.detail}"
                    return BadImage(image.reason, detail)
                image = None
            stored.append(image)
        if not self.image.optional and not any(stored):
            names = [refs.name(row) for refs in rows.images if refs.path[row].is_valid]
            return BadImage("missing_image", f"none of its images exists: {', '.join(names)}")
        return tuple(stored)

    def convert_image(self, content: bytes) -> StoredImage | BadImage:
        """Return an image file as it is stored, or why it cannot be used."""
        try:
            return prepare_image(content, self.spec, self.pixel_range)
        except BadImage as error:
            # A copy without traceback, whose frames would keep the image in memory.
            return BadImage(error.reason, error.detail)


@dataclass(frozen=True)
class ShardWriter(RowConverter):
    """Writes shards; all tasks use the same writer."""

    output: Folder
    seed: int

    @property
    def rows_per_shard(self) -> int:
        """Rows per shard: `prepare.rows_per_shard`, or fewer to limit the size of raw pixels."""
        return self._limit_rows(self.spec.rows_per_shard, _MAX_SHARD_BYTES)

    @property
    def rows_per_group(self) -> int:
        """Rows per group: `prepare.rows_per_group`, or fewer to limit the size of raw pixels."""
        return self._limit_rows(self.spec.rows_per_group, _MAX_GROUP_BYTES)

    def fingerprint(self, split: Split, rows: Rows) -> str:
        """Return a hash of everything that determines the content of the rows' shard.

        Images are represented by their locations and assumed to be unchanged there.
        """
        rules: dict[str, Any] = self.spec.model_dump(mode="json", include=set(_RULES))
        rules["images"] = self.spec.images.removeprefix("file://")
        rules |= {"seed": self.seed, "columns": self.schema.names, "split": split}
        # Omitted for 8-bit images, so that shards of an earlier version are kept.
        if self.pixel_range not in (None, EIGHT_BITS):
            rules["pixel_range"] = (self.pixel_range, self.spec.pixel_range)
        if self.image.optional:
            rules["missing_image"] = self.spec.missing_image
        digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode())
        paths = [refs.path for refs in rows.images]
        given = _present(rows.folds, rows.groups)
        for texts in (rows.keys, *rows.categories.values(), *given, *paths):
            _hash_text(digest, texts)
        for refs in rows.images:
            for values in (refs.start, refs.size):
                digest.update(b"" if values is None else values.astype(np.int64).tobytes())
        # NaN has many bit patterns.
        numbers = np.where(np.isnan(rows.numeric_RF), np.float32(np.nan), rows.numeric_RF)
        digest.update(numbers.astype(np.float32).tobytes())
        digest.update(rows.labels.astype(np.int8).tobytes())
        if rows.weights is not None:
            digest.update(rows.weights.tobytes())
        return digest.hexdigest()

    def write(self, split: Split, index: int, rows: Rows) -> ShardFacts:
        """Read and convert the images of one shard, and write them with the rest of its rows.

        The file name ends in part of the file's hash, so preparing again does not touch the files
        of the existing manifest before there is a new one.
        """
        bad_rows: list[BadRow] = []
        good: list[int] = []
        group: list[StoredImages] = []
        row_groups: list[int] = []
        num_without_image = 0
        file = pa.BufferOutputStream()
        options = parquet_options(self.schema, self.image)
        with pq.ParquetWriter(file, self.schema, **options) as writer:

            def flush() -> None:
                if group:
                    chosen = rows.take(np.array(good[-len(group) :]))
                    writer.write_table(self.table(chosen, group), row_group_size=len(group))
                    row_groups.append(len(group))
                    group.clear()

            for row, images in enumerate(self.convert_images(rows)):
                if isinstance(images, BadImage):
                    key = rows.keys[row].as_py()
                    bad_rows.append(BadRow(key=key, reason=images.reason, detail=images.detail))
                else:
                    group.append(images)
                    good.append(row)
                    num_without_image += not any(images)
                if len(group) == self.rows_per_group:
                    flush()
            flush()
        shard = None
        if good:
            content = file.getvalue()
            sha256 = hashlib.sha256(content).hexdigest()
            path = f"{split}/part-{index:05d}-{sha256[:8]}.parquet"
            self.output.write_bytes(path, content)
            shard = Shard(
                path=path,
                num_rows=len(good),
                row_groups=tuple(row_groups),
                num_bytes=len(content),
                sha256=sha256,
                num_without_image=num_without_image,
                rows_sha256=self.fingerprint(split, rows.take(np.array(good))),
            )
        return ShardFacts(split=split, index=index, shard=shard, bad_rows=tuple(bad_rows))

    def _limit_rows(self, num_rows: int, max_bytes: int) -> int:
        if self.spec.store == "jpeg":
            return num_rows
        return max(min(num_rows, max_bytes // self.image.row_bytes), 1)


def parquet_options(schema: pa.Schema, image: ImageInfo) -> dict[str, Any]:
    """Return the Parquet options of a shard's columns."""
    others = [name for name in schema.names if name not in image.columns]
    return {
        # JPEGs do not compress, raw pixels should be read without decompression, and minimum and
        # maximum of images have no use.
        "compression": dict.fromkeys(image.columns, "none") | dict.fromkeys(others, "zstd"),
        "use_dictionary": False,
        "write_statistics": others,
    }


def _present(*columns: pa.LargeStringArray | None) -> list[pa.LargeStringArray]:
    return [column for column in columns if column is not None]


def _read_present(refs: ImageRefs, reader: ImageReader) -> Iterator[bytes | BadImage | None]:
    """Yield each row's image, None for a row without one."""
    images = reader.read(refs.take(np.flatnonzero(refs.has_image)))
    for has_image in refs.has_image:
        yield next(images) if has_image else None


def _hash_text(digest: Any, texts: pa.LargeStringArray) -> None:
    """Add texts to a hash, including nulls and the boundaries between texts."""
    lengths = pc.binary_length(texts).fill_null(-1).to_numpy()
    digest.update(lengths.astype(np.int64).tobytes())
    digest.update("".join(texts.drop_null().to_pylist()).encode())
