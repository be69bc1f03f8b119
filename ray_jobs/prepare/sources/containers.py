"""What sources share whose images lie many to a file: find the files, join keys, read pieces.

Imports neither Ray nor TensorFlow.
"""

# pyarrow makes the functions of its compute module when it is imported, unseen by pyright.
# pyright: reportAttributeAccessIssue=false

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from mm_model.nearest_match import did_you_mean
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import PrepareSpec
from ray_jobs.data.images import BadImage
from ray_jobs.data.prefetch import prefetch_map
from ray_jobs.prepare.number_parsing import texts
from ray_jobs.prepare.sources.refs import ImageRefs
from ray_jobs.storage.folder import Folder, expand_braces, glob_regex, split_file, split_glob

NUM_THREADS = 8
"""Files indexed or read at once; most of the time a thread waits for its storage."""
READ_BYTES = 4 << 20
"""Neighbouring images are fetched together up to this size."""
GAP_BYTES = 64 << 10
"""What may lie between neighbours: fetching as much costs less than another request."""
CHUNK_RECORDS = 8192
"""Records that are Python objects at once while a file is indexed."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Index:
    """The images found in containers: a key and a place each, in the order of the files."""

    keys: pa.ChunkedArray
    """As text; null where an image has none."""
    refs: ImageRefs


@dataclass
class PieceReader:
    """Reads images that are pieces of files, or whole files."""

    folder: Folder
    in_containers: bool = True

    def read(self, refs: ImageRefs) -> Iterator[bytes | BadImage]:
        """Yield the content of each image, in order, or why there is none.

        Neighbours in a file are fetched together, and a few fetches run ahead.
        """
        with ExitStack() as files, ThreadPoolExecutor(NUM_THREADS) as threads:
            read = partial(self._read_run, _OpenFiles(self.folder, files))
            for found in prefetch_map(read, _runs(refs), threads, NUM_THREADS):
                yield from found

    def _read_run(self, opened: "_OpenFiles", run: "_Run") -> list[bytes | BadImage]:
        if run.path is None:
            return [BadImage("missing_image", "there is no image of this key")] * len(run.pieces)
        try:
            if run.pieces[0] is None:
                return [self.folder.read_bytes(run.path)]
            pieces = [piece for piece in run.pieces if piece is not None]
            first, end = pieces[0][0], max(start + size for start, size in pieces)
            content = opened.read_at(run.path, first, end - first)
        except FileNotFoundError:
            bad = BadImage("missing_image", f"no such file in {self.folder}")
            return [bad] * len(run.pieces)
        # The clients of remote filesystems share no class of errors.
        except Exception as error:
            return [BadImage("unreadable_file", str(error))] * len(run.pieces)
        return [
            content[start - first : start - first + size]
            if start - first + size <= len(content)
            else BadImage("unreadable_file", f"the file ends before byte {start + size}")
            for start, size in pieces
        ]


def find_files(
    location: str, is_kind: Callable[[str], bool], what: str
) -> tuple[Folder, list[str]]:
    """Return a folder, and the files of a kind in it that a location names, in order.

    Args:
        location: a file, a folder, or either with wildcards and braces; path or URI.
        is_kind: tells by a name whether a file of a folder is one of the kind; what a glob or a
            name finds is taken as it is.
        what: what to call such files in errors.

    Raises:
        JobError: if there are none, or one that is named is missing.
    """
    if not location:
        raise JobError(f"prepare.images is not set: give the {what}, a folder, glob or URI of them")
    try:
        base, pattern = split_glob(location)
        patterns = expand_braces(pattern) if pattern else []
        folder = Folder(base)
    except ValueError as error:
        raise JobError(f"prepare.images={location!r}: {error}") from error
    if pattern is None:
        kind = folder.filesystem.get_file_info(folder.path).type
        if kind == fs.FileType.NotFound:
            raise JobError(f"prepare.images={location!r}: there is no such file or folder")
        if kind != fs.FileType.Directory:
            parent, name = split_file(location)
            return parent, [name]
        names = [name for name in folder.names() if is_kind(name) and not _is_hidden(name)]
    elif any(re.search(r"[*?\[]", each) for each in patterns):
        listed = list(folder.names())
        matches = [re.compile(glob_regex(each)).fullmatch for each in patterns]
        names = [name for match in matches for name in listed if match(name)]
    else:
        names = patterns
        infos = folder.filesystem.get_file_info([folder.locate(name) for name in names])
        missing = [n for n, i in zip(names, infos, strict=True) if i.type == fs.FileType.NotFound]
        if missing:
            raise JobError(
                f"prepare.images={location!r}: {len(missing)} of {len(names)} files are missing, "
                f"the first is {missing[0]}"
            )
    if not names:
        raise JobError(f"prepare.images={location!r}: there are no {what}")
    return folder, list(dict.fromkeys(names))


def file_of_each(names: Sequence[str], counts: Iterable[int]) -> pa.Array:
    """Return the file of each image, given how many each file holds."""
    rows = [pa.repeat(pa.scalar(name), count) for name, count in zip(names, counts, strict=True)]
    return pa.concat_arrays(rows)


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return the function's answer for each item, in order; the first error ends it."""
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return list(prefetch_map(function, items, threads, NUM_THREADS))


def read_user_table(spec: PrepareSpec) -> pa.Table:
    """Return `prepare.table`, which must have the key column.

    Raises:
        JobError: if it cannot be read, or has no such column.
    """
    from ray_jobs.prepare.table import read_table

    table = read_table(spec.table)
    require_key_column(table.column_names, spec, f"the table {spec.table}")
    return table


def require_key_column(names: Sequence[str], spec: PrepareSpec, what: str) -> None:
    """Check that the key column is among some names, for a join.

    Raises:
        JobError: naming the nearest match and the columns there are.
    """
    if spec.key_column not in names:
        raise JobError(
            f"prepare.key_column: {what} has no column {spec.key_column!r}"
            f"{did_you_mean(spec.key_column, list(names))} (it has: {', '.join(names)})"
        )


def join(
    table: pa.Table, spec: PrepareSpec, indexes: Mapping[str, Index]
) -> tuple[dict[str, ImageRefs], tuple[tuple[str, str, str], ...]]:
    """Return where the image of each record is, by image name, and the images that have none.

    A hash join of keys alone, by pyarrow: pixels stay where they are, and what is in memory are the
    keys of both sides and three numbers an image. A key that several images have means the first.

    Ray Data's own join is not used: it needs polars, which Ray does not bring along, and it took
    29.5 s for 2,000 rows. Here a million records and a million images in 100 tars took 21 s, the
    indexing of the tars included, and the process 557 MB at most (benchmarks/join.py, two cores).

    Raises:
        JobError: if no record has an image, since the keys are then spelled differently.
    """
    keys = texts(table.column(spec.key_column))
    found: dict[str, ImageRefs] = {}
    unmatched: list[tuple[str, str, str]] = []
    for name, index in indexes.items():
        position = _to_array(pc.index_in(keys, value_set=index.keys, skip_nulls=True))
        found[name] = _take_some(index.refs, position)
        unmatched += _unmatched(index, keys)
    if all(refs.path.null_count == len(refs) for refs in found.values()):
        index = next(iter(indexes.values()))
        raise JobError(
            f"no {spec.key_column} of the table is the key of an image: there are "
            f"{_examples(keys)} in the table, and {_examples(index.keys)} among the images"
        )
    return found, tuple(unmatched)


def stack(tables: Iterable[pa.Table]) -> pa.Table:
    """Return tables under each other; a column that one lacks is null there.

    A column of integers here and of fractions there becomes one of fractions; one of text here and
    of something else there becomes text.
    """
    tables = list(tables)
    kinds: dict[str, set[pa.DataType]] = {}
    for field in (field for table in tables for field in table.schema):
        kinds.setdefault(field.name, set()).add(field.type)
    mixed = {name for name, of_name in kinds.items() if not _have_common_type(of_name)}
    as_text = [
        table.cast(
            pa.schema([(f.name, pa.string() if f.name in mixed else f.type) for f in table.schema])
        )
        for table in tables
    ]
    return pa.concat_tables(as_text, promote_options="permissive")


def table_of_records(records: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return JSON objects as a table; columns of lists or objects are left out."""
    columns: dict[str, pa.Array] = {}
    for name in dict.fromkeys(name for record in records for name in record):
        cells = [record.get(name) for record in records]
        if not any(isinstance(cell, list | dict) for cell in cells):
            columns[name] = _array_of_cells(cells)
    return pa.table(columns)


def _have_common_type(kinds: set[pa.DataType]) -> bool:
    try:
        pa.unify_schemas([pa.schema([("", k)]) for k in kinds], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return False
    return True


def _array_of_cells(cells: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(cells)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        as_text = {True: "true", False: "false"}
        return pa.array(
            [None if c is None else as_text[c] if isinstance(c, bool) else str(c) for c in cells],
            pa.string(),
        )


def _take_some(refs: ImageRefs, position: np.ndarray) -> ImageRefs:
    """Return the entries at some positions; without an image where the position is negative."""
    is_found = position >= 0
    where = np.where(is_found, position, 0)
    return ImageRefs(
        refs.path.take(pa.array(where, mask=~is_found)),
        None if refs.start is None else np.where(is_found, refs.start[where], 0),
        None if refs.size is None else np.where(is_found, refs.size[where], 0),
    )


def _unmatched(index: Index, record_keys: pa.ChunkedArray) -> Iterator[tuple[str, str, str]]:
    """Yield the images of an index that no record gets, with the reason."""
    first = _to_array(pc.index_in(index.keys, value_set=index.keys, skip_nulls=True))
    is_record = _to_mask(pc.is_in(index.keys, value_set=record_keys, skip_nulls=True))
    is_first = first == np.arange(len(first))
    rows = np.flatnonzero(~(is_record & is_first))
    keys = index.keys.take(pa.array(rows)).to_pylist()
    refs = index.refs.take(rows)
    for place, (row, key) in enumerate(zip(rows, keys, strict=True)):
        if key is None:
            yield "", "no_record", f"{refs.name(place)} has no key"
        elif is_first[row]:
            yield key, "no_record", f"no record has the key of {refs.name(place)}"
        else:
            before = index.refs.name(int(first[row]))
            yield key, "duplicate_image", f"{refs.name(place)} has the key of {before}"


def _examples(keys: pa.ChunkedArray) -> str:
    shown = [repr(key) for key in keys.drop_null().slice(0, 3).to_pylist()]
    return f"{', '.join(shown)}, …" if shown else "none"


def _to_array(positions: pa.ChunkedArray) -> np.ndarray:
    """Return positions as int64, -1 where there is none."""
    return np.asarray(pc.fill_null(positions, -1).to_numpy(), np.int64)


def _to_mask(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(bool)


def _is_hidden(name: str) -> bool:
    return PurePosixPath(name).name.startswith((".", "_"))


@dataclass(frozen=True)
class _Run:
    """Images that are fetched together: one whole file, or neighbours in one."""

    path: str | None
    pieces: list[tuple[int, int] | None]
    """Start and size in bytes; None for a whole file or no image."""


def _runs(refs: ImageRefs) -> Iterator[_Run]:
    run: _Run | None = None
    for row, path in enumerate(refs.path):
        name = path.as_py()
        if name is None or refs.start is None or refs.size is None:
            if run:
                yield run
            run = None
            yield _Run(name, [None])
            continue
        start, size = int(refs.start[row]), int(refs.size[row])
        if run and run.path == name and _is_neighbour(run, start, size):
            run.pieces.append((start, size))
        else:
            if run:
                yield run
            run = _Run(name, [(start, size)])
    if run:
        yield run


def _is_neighbour(run: _Run, start: int, size: int) -> bool:
    first, last = run.pieces[0], run.pieces[-1]
    if first is None or last is None:
        return False
    end = last[0] + last[1]
    # The same image again, for another row that shares it, is a neighbour, too.
    return last[0] <= start <= end + GAP_BYTES and start + size - first[0] <= READ_BYTES


class _OpenFiles:
    """The file that each thread read last stays open, since neighbours often follow."""

    def __init__(self, folder: Folder, files: ExitStack) -> None:
        self._folder, self._files = folder, files
        self._last = threading.local()
        self._lock = threading.Lock()

    def read_at(self, path: str, start: int, size: int) -> bytes:
        """Return a piece of a file; less where the file ends."""
        if getattr(self._last, "path", None) != path:
            file = self._folder.filesystem.open_input_file(self._folder.locate(path))
            with self._lock:
                self._files.callback(file.close)
            previous = getattr(self._last, "file", None)
            self._last.path, self._last.file = path, file
            if previous is not None:
                previous.close()
        return self._last.file.read_at(size, start)
