"""What one task of `prepare` does: the rows of one shard → one Parquet file.

Enters: keys, where the images are, numbers, words and labels.  Leaves: the file, and a few facts
about it.

The columns of a shard, in order: `key` string; `image`, or of several `image_NAME` with null where
one is missing, as binary (a JPEG) or as fixed-size binary (the pixels); each numeric column float32
with null where missing; each categorical column string with null where missing; `label` int8.
Nothing in a file depends on when or where it was written.  Imports neither Ray nor TensorFlow.
"""

# pyarrow makes the functions of its compute module when it is imported, unseen by pyright.
# pyright: reportAttributeAccessIssue=false

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mm_model.spec import Spec
from ray_jobs.config.spec import PrepareSpec, Split
from ray_jobs.data.batch import KEY, LABEL
from ray_jobs.data.images import BadImage, prepare_image
from ray_jobs.data.manifest import ImageInfo, Shard
from ray_jobs.prepare.sources.refs import ImageReader, ImageRefs
from ray_jobs.storage.folder import Folder

StoredImages = tuple[bytes | None, ...]
"""The images of a row as they are stored, None for one of several that is missing."""

# What a shard's bytes and row groups depend on, besides its rows.
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
# A task holds its shard; pixels are large.
_MOST_SHARD_BYTES = 1 << 28
_MOST_GROUP_BYTES = 1 << 22


@dataclass(frozen=True)
class ShardRows:
    """The rows that are to become one shard."""

    split: Split
    index: int
    keys: pa.StringArray
    images: tuple[ImageRefs, ...]
    numeric_RF: np.ndarray
    categories: dict[str, pa.StringArray]
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> "ShardRows":
        """Return some of the rows."""
        return ShardRows(
            split=self.split,
            index=self.index,
            keys=self.keys.take(pa.array(rows)),
            images=tuple(refs.take(rows) for refs in self.images),
            numeric_RF=self.numeric_RF[rows],
            categories={n: texts.take(pa.array(rows)) for n, texts in self.categories.items()},
            labels=self.labels[rows],
        )


class BadRow(Spec):
    """A row that cannot be used, and why."""

    key: str
    reason: str
    detail: str


class ShardFacts(Spec):
    """What the driver learns of one shard."""

    split: Split
    index: int
    shard: Shard | None
    """None if no row was left."""
    bad_rows: tuple[BadRow, ...]


@dataclass(frozen=True)
class RowConverter:
    """Makes of rows and their images what a shard holds of them, for `prepare` and `predict`."""

    readers: tuple[ImageReader, ...]
    """Of the images, in the order of `image_columns`."""
    numeric_columns: tuple[str, ...]
    categorical: tuple[str, ...]
    spec: PrepareSpec

    @cached_property
    def image(self) -> ImageInfo:
        """How images are stored."""
        return ImageInfo.of(self.spec)

    @cached_property
    def schema(self) -> pa.Schema:
        """Columns of a shard."""
        image = pa.binary(self.spec.image_size**2 * 3 if self.spec.store == "raw" else -1)
        some_may_be_missing = bool(self.image.names)
        return pa.schema(
            [
                pa.field(KEY, pa.string(), nullable=False),
                *(pa.field(n, image, nullable=some_may_be_missing) for n in self.image.columns),
                *(pa.field(name, pa.float32()) for name in self.numeric_columns),
                *(pa.field(name, pa.string()) for name in self.categorical),
                pa.field(LABEL, pa.int8(), nullable=False),
            ]
        )

    def images_of(self, rows: ShardRows) -> Iterator[StoredImages | BadImage]:
        """Yield the images of each row as they are stored, or why the row cannot be used."""
        columns = [
            _where_there(refs, reader)
            for refs, reader in zip(rows.images, self.readers, strict=True)
        ]
        for row, contents in enumerate(zip(*columns, strict=True)):
            try:
                yield self._stored(rows, row, contents)
            except BadImage as error:
                yield error

    def table(self, rows: ShardRows, images: Sequence[StoredImages]) -> pa.Table:
        """Return some rows as a shard holds them."""
        columns = [
            rows.keys,
            *(
                pa.array(column, self.schema.field(name).type)
                for name, column in zip(self.image.columns, zip(*images, strict=True), strict=True)
            ),
            # from_pandas: NaN becomes null.
            *(pa.array(column, from_pandas=True) for column in rows.numeric_RF.T),
            *rows.categories.values(),
            pa.array(rows.labels, pa.int8()),
        ]
        return pa.Table.from_arrays(columns, schema=self.schema)

    def _stored(
        self, rows: ShardRows, row: int, contents: Sequence[bytes | BadImage | None]
    ) -> StoredImages:
        """Return the images of one row as they are stored.

        Raises:
            BadImage: if one of them cannot be used, or of several all are missing.
        """
        stored: list[bytes | None] = []
        for position, content in enumerate(contents):
            try:
                if isinstance(content, BadImage):
                    raise content
                stored.append(content if content is None else self._converted(content))
            except BadImage as error:
                if self.image.names and error.reason == "missing_image":
                    stored.append(None)
                    continue
                of = f"{self.image.names[position]}, " if self.image.names else ""
                detail = f"{of}{rows.images[position].name(row)}: {error.detail}"
                raise BadImage(error.reason, detail) from error
        if all(content is None for content in stored):
            names = [refs.name(row) for refs in rows.images if refs.path[row].is_valid]
            raise BadImage("missing_image", f"none of its images is there: {', '.join(names)}")
        return tuple(stored)

    def _converted(self, content: bytes) -> bytes:
        return prepare_image(
            content,
            self.spec.image_size,
            self.spec.aspect,
            self.spec.jpeg_quality,
            self.spec.max_image_pixels,
            self.spec.store,
        )


@dataclass(frozen=True)
class ShardWriter(RowConverter):
    """Writes shards; one serves all tasks."""

    output: Folder
    seed: int

    @property
    def rows_per_shard(self) -> int:
        """Rows of one shard: as the specification says, or fewer where their pixels are many."""
        if self.spec.store == "jpeg":
            return self.spec.rows_per_shard
        return max(min(self.spec.rows_per_shard, _MOST_SHARD_BYTES // self.image.row_bytes), 1)

    @property
    def rows_per_group(self) -> int:
        """Rows of one row group, likewise: a feed holds many row groups whole."""
        if self.spec.store == "jpeg":
            return self.spec.rows_per_group
        return max(min(self.spec.rows_per_group, _MOST_GROUP_BYTES // self.image.row_bytes), 1)

    def fingerprint(self, rows: ShardRows) -> str:
        """Return a hash of all that the content of the rows' shard follows from.

        Images stand in it by their places: they are taken as unchanged there.
        """
        rules: dict[str, Any] = self.spec.model_dump(mode="json", include=set(_RULES))
        rules["images"] = self.spec.images.removeprefix("file://")
        rules |= {"seed": self.seed, "columns": self.schema.names, "split": rows.split}
        found = hashlib.sha256(json.dumps(rules, sort_keys=True).encode())
        for texts in (rows.keys, *rows.categories.values(), *(r.path for r in rows.images)):
            _update(found, texts)
        for refs in rows.images:
            for place in (refs.start, refs.size):
                found.update(b"" if place is None else place.astype(np.int64).tobytes())
        # There are many NaN, and one is to be like another.
        numbers = np.where(np.isnan(rows.numeric_RF), np.float32(np.nan), rows.numeric_RF)
        found.update(numbers.astype(np.float32).tobytes())
        found.update(rows.labels.astype(np.int8).tobytes())
        return found.hexdigest()

    def write(self, rows: ShardRows) -> ShardFacts:
        """Read, convert and store the images of one shard with the rest of its rows.

        The file's name ends in a piece of its own hash, so that preparing again leaves the files of
        the manifest before untouched until there is a new manifest.
        """
        bad_rows: list[BadRow] = []
        good: list[int] = []
        group: list[StoredImages] = []
        row_groups: list[int] = []
        file = pa.BufferOutputStream()
        options = parquet_options(self.schema, self.image)
        with pq.ParquetWriter(file, self.schema, **options) as writer:

            def flush() -> None:
                if group:
                    chosen = rows.take(np.array(good[-len(group) :]))
                    writer.write_table(self.table(chosen, group), row_group_size=len(group))
                    row_groups.append(len(group))
                    group.clear()

            for row, images in enumerate(self.images_of(rows)):
                if isinstance(images, BadImage):
                    key = rows.keys[row].as_py()
                    bad_rows.append(BadRow(key=key, reason=images.reason, detail=images.detail))
                else:
                    group.append(images)
                    good.append(row)
                if len(group) == self.rows_per_group:
                    flush()
            flush()
        shard = None
        if good:
            shard = self._store(file.getvalue(), rows.take(np.array(good)), row_groups)
        return ShardFacts(split=rows.split, index=rows.index, shard=shard, bad_rows=tuple(bad_rows))

    def _store(self, content: pa.Buffer, rows: ShardRows, row_groups: list[int]) -> Shard:
        sha256 = hashlib.sha256(content).hexdigest()
        path = f"{rows.split}/part-{rows.index:05d}-{sha256[:8]}.parquet"
        self.output.write_bytes(path, content)
        return Shard(
            path=path,
            num_rows=sum(row_groups),
            row_groups=tuple(row_groups),
            num_bytes=len(content),
            sha256=sha256,
            rows_sha256=self.fingerprint(rows),
        )


def parquet_options(schema: pa.Schema, image: ImageInfo) -> dict[str, Any]:
    """Return how a shard's columns are written."""
    others = [name for name in schema.names if name not in image.columns]
    return {
        # JPEGs do not get smaller, and pixels are to be read as they are; nor is there any use in
        # the least and greatest of them.
        "compression": dict.fromkeys(image.columns, "none") | dict.fromkeys(others, "zstd"),
        "use_dictionary": False,
        "write_statistics": others,
    }


def _where_there(refs: ImageRefs, reader: ImageReader) -> Iterator[bytes | BadImage | None]:
    found = reader.read(refs.take(np.flatnonzero(refs.is_there)))
    for is_there in refs.is_there:
        yield next(found) if is_there else None


def _update(found: Any, texts: pa.StringArray) -> None:
    """Add texts to a hash, nulls and borders between them included."""
    lengths = pc.binary_length(texts).fill_null(-1).to_numpy()
    found.update(lengths.astype(np.int64).tobytes())
    found.update("".join(texts.drop_null().to_pylist()).encode())
