"""What one task of `prepare` does: the rows of one shard → one Parquet file.

Enters: keys, paths of images, numbers and labels.  Leaves: the file, and a few facts about it.

The columns of a shard, in order: `key` string, `image` binary (a JPEG), each numeric column float32
with null where missing, `label` int8.  Nothing in a file depends on when or where it was written.
Imports neither Ray nor TensorFlow.
"""

import hashlib
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm_model.spec import Spec
from ray_jobs.batch import IMAGE, KEY, LABEL
from ray_jobs.images import BadImage, prepare_image
from ray_jobs.manifest import Shard
from ray_jobs.sources.folder import read_image
from ray_jobs.spec import PrepareSpec, Split
from ray_jobs.storage import Folder

T = TypeVar("T")
R = TypeVar("R")

# Files that are read ahead while an image is converted: what hides a store's latency.
_READ_AHEAD = 8


@dataclass(frozen=True)
class ShardRows:
    """The rows that are to become one shard."""

    split: Split
    index: int
    keys: Sequence[str]
    image_paths: Sequence[str]
    numeric_RF: np.ndarray
    labels: Sequence[int]


class BadRow(Spec):
    """A row that cannot be used, and why."""

    key: str | None
    reason: str
    detail: str


class ShardFacts(Spec):
    """What the driver learns of one shard."""

    split: Split
    index: int
    shard: Shard | None
    """None if no row was left."""
    bad_rows: tuple[BadRow, ...]


def shard_schema(numeric_columns: Sequence[str]) -> pa.Schema:
    """Return the columns of a shard."""
    return pa.schema(
        [
            pa.field(KEY, pa.string(), nullable=False),
            pa.field(IMAGE, pa.binary(), nullable=False),
            *(pa.field(name, pa.float32()) for name in numeric_columns),
            pa.field(LABEL, pa.int8(), nullable=False),
        ]
    )


def write_shard(
    rows: ShardRows,
    images: Folder,
    output: Folder,
    numeric_columns: Sequence[str],
    spec: PrepareSpec,
) -> ShardFacts:
    """Read, convert and store the images of one shard with the rest of its rows.

    The file's name ends in a piece of its own hash, so that preparing again leaves the files of
    the manifest before untouched until there is a new manifest.

    Args:
        rows: of the shard.
        images: folder that the paths are below.
        output: prepared folder.
        numeric_columns: names of the numbers.
        spec: how images are stored.
    """
    schema = shard_schema(numeric_columns)
    bad_rows: list[BadRow] = []
    group: list[tuple[int, bytes]] = []
    row_groups: list[int] = []
    file = io.BytesIO()
    with pq.ParquetWriter(file, schema, **_parquet_options(schema)) as writer:

        def flush() -> None:
            if group:
                writer.write_table(_row_group(rows, group, schema), row_group_size=len(group))
                row_groups.append(len(group))
                group.clear()

        def load(path: str) -> bytes | BadImage:
            try:
                return read_image(images, path)
            except BadImage as error:
                return error

        for row, content in enumerate(_read_ahead(load, rows.image_paths)):
            try:
                if isinstance(content, BadImage):
                    raise content
                group.append(
                    (
                        row,
                        prepare_image(
                            content,
                            spec.image_size,
                            spec.aspect,
                            spec.jpeg_quality,
                            spec.max_image_pixels,
                        ),
                    )
                )
            except BadImage as error:
                detail = f"{rows.image_paths[row]}: {error.detail}"
                bad_rows.append(BadRow(key=rows.keys[row], reason=error.reason, detail=detail))
            if len(group) == spec.rows_per_group:
                flush()
        flush()
    shard = _store(file.getvalue(), rows, row_groups, output) if row_groups else None
    return ShardFacts(split=rows.split, index=rows.index, shard=shard, bad_rows=tuple(bad_rows))


def _store(content: bytes, rows: ShardRows, row_groups: list[int], output: Folder) -> Shard:
    sha256 = hashlib.sha256(content).hexdigest()
    path = f"{rows.split}/part-{rows.index:05d}-{sha256[:8]}.parquet"
    output.write_bytes(path, content)
    return Shard(
        path=path,
        num_rows=sum(row_groups),
        row_groups=tuple(row_groups),
        num_bytes=len(content),
        sha256=sha256,
    )


def _row_group(rows: ShardRows, group: Sequence[tuple[int, bytes]], schema: pa.Schema) -> pa.Table:
    positions = [row for row, _ in group]
    columns = [
        pa.array([rows.keys[row] for row in positions], pa.string()),
        pa.array([content for _, content in group], pa.binary()),
        # from_pandas: NaN becomes null.
        *(pa.array(column, from_pandas=True) for column in rows.numeric_RF[positions].T),
        pa.array([rows.labels[row] for row in positions], pa.int8()),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _parquet_options(schema: pa.Schema) -> dict:
    others = [name for name in schema.names if name != IMAGE]
    return {
        # JPEGs do not get smaller; nor is there any use in the least and greatest of them.
        "compression": {IMAGE: "none"} | dict.fromkeys(others, "zstd"),
        "use_dictionary": False,
        "write_statistics": others,
    }


def _read_ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield the results in order, while threads work on the next few: no more are held."""
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(_READ_AHEAD) as threads:
        for item in items:
            pending.append(threads.submit(function, item))
            if len(pending) >= _READ_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
