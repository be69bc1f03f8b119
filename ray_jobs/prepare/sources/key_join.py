"""Joins the records of a table with images in containers, by key."""

# pyright: reportAttributeAccessIssue=false

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import PrepareSpec
from ray_jobs.prepare.cell_text import column_text
from ray_jobs.prepare.sources.source import ImageRefs
from ray_jobs.prepare.table import read_table, require_column


@dataclass(frozen=True)
class ImageIndex:
    """Key and location of each image in containers, in the order of the files."""

    keys: pa.LargeStringArray
    """Null where an image has none."""
    refs: ImageRefs


def read_keyed_table(spec: PrepareSpec) -> pa.Table:
    """Read `prepare.table`, which must have the key column."""
    table = read_table(spec.table)
    owner = f"the table {spec.table}"
    require_column(table.column_names, spec.key_column, "prepare.key_column", owner)
    return table


def join_images(
    table: pa.Table, spec: PrepareSpec, indexes: Mapping[str, ImageIndex]
) -> tuple[dict[str, ImageRefs], tuple[tuple[str, str, str], ...]]:
    """Return each record's image by image name, and the images without a record.

    A hash join of the keys in pyarrow: memory holds the keys of both sides and three numbers per
    image, not pixels. Of several images with one key the first is used.

    Ray Data's own join is not used: it needs polars, which Ray does not install, and it took 29.5 s
    for 2,000 rows. This one took 21 s for a million records and a million images in 100 tars,
    including indexing the tars, with at most 557 MB in the process (benchmarks/join.py, two cores).

    Raises:
        JobError: If no record has an image, since the keys are then spelled differently.
    """
    keys = column_text(table.column(spec.key_column))
    images: dict[str, ImageRefs] = {}
    unmatched: list[tuple[str, str, str]] = []
    for name, index in indexes.items():
        images[name] = index.refs.take(_first_rows(keys, index.keys))
        unmatched += _unmatched(index, keys)
    if not any(refs.has_image.any() for refs in images.values()):
        index = next(iter(indexes.values()))
        raise JobError(
            f"no {spec.key_column} of the table is the key of an image: the table has "
            f"{_examples(keys)}, the images have {_examples(index.keys)}"
        )
    return images, tuple(unmatched)


def _unmatched(
    index: ImageIndex, record_keys: pa.LargeStringArray
) -> Iterator[tuple[str, str, str]]:
    """Yield the images of an index that no record uses, with the reason."""
    first = _first_rows(index.keys, index.keys)
    is_first = first == np.arange(len(first))
    is_used = is_first & (_first_rows(index.keys, record_keys) >= 0)
    rows = np.flatnonzero(~is_used)
    keys = index.keys.take(pa.array(rows)).to_pylist()
    for row, key in zip(rows.tolist(), keys, strict=True):
        name = index.refs.name(row)
        if key is None:
            yield "", "no_record", f"{name} has no key"
        elif is_first[row]:
            yield key, "no_record", f"no record has the key of {name}"
        else:
            duplicate_of = index.refs.name(int(first[row]))
            yield key, "duplicate_image", f"{name} has the key of {duplicate_of}"


def _first_rows(keys: pa.LargeStringArray, among: pa.LargeStringArray) -> np.ndarray:
    """Return the first row of each key among other keys, -1 for null and unknown keys."""
    rows = pc.index_in(keys, value_set=among, skip_nulls=True)
    return rows.fill_null(-1).to_numpy().astype(np.int64)


def _examples(keys: pa.LargeStringArray) -> str:
    shown = [repr(key) for key in keys.drop_null().slice(0, 3).to_pylist()]
    return f"{', '.join(shown)}, …" if shown else "none"
