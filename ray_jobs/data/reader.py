"""Reads row groups of prepared shards as Arrow tables. Imports neither Ray nor TensorFlow."""

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.data.manifest import Shard
from ray_jobs.data.sampler import RowRange
from ray_jobs.storage.folder import Folder

_READ_THREADS = 8
"""Number of shards that are read concurrently, to hide the latency of a remote store."""
_MAX_FOOTERS = 256


class ShardReader:
    """Reads the rows of one split in row groups of its shards, in any number of threads."""

    def __init__(self, folder: Folder, shards: Sequence[Shard], columns: Sequence[str]) -> None:
        self.folder, self.shards, self.columns = folder, shards, list(columns)
        self._footers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the reader without its cached Parquet footers."""
        return ShardReader, (self.folder, self.shards, self.columns)

    def read_groups(self, shard: int, groups: Sequence[int]) -> list[pa.Table]:
        """Return row groups of one shard."""
        path = self.folder.locate(self.shards[shard].path)
        with (
            self.folder.filesystem.open_input_file(path) as stream,
            pq.ParquetFile(stream, metadata=self._footers.get(shard)) as file,
        ):
            self._remember(shard, file.metadata)
            tables = (file.read_row_group(g, self.columns, use_threads=False) for g in groups)
            if not self.shards[shard].selection:
                return list(tables)
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            starts = np.cumsum([0, *sizes])
            selected = (self.shards[shard].is_selected(starts[g], sizes[g]) for g in groups)
            return [t.filter(pa.array(s)) for t, s in zip(tables, selected, strict=True)]

    def read_keys(self, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], pa.Table]:
        """Return row groups, given sorted pairs of shard and row group."""
        by_shard = list(_groups_by_shard(keys).items())
        with ThreadPoolExecutor(_READ_THREADS, "feed-read") as threads:
            read = threads.map(lambda item: self.read_groups(*item), by_shard)
            return dict(zip(keys, chain.from_iterable(read), strict=True))

    def read(self, ranges: Sequence[RowRange]) -> "StoredRows":
        """Return the rows of all ranges in order; reads each row group once."""
        return StoredRows.of(ranges, self.read_keys(sorted({(r.shard, r.group) for r in ranges})))

    def _remember(self, shard: int, footer: Any) -> None:
        with self._lock:
            self._footers[shard] = footer
            if len(self._footers) > _MAX_FOOTERS:
                del self._footers[next(iter(self._footers))]


def read_columns(folder: Folder, shards: Sequence[Shard], columns: Sequence[str]) -> pa.Table:
    """Return those of some columns that are stored, in stored order."""
    reader = ShardReader(folder, shards, columns)
    groups = (reader.read_groups(i, range(len(s.row_groups))) for i, s in enumerate(shards))
    return _concatenate(chain.from_iterable(groups), columns)


def sample_columns(
    folder: Folder, shards: Sequence[Shard], columns: Sequence[str], max_rows: int
) -> pa.Table:
    """Return some columns of at most `max_rows` rows, from random row groups."""
    keys = [(i, group) for i, shard in enumerate(shards) for group in range(len(shard.row_groups))]
    chosen: list[tuple[int, int]] = []
    num_rows = 0
    for index in np.random.default_rng(0).permutation(len(keys)):
        if num_rows >= max_rows:
            break
        shard, group = keys[index]
        chosen.append((shard, group))
        num_rows += shards[shard].row_groups[group]
    tables = ShardReader(folder, shards, columns).read_keys(sorted(chosen))
    return _concatenate(tables.values(), columns).slice(0, max_rows)


def _concatenate(tables: Iterable[pa.Table], columns: Sequence[str]) -> pa.Table:
    """Return the rows of all tables; without tables, empty columns."""
    return pa.concat_tables(list(tables) or [pa.table({name: [] for name in columns})])


def _groups_by_shard(keys: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """Return row groups by shard, given sorted pairs of shard and row group."""
    return {shard: [g for _, g in pairs] for shard, pairs in groupby(keys, itemgetter(0))}


class StoredRows:
    """Rows of several row groups in order, without copying them.

    They are not combined in one Arrow table, since some row groups may contain encoded images and
    others, from a cache, pixels.
    """

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        self.tables = tables
        self.starts = np.cumsum([0, *(table.num_rows for table in tables)])
        self.num_rows = int(self.starts[-1])
        self._combined: pa.Table | None = None

    @classmethod
    def of(
        cls, ranges: Sequence[RowRange], tables: dict[tuple[int, int], pa.Table]
    ) -> "StoredRows":
        """Return the rows of some ranges, given the tables of their row groups."""
        return cls([tables[r.shard, r.group].slice(r.start, r.num_rows) for r in ranges])

    def take(self, columns: Sequence[str], rows: np.ndarray) -> pa.Table:
        """Return a copy of some columns of some rows; not meant for image columns."""
        table = self._combined
        if table is None or table.column_names != list(columns):
            table = pa.concat_tables([table.select(columns) for table in self.tables])
            # `take` concatenates the chunks, and a string column is limited to 2 GiB.
            types = [pa.large_string() if pa.types.is_string(t) else t for t in table.schema.types]
            table = table.cast(pa.schema(zip(columns, types, strict=True)))
            self._combined = table
        return table.take(pa.array(rows))

    def rows(self, rows: np.ndarray) -> pa.Table:
        """Return some rows without copying them."""
        positions = np.searchsorted(self.starts, rows, side="right") - 1
        places = zip(positions.tolist(), (rows - self.starts[positions]).tolist(), strict=True)
        return pa.concat_tables([self.tables[table].slice(row, 1) for table, row in places])

    def cell(self, column: str, row: int) -> Any:
        """Return a cell as an Arrow scalar that references its row group."""
        position = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.tables[position].column(column)[row - int(self.starts[position])]
