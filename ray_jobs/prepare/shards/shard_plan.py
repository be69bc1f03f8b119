"""Plans the split and shard of each row, and which existing shards are kept.

Input: the rows, and the manifest and shards of an earlier prepare. Output: `Plan`.

The current table decides: a shard is kept if all its rows still exist unchanged, and all other rows
go into new shards. Small shards are merged with new rows if this makes fewer shards.
"""

# pyright: reportAttributeAccessIssue=false

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import SPLITS, PrepareSpec, Split
from ray_jobs.config.spec import RunSpec
from ray_jobs.config.text import count_text
from ray_jobs.data.batch import KEY
from ray_jobs.data.manifest import MANIFEST, Manifest, Shard, read_manifest
from ray_jobs.prepare.cell_text import TEXT, first_rows
from ray_jobs.prepare.labels import Classes
from ray_jobs.prepare.row_validation import CheckedRows
from ray_jobs.prepare.shards.shard_writer import ShardWriter
from ray_jobs.prepare.shards.splits import (
    TEST,
    TRAIN,
    VALIDATION,
    Cuts,
    Groups,
    assign,
    cut_splits,
    join_by_image,
    make_cuts,
    split_hashes,
)
from ray_jobs.prepare.sources.source import ImageRefs
from ray_jobs.storage.folder import Folder

_NUM_THREADS = 16
_INDEX = re.compile(r"part-(\d+)-")

NewShard = tuple[Split, int, np.ndarray]
"""Split, index and rows of a shard to write."""


@dataclass(frozen=True)
class Earlier:
    """The result of an earlier prepare."""

    manifest: Manifest
    shards: list[tuple[Split, Shard, pa.LargeStringArray]]
    """Split, facts and keys of each shard that is complete."""


@dataclass(frozen=True)
class Plan:
    """The split and shard of each good row."""

    members: dict[Split, np.ndarray]
    """Rows of each split, in an order that depends only on seed and key."""
    cuts: Cuts | None
    note: str
    """Short description of how the splits were made."""
    kept: dict[Split, list[Shard]]
    """Existing shards that are kept."""
    new: list[NewShard]
    """Shards to write."""


def read_earlier(output: Folder) -> Earlier | None:
    """Return the result of an earlier prepare in a folder, or None.

    Raises:
        JobError: If its manifest cannot be read.
    """
    if not output.exists(MANIFEST):
        return None
    try:
        earlier = read_manifest(output)
    except JobError as error:
        raise JobError(
            f"{error}\nThe rows of this manifest must keep their splits; set another "
            "prepare.output, or delete this folder to make new splits"
        ) from error

    def read_keys(item: tuple[Split, Shard]) -> tuple[Split, Shard, pa.LargeStringArray] | None:
        split, shard = item
        if not output.has_file(shard.path, shard.num_bytes):
            return None
        with output.filesystem.open_input_file(output.locate(shard.path)) as stream:
            keys = pq.ParquetFile(stream).read(columns=[KEY]).column(KEY)
        return split, shard, keys.cast(TEXT).combine_chunks()

    shards = [(split, shard) for split, info in earlier.splits.items() for shard in info.shards]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        return Earlier(earlier, [shard for shard in threads.map(read_keys, shards) if shard])


def make_plan(
    rows: CheckedRows,
    spec: RunSpec,
    classes: Classes,
    writer: ShardWriter,
    earlier: Earlier | None,
) -> Plan:
    """Plan the split and shard of the good rows; the writer's fingerprints show changed shards.

    Raises:
        JobError: If there are no training rows, a split that is cut would lack a class, or a group
            would be in two splits or folds.
    """
    good = np.flatnonzero(rows.good)
    earlier_rows = _find_earlier_rows(rows, earlier)
    hashes = split_hashes(spec.run.seed, rows.keys.take(pa.array(good)))
    splits, cuts, note = _split(rows, good, hashes, spec, classes, earlier_rows, earlier)
    if rows.splits_note and (num_shared := _count_shared(rows, good, splits)):
        note += f"; {count_text(num_shared, 'row')} with an image of another split"
    split_of = np.full(len(rows), -1, np.int8)
    split_of[good] = splits
    good = good[np.argsort(hashes, kind="stable")]
    del hashes
    members: dict[Split, np.ndarray] = {
        split: good[split_of[good] == i] for i, split in enumerate(SPLITS)
    }
    unchanged: dict[Split, list[tuple[Shard, np.ndarray]]] = {split: [] for split in SPLITS}
    earlier_shards = earlier.shards if earlier else []
    for (split, shard, _), chosen in zip(earlier_shards, earlier_rows, strict=True):
        if (chosen < 0).any() or (split_of[chosen] != SPLITS.index(split)).any():
            continue
        if writer.fingerprint(split, rows.take(chosen)) == shard.rows_sha256:
            unchanged[split].append((shard, chosen))
    kept: dict[Split, list[Shard]] = {}
    is_kept = np.zeros(len(rows), bool)
    new: list[NewShard] = []
    in_containers = any(refs.in_containers for refs in rows.images)
    for split, chosen in members.items():
        keep = _without_mergeable(unchanged[split], len(chosen), writer.rows_per_shard)
        kept[split] = [shard for shard, _ in keep]
        for _, kept_rows in keep:
            is_kept[kept_rows] = True
        chosen = chosen[~is_kept[chosen]]
        if in_containers:
            chosen = chosen[_container_order([refs.take(chosen) for refs in rows.images])]
        indices = (_INDEX.search(shard.path) for shard in kept[split])
        first = max((int(match[1]) + 1 for match in indices if match), default=0)
        for index, start in enumerate(range(0, len(chosen), writer.rows_per_shard), first):
            new.append((split, index, chosen[start : start + writer.rows_per_shard]))
    return Plan(members, cuts, note, kept, new)


def _without_mergeable(
    shards: list[tuple[Shard, np.ndarray]], num_rows: int, rows_per_shard: int
) -> list[tuple[Shard, np.ndarray]]:
    """Return the unchanged shards of a split that are kept, given the number of all its rows."""
    num_new = num_rows - sum(shard.num_rows for shard, _ in shards)
    large = [item for item in shards if 2 * item[0].num_rows >= rows_per_shard]
    num_merged = num_rows - sum(shard.num_rows for shard, _ in large)
    num_small = len(shards) - len(large)
    fewer = -(-num_merged // rows_per_shard) < -(-num_new // rows_per_shard) + num_small
    return large if num_new and fewer else shards


def _split(
    rows: CheckedRows,
    good: np.ndarray,
    hashes: np.ndarray,
    spec: RunSpec,
    classes: Classes,
    earlier_rows: list[np.ndarray],
    earlier: Earlier | None,
) -> tuple[np.ndarray, Cuts | None, str]:
    """Return the split of each good row, the cuts, and a note on how the splits were made."""
    options, seed = spec.prepare, spec.run.seed
    names = (rows.keys if rows.groups is None else rows.groups).take(pa.array(good))
    splits = rows.splits[good].copy()
    if options.group_column:
        _require_whole_groups(names, splits, SPLITS, rows.splits_note, options)
        if rows.folds is not None:
            folds = rows.folds.take(pa.array(good)).dictionary_encode()
            values, words = folds.indices.to_numpy(), folds.dictionary.to_pylist()
            source = f"from the column {options.fold_column}"
            _require_whole_groups(names, values, words, source, options)
    wanted = [split for split in (VALIDATION, TEST) if not (splits == split).any()]
    context, noun = "", "usable "
    if given := rows.splits_note:
        if not wanted:
            return splits, None, given
        if (splits > TRAIN).all():
            raise JobError(
                f"there are no training rows (splits {given}); mark some as train, or prepare "
                "without these splits"
            )
        cut = " and ".join(SPLITS[split] for split in wanted)
        context, noun = f"{given}; {cut} cut from train ", "training "
    to_cut = np.flatnonzero(splits <= TRAIN)
    good, names = good[to_cut], names.take(pa.array(to_cut))
    joined, name_hashes = "", None
    noun += f"{options.group_column} group" if options.group_column else "row"
    if not options.group_column:
        by_image = join_by_image(names, [refs.take(good) for refs in rows.images])
        num_joined = pc.sum(pc.not_equal(by_image, names)).as_py()
        if num_joined:
            joined = f"; {count_text(num_joined, 'row')} grouped by a shared image"
            noun = noun.replace("row", "image")
        # Each name is the key of some row.
        name_hashes = hashes[to_cut][pc.index_in(by_image, value_set=names).to_numpy()]
        names = by_image
    groups = Groups.of(names, rows.labels[good], seed, name_hashes)
    if earlier and _splits_alike(earlier.manifest, spec, classes, wanted):
        earlier_split = np.full(len(rows), -1, np.int8)
        for (split, _, _), chosen in zip(earlier.shards, earlier_rows, strict=True):
            if SPLITS.index(split) in (TRAIN, *wanted):
                earlier_split[chosen[chosen >= 0]] = SPLITS.index(split)
        cuts = earlier.manifest.cuts or ()
        note = f"{context}by the cuts of the existing manifest, so no row has moved{joined}"
        splits[to_cut] = assign(groups, cuts, earlier_split[good])
        return splits, cuts, note
    validation_fraction = options.validation_fraction if VALIDATION in wanted else 0
    test_fraction = options.test_fraction if TEST in wanted else 0
    cuts = make_cuts(groups, validation_fraction, test_fraction, noun)
    note = f"{context}by hash of {options.group_column or options.key_column}, seed {seed}{joined}"
    if earlier:
        note += "; the existing manifest was split by another rule"
    splits[to_cut] = assign(groups, cuts)
    return splits, cuts, note


def _count_shared(rows: CheckedRows, good: np.ndarray, splits: np.ndarray) -> int:
    """Return the number of rows that share an image with a row of another split."""
    keys = rows.keys.take(pa.array(good))
    joined = join_by_image(keys, [refs.take(good) for refs in rows.images])
    group = joined.dictionary_encode().indices.to_numpy()
    # Rows of each group in each split.
    counts = np.zeros((group.max(initial=-1) + 1, len(SPLITS)), np.int64)
    np.add.at(counts, (group, splits), 1)
    is_shared = (counts > 0).sum(axis=1) > 1
    return int(counts[is_shared].sum())


def _find_earlier_rows(rows: CheckedRows, earlier: Earlier | None) -> list[np.ndarray]:
    """Return the rows of each earlier shard, -1 for a row that is gone or no longer usable."""
    if not earlier or not earlier.shards:
        return []
    keys = pa.concat_arrays([keys for _, _, keys in earlier.shards])
    indices = pc.index_in(keys, value_set=rows.keys).fill_null(-1).to_numpy().astype(np.int64)
    indices[~rows.good[indices]] = -1
    return np.split(indices, np.cumsum([len(keys) for _, _, keys in earlier.shards])[:-1])


def _splits_alike(
    earlier: Manifest, spec: RunSpec, classes: Classes, wanted: Sequence[int]
) -> bool:
    """Return whether an earlier prepare cut the same splits by the same rule, so its cuts apply."""
    same = ("key_column", "label_column", "group_column", "validation_fraction", "test_fraction")
    same += ("split_column", "split_keys")
    return (
        cut_splits(earlier.cuts or ()) == list(wanted)
        and earlier.seed == spec.run.seed
        and (earlier.negative_label, earlier.positive_label) == (classes.negative, classes.positive)
        and all(getattr(earlier.prepare, name) == getattr(spec.prepare, name) for name in same)
    )


def _require_whole_groups(
    groups: pa.LargeStringArray,
    values: np.ndarray,
    names: Sequence[str],
    source: str,
    options: PrepareSpec,
) -> None:
    """Check that each group has one split or fold, given as an index in names."""
    value_of_group = values[first_rows(groups, groups)]
    for row in np.flatnonzero(value_of_group != values)[:1].tolist():
        both = f"{names[int(value_of_group[row])]} and {names[int(values[row])]}"
        raise JobError(
            f"{options.group_column} {groups[row].as_py()!r} has rows in both {both} ({source}), "
            "but a group belongs to one split or fold; correct these rows, or leave "
            "prepare.group_column out"
        )


def _container_order(images: list[ImageRefs]) -> np.ndarray:
    """Return the order of rows that reads the containers of their images sequentially."""
    paths = pc.coalesce(*(refs.path for refs in images), pa.scalar("", TEXT)).dictionary_encode()
    rank = pc.rank(paths.dictionary, tiebreaker="first").to_numpy().astype(np.int64)
    start = np.zeros(len(paths), np.int64)
    for refs in reversed(images):
        if refs.start is not None:
            start = np.where(refs.has_image, refs.start, start)
    return np.lexsort((start, rank[paths.indices.to_numpy()]))
