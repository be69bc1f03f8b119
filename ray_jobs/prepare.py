"""Turn raw images and a table into shards with a manifest.

Reads: a folder, glob or URI of images, and a CSV or Parquet table with one row a thing.
Writes: train/, validation/ and test/ with Parquet shards, quarantine/ with the rows that cannot be
used, and manifest.json, written last.
Run:   python -m ray_jobs.prepare ray_jobs/specs/houses.yaml --prepare.output prepared

The driver reads the table, decides which rows are good and in which split each stands; Ray Data
tasks read and convert the images, one shard each, and answer with a few facts.
"""

import pickle
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mm_model.statistics import NumericStatistics, fit_numeric_statistics
from ray_jobs import cli, cluster, manifest
from ray_jobs.batch import KEY
from ray_jobs.cli import JobError
from ray_jobs.manifest import ImageInfo, Manifest, SplitInfo, read_manifest, require_shards
from ray_jobs.shards import ShardFacts, ShardRows, write_shard
from ray_jobs.sources.folder import ImageSource
from ray_jobs.spec import SPLITS, PrepareSpec, RunSpec, Split
from ray_jobs.splits import Cuts, assign, make_cuts, split_hash
from ray_jobs.storage import Folder
from ray_jobs.table import (
    Classes,
    Rows,
    find_classes,
    find_numeric_columns,
    read_rows,
    read_table,
    require_columns,
)

QUARANTINE = "quarantine/part-00000.parquet"


@dataclass(frozen=True)
class _Plan:
    """In which split each good row stands, and in which order."""

    members: dict[Split, list[int]]
    """Rows of each split; their order is a function of seed and key alone."""
    cuts: Cuts | None
    note: str
    """How the splits came about, in a sentence."""


def prepare(spec: RunSpec) -> Manifest:
    """Write the prepared folder and return its manifest.

    Raises:
        JobError: if table or images are not what the spec says, more than `max_bad_fraction` of
            the rows cannot be used (they are in quarantine/ then, and there is no new manifest),
            or a split would lack a class.
    """
    options = spec.prepare
    output = Folder(options.output)
    earlier = _earlier(output)
    table = read_table(options.table)
    require_columns(table, options)
    numeric_columns = find_numeric_columns(table, options)
    classes = find_classes(table.column(options.label_column), options)
    source = ImageSource(options.images)
    rows = read_rows(table, options, numeric_columns, classes)
    rows.find_images(source)
    _require_few_bad(rows, output, options)
    plan = _plan(rows, spec, classes, output, earlier)
    _require_both_classes(rows, plan)

    with cluster.connected(spec.run.address, num_cpus=1, worker_logs=spec.run.worker_logs):
        facts = sorted(
            _write_shards(rows, plan, options, source.folder, output, numeric_columns),
            key=lambda f: f.index,
        )
    _set_aside(rows, plan, facts)
    try:
        _require_few_bad(rows, output, options)
        _require_both_classes(rows, plan)
    except JobError:
        _remove_shards(output, keep=earlier.splits if earlier else {})
        raise
    result = Manifest(
        prepare=options,
        seed=spec.run.seed,
        image=ImageInfo(height=options.image_size, width=options.image_size),
        numeric_columns=numeric_columns,
        negative_label=classes.negative,
        positive_label=classes.positive,
        splits={split: _split_info(rows, plan, facts, split) for split in SPLITS},
        cuts=plan.cuts,
        statistics=_statistics(rows, plan, numeric_columns),
        quarantine=_reasons(rows),
    )
    require_shards(output, result)
    result.write(output)
    _remove_shards(output, keep=result.splits)
    _print_summary(result, plan, output)
    return result


def main() -> None:
    """Run the job from the command line."""
    cli.main(RunSpec, prepare, __doc__)


def _plan(
    rows: Rows, spec: RunSpec, classes: Classes, output: Folder, earlier: Manifest | None
) -> _Plan:
    options, seed = spec.prepare, spec.run.seed
    good = [row for row, reason in enumerate(rows.reasons) if reason is None]
    groups, labels = [rows.groups[row] for row in good], [rows.labels[row] for row in good]
    cuts: Cuts | None = None
    note = f"as {options.split_column} says"
    splits: Sequence[Split | None]
    if options.split_column:
        splits = [rows.splits[row] for row in good]
        _require_whole_groups(groups, splits, options)
    else:
        before: dict[str, set[Split]] = {}
        if earlier and earlier.cuts and _splits_alike(earlier, spec, classes):
            cuts, note = earlier.cuts, "cut as in the manifest before, so that no row has moved"
            before = _groups_before(rows, good, _earlier_splits(output, earlier))
        else:
            fractions = options.validation_fraction, options.test_fraction
            cuts = make_cuts(groups, labels, seed, *fractions)
            note = f"by hash of {options.group_column or options.key_column}, seed {seed}"
            if earlier:
                note += "; the rows before were split by another rule"
        splits = assign(groups, labels, seed, cuts, before)
    members: dict[Split, list[int]] = {split: [] for split in SPLITS}
    for row, split in zip(good, splits, strict=True):
        members[split or "train"].append(row)
    for positions in members.values():
        positions.sort(key=lambda row: split_hash(seed, rows.keys[row] or ""))
    return _Plan(members, cuts, note)


def _earlier(output: Folder) -> Manifest | None:
    """Return the manifest that an earlier prepare left in the folder."""
    if not output.exists(manifest.NAME):
        return None
    try:
        return read_manifest(output)
    except JobError as error:
        raise JobError(
            f"{error}\nRows that it names keep their splits: give another prepare.output, or "
            "delete this one to split anew"
        ) from error


def _splits_alike(earlier: Manifest, spec: RunSpec, classes: Classes) -> bool:
    """Whether an earlier prepare split by the same rule, so that its cuts mean the same here."""
    same = ("key_column", "label_column", "group_column", "validation_fraction", "test_fraction")
    return (
        earlier.seed == spec.run.seed
        and (earlier.negative_label, earlier.positive_label) == (classes.negative, classes.positive)
        and all(getattr(earlier.prepare, name) == getattr(spec.prepare, name) for name in same)
    )


def _earlier_splits(output: Folder, earlier: Manifest) -> dict[str, Split]:
    """Return the split in which each key stands in the earlier shards."""
    splits: dict[str, Split] = {}
    for split, info in earlier.splits.items():
        for shard in info.shards:
            with output.filesystem.open_input_file(output.locate(shard.path)) as stream:
                keys = pq.ParquetFile(stream).read(columns=[KEY]).column(KEY)
            splits.update(dict.fromkeys(keys.to_pylist(), split))
    return splits


def _groups_before(
    rows: Rows, good: Sequence[int], stood: Mapping[str, Split]
) -> dict[str, set[Split]]:
    before: dict[str, set[Split]] = defaultdict(set)
    for row in good:
        if (split := stood.get(rows.keys[row] or "")) is not None:
            before[rows.groups[row]].add(split)
    return before


def _write_shards(
    rows: Rows,
    plan: _Plan,
    options: PrepareSpec,
    images: Folder,
    output: Folder,
    numeric_columns: Sequence[str],
) -> Iterator[ShardFacts]:
    """Yield the facts of each shard when it is written, in whatever order."""
    import ray.data
    from ray.exceptions import RayError
    from rich.progress import track

    items = [{"rows": pickle.dumps(shard)} for shard in _shards(rows, plan, options)]

    def write(item: dict[str, Any]) -> dict[str, Any]:
        shard: ShardRows = pickle.loads(item["rows"])
        try:
            facts = write_shard(shard, images, output, numeric_columns, options)
        except OSError as error:
            return {"facts": "", "error": str(error)}
        return {"facts": facts.model_dump_json(), "error": ""}

    # One block, and so one task, a shard.
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(write, num_cpus=1)
    try:
        for answer in track(
            dataset.iter_rows(),
            description="Writing shards",
            total=len(items),
            disable=not sys.stdout.isatty(),
            transient=True,
        ):
            if answer["error"]:
                raise JobError(f"{output} could not be written: {answer['error']}")
            yield ShardFacts.model_validate_json(answer["facts"])
    except RayError as error:
        raise JobError(
            f"a process of the job failed ({type(error).__name__}); --run.worker_logs true shows "
            "its log"
        ) from error


def _shards(rows: Rows, plan: _Plan, options: PrepareSpec) -> Iterator[ShardRows]:
    step = options.rows_per_shard
    for split, members in plan.members.items():
        for index, start in enumerate(range(0, len(members), step)):
            chosen = members[start : start + step]
            yield ShardRows(
                split=split,
                index=index,
                keys=[rows.keys[row] or "" for row in chosen],
                image_paths=[rows.image_paths[row] for row in chosen],
                numeric_RF=rows.numeric_RF[chosen],
                labels=[rows.labels[row] for row in chosen],
            )


def _set_aside(rows: Rows, plan: _Plan, facts: Sequence[ShardFacts]) -> None:
    """Note the rows whose images turned out bad."""
    row_of = {rows.keys[row]: row for members in plan.members.values() for row in members}
    for bad in (bad for shard in facts for bad in shard.bad_rows):
        rows.set_aside(row_of[bad.key], bad.reason, bad.detail)


def _require_few_bad(rows: Rows, output: Folder, options: PrepareSpec) -> None:
    """Write the rows set aside into quarantine, and check that they are few."""
    bad = [row for row, reason in enumerate(rows.reasons) if reason is not None]
    columns = {
        "key": [rows.keys[row] for row in bad],
        "reason": [rows.reasons[row] for row in bad],
        "detail": [rows.details[row] for row in bad],
    }
    schema = pa.schema([(name, pa.string()) for name in columns])
    stream = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=schema), stream)
    output.write_bytes(QUARANTINE, stream.getvalue().to_pybytes())
    if len(bad) > options.max_bad_fraction * len(rows.keys):
        counted = ", ".join(f"{reason} {n}" for reason, n in _reasons(rows).items())
        raise JobError(
            f"{len(bad)} of {len(rows.keys)} rows ({len(bad) / len(rows.keys):.1%}) cannot be "
            f"used, more than prepare.max_bad_fraction={options.max_bad_fraction:g} allows: "
            f"{counted}. The first: {_named(rows, bad[0])}. All of them are in "
            f"{output}/{QUARANTINE}; mend them, or raise prepare.max_bad_fraction"
        )


def _named(rows: Rows, row: int) -> str:
    key = rows.keys[row]
    return rows.details[row] if key is None else f"{key!r}, {rows.details[row]}"


def _reasons(rows: Rows) -> dict[str, int]:
    return dict(sorted(Counter(reason for reason in rows.reasons if reason).items()))


def _class_counts(rows: Rows, plan: _Plan, split: Split) -> tuple[int, int]:
    labels = Counter(rows.labels[row] for row in _good(rows, plan, split))
    return labels[0], labels[1]


def _good(rows: Rows, plan: _Plan, split: Split) -> list[int]:
    return [row for row in plan.members[split] if rows.reasons[row] is None]


def _require_both_classes(rows: Rows, plan: _Plan) -> None:
    for split in SPLITS:
        counts = _class_counts(rows, plan, split)
        if not all(counts):
            raise JobError(
                f"the {split} split would hold {counts[0]} rows of class 0 and {counts[1]} of "
                f"class 1 (splits {plan.note}); it needs both: add rows, change "
                "prepare.validation_fraction or test_fraction, or take another run.seed"
            )


def _require_whole_groups(
    groups: Sequence[str], splits: Sequence[Split | None], options: PrepareSpec
) -> None:
    first: dict[str, Split | None] = {}
    for group, split in zip(groups, splits, strict=True):
        if first.setdefault(group, split) != split:
            raise JobError(
                f"{options.group_column} {group!r} has rows in both {first[group]} and {split}, "
                f"as {options.split_column} says; a group belongs to one split: correct the "
                "column, or leave prepare.group_column out"
            )


def _split_info(rows: Rows, plan: _Plan, facts: Sequence[ShardFacts], split: Split) -> SplitInfo:
    counts = _class_counts(rows, plan, split)
    shards = tuple(f.shard for f in facts if f.split == split and f.shard)
    return SplitInfo(num_rows=sum(counts), class_counts=counts, shards=shards)


def _statistics(
    rows: Rows, plan: _Plan, numeric_columns: tuple[str, ...]
) -> NumericStatistics | None:
    if not numeric_columns:
        return None
    return fit_numeric_statistics(rows.numeric_RF[_good(rows, plan, "train")], numeric_columns)


def _remove_shards(output: Folder, keep: Mapping[Split, SplitInfo]) -> None:
    """Remove the shards that no manifest names: an earlier prepare's, or a failed one's."""
    named = {shard.path for info in keep.values() for shard in info.shards}
    for split in SPLITS:
        for name in list(output.names(split)):
            path = PurePosixPath(name)
            if path.match("part-*.parquet") and name not in named:
                output.delete(name)


def _print_summary(result: Manifest, plan: _Plan, output: Folder) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("split")
    for label in (result.negative_label, result.positive_label):
        table.add_column(label, justify="right")
    for name in ("rows", "shards", "MB"):
        table.add_column(name, justify="right")
    for split, info in result.splits.items():
        megabytes = sum(shard.num_bytes for shard in info.shards) / 1e6
        cells = (*info.class_counts, info.num_rows, len(info.shards), f"{megabytes:.1f}")
        table.add_row(split, *map(str, cells))
    console = Console(highlight=False)
    console.print(f"Prepared {output}", soft_wrap=True, markup=False)
    console.print(table)
    console.print(f"splits: {plan.note}", soft_wrap=True, markup=False)
    numbers = ", ".join(result.numeric_columns) or "none"
    console.print(f"numeric columns: {numbers}", soft_wrap=True, markup=False)
    if result.quarantine:
        counted = ", ".join(f"{reason} {n}" for reason, n in result.quarantine.items())
        console.print(
            f"quarantine: {counted} ({output}/{QUARANTINE})", soft_wrap=True, markup=False
        )


if __name__ == "__main__":
    main()
