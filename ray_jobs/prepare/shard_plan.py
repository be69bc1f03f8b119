"""Where each row goes: its split, its shard; and which shards of before stay as they are.

Enters: the rows, and what an earlier prepare left in the output folder.  Leaves: `Plan`.

The table is the truth. A shard whose rows are all still there and as they were stays; all other
rows are put into new shards. Imports neither Ray nor TensorFlow.
"""

# pyarrow makes the functions of its compute module when it is imported, unseen by pyright.
# pyright: reportAttributeAccessIssue=false

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import SPLITS, PrepareSpec, RunSpec, Split
from ray_jobs.data import manifest
from ray_jobs.data.batch import KEY
from ray_jobs.data.manifest import Manifest, Shard, read_manifest
from ray_jobs.prepare.journal import is_whole
from ray_jobs.prepare.labels import Classes
from ray_jobs.prepare.row_validation import Rows
from ray_jobs.prepare.shard_writer import ShardRows, ShardWriter
from ray_jobs.prepare.sources.refs import ImageRefs
from ray_jobs.prepare.splits import (
    TRAIN,
    Cuts,
    Groups,
    assign,
    join_by_image,
    make_cuts,
    split_hashes,
)
from ray_jobs.storage.folder import Folder

_AT_ONCE = 16
_INDEX = re.compile(r"part-(\d+)-")

NewShard = tuple[Split, int, np.ndarray]
"""Split, number and rows of a shard that is to be written."""


@dataclass(frozen=True)
class Earlier:
    """What an earlier prepare left."""

    manifest: Manifest
    shards: list[tuple[Split, Shard, pa.StringArray]]
    """Split, facts and keys of each shard that is there and whole."""


@dataclass(frozen=True)
class Plan:
    """In which split each good row stands, and in which shard."""

    members: dict[Split, np.ndarray]
    """Rows of each split; their order is a function of seed and key alone."""
    cuts: Cuts | None
    note: str
    """How the splits came about, in a sentence."""
    kept: dict[Split, list[Shard]]
    """Shards of before that stay as they are."""
    new: list[NewShard]
    """What is to be written."""


def read_earlier(output: Folder) -> Earlier | None:
    """Return what an earlier prepare left in a folder, if one did.

    Raises:
        JobError: if its manifest cannot be read.
    """
    if not output.exists(manifest.NAME):
        return None
    try:
        found = read_manifest(output)
    except JobError as error:
        raise JobError(
            f"{error}\nRows that it names keep their splits: give another prepare.output, or "
            "delete this one to split anew"
        ) from error

    def read(place: tuple[Split, Shard]) -> tuple[Split, Shard, pa.StringArray] | None:
        split, shard = place
        if not is_whole(output, shard.path, shard.num_bytes):
            return None
        with output.filesystem.open_input_file(output.locate(shard.path)) as stream:
            keys = pq.ParquetFile(stream).read(columns=[KEY]).column(KEY)
        return split, shard, keys.combine_chunks()

    places = [(split, shard) for split, info in found.splits.items() for shard in info.shards]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return Earlier(found, [shard for shard in threads.map(read, places) if shard])


def make_plan(
    rows: Rows, spec: RunSpec, classes: Classes, writer: ShardWriter, earlier: Earlier | None
) -> Plan:
    """Return where the good rows go.

    Args:
        rows: of the table.
        spec: of the run.
        classes: of the label.
        writer: of the shards, whose fingerprints tell whether a shard is as it would be now.
        earlier: what was prepared before.

    Raises:
        JobError: if there are too few rows for three splits, or a group would stand in two.
    """
    good = np.flatnonzero(rows.good)
    places = _earlier_places(rows, earlier)
    splits, cuts, note = _split(rows, good, spec, classes, places, earlier)
    split_of = np.full(len(rows), -1, np.int8)
    split_of[good] = splits
    hashes = split_hashes(spec.run.seed, rows.keys.take(pa.array(good)))
    good = good[np.argsort(hashes, kind="stable")]
    del hashes
    members: dict[Split, np.ndarray] = {
        split: good[split_of[good] == i] for i, split in enumerate(SPLITS)
    }
    kept: dict[Split, list[Shard]] = {split: [] for split in SPLITS}
    is_kept = np.zeros(len(rows), bool)
    for (split, shard, _), chosen in zip(earlier.shards if earlier else (), places, strict=True):
        if (chosen < 0).any() or (split_of[chosen] != SPLITS.index(split)).any():
            continue
        if writer.fingerprint(select(rows, split, 0, chosen)) == shard.rows_sha256:
            kept[split].append(shard)
            is_kept[chosen] = True
    new: list[NewShard] = []
    in_containers = any(reader.in_containers for reader in writer.readers)
    for split, chosen in members.items():
        chosen = chosen[~is_kept[chosen]]
        if in_containers:
            chosen = chosen[_container_order([refs.take(chosen) for refs in rows.images])]
        first = max((_index(shard) + 1 for shard in kept[split]), default=0)
        for number, start in enumerate(range(0, len(chosen), writer.rows_per_shard), first):
            new.append((split, number, chosen[start : start + writer.rows_per_shard]))
    return Plan(members, cuts, note, kept, new)


def select(rows: Rows, split: Split, index: int, chosen: np.ndarray) -> ShardRows:
    """Return some rows as those of a shard."""
    everything = ShardRows(
        split, index, rows.keys, rows.images, rows.numeric_RF, rows.categories, rows.labels
    )
    return everything.take(chosen)


def _split(
    rows: Rows,
    good: np.ndarray,
    spec: RunSpec,
    classes: Classes,
    places: list[np.ndarray],
    earlier: Earlier | None,
) -> tuple[np.ndarray, Cuts | None, str]:
    """Return the split of each good row, where it was cut, and how it came about."""
    options, seed = spec.prepare, spec.run.seed
    names = rows.groups.take(pa.array(good))
    if options.split_column:
        splits = rows.splits[good]
        if options.group_column:
            _require_whole_groups(names, splits, options)
        return splits, None, f"as {options.split_column} says"
    joined = ""
    if not options.group_column:
        images = [refs.take(good) for refs in rows.images]
        by_image = join_by_image(names, names, images)
        num_joined = pc.sum(pc.not_equal(by_image, names)).as_py()
        if num_joined:
            joined = f"; {num_joined} rows go with another that shows the same image"
        names = by_image
    groups = Groups.of(names, rows.labels[good], seed)
    if earlier and earlier.manifest.cuts and _splits_alike(earlier.manifest, spec, classes):
        stood = np.full(len(rows), -1, np.int8)
        for (split, _, _), chosen in zip(earlier.shards, places, strict=True):
            stood[chosen[chosen >= 0]] = SPLITS.index(split)
        cuts = earlier.manifest.cuts
        note = f"cut as in the manifest before, so that no row has moved{joined}"
        return assign(groups, cuts, stood[good]), cuts, note
    cuts = make_cuts(groups, options.validation_fraction, options.test_fraction)
    note = f"by hash of {options.group_column or options.key_column}, seed {seed}{joined}"
    if earlier:
        note += "; the rows before were split by another rule"
    return assign(groups, cuts), cuts, note


def _earlier_places(rows: Rows, earlier: Earlier | None) -> list[np.ndarray]:
    """Return which rows stand in each earlier shard, -1 for one that cannot be used any more."""
    if not earlier or not earlier.shards:
        return []
    keys = pa.concat_arrays([keys for _, _, keys in earlier.shards])
    found = pc.index_in(keys, value_set=rows.keys).fill_null(-1).to_numpy().astype(np.int64)
    found[~rows.good[found]] = -1
    return np.split(found, np.cumsum([len(keys) for _, _, keys in earlier.shards])[:-1])


def _splits_alike(earlier: Manifest, spec: RunSpec, classes: Classes) -> bool:
    """Whether an earlier prepare split by the same rule, so that its cuts mean the same here."""
    same = ("key_column", "label_column", "group_column", "validation_fraction", "test_fraction")
    return (
        earlier.seed == spec.run.seed
        and (earlier.negative_label, earlier.positive_label) == (classes.negative, classes.positive)
        and all(getattr(earlier.prepare, name) == getattr(spec.prepare, name) for name in same)
    )


def _require_whole_groups(groups: pa.StringArray, splits: np.ndarray, options: PrepareSpec) -> None:
    encoded = groups.dictionary_encode()
    codes = encoded.indices.to_numpy()
    first = np.full(len(encoded.dictionary), TRAIN, np.int8)
    # Written from the last row to the first, so that the first stays.
    first[codes[::-1]] = splits[::-1]
    for row in np.flatnonzero(first[codes] != splits)[:1]:
        raise JobError(
            f"{options.group_column} {groups[row].as_py()!r} has rows in both "
            f"{SPLITS[first[codes[row]]]} and {SPLITS[splits[row]]}, as {options.split_column} "
            "says; a group belongs to one split: correct the column, or leave prepare.group_column "
            "out"
        )


def _container_order(images: list[ImageRefs]) -> np.ndarray:
    """Return the order in which the containers of some rows' images are read in sequence."""
    paths = pc.coalesce(*(refs.path for refs in images)).dictionary_encode()
    rank = pc.rank(paths.dictionary, tiebreaker="first").to_numpy().astype(np.int64)
    start = np.zeros(len(paths), np.int64)
    for refs in reversed(images):
        if refs.start is not None:
            start = np.where(refs.is_there, refs.start, start)
    return np.lexsort((start, rank[paths.indices.to_numpy()]))


def _index(shard: Shard) -> int:
    found = _INDEX.search(shard.path)
    return int(found[1]) if found else 0
