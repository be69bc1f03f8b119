"""Turn raw images and a table into shards with a manifest.

Reads: a table with one row per example, and images, either as single files or inside Parquet, tar
or TFRecord files.
Writes: train/, validation/ and test/ with Parquet shards, quarantine/ with the unusable rows, and
manifest.json, written last.

Run:   python -m ray_jobs.prepare ray_jobs/specs/houses.yaml --prepare.output prepared

The driver reads the table, checks its rows and assigns them to splits and shards. Each Ray task
reads and converts the images of one shard and returns its statistics. A later run keeps the shards
whose rows have not changed; a run that was interrupted resumes when started again.
"""

# pyright: reportAttributeAccessIssue=false

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mm_model.statistics import (
    NumericStatistics,
    Vocabulary,
    fit_numeric_statistics,
    fit_vocabulary,
)
from ray_jobs.cluster import connection
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import SPLITS, PrepareSpec, Split
from ray_jobs.config.spec import RunSpec
from ray_jobs.config.text import count_text
from ray_jobs.data.manifest import Column, Manifest, SplitInfo, require_shards
from ray_jobs.prepare import journal
from ray_jobs.prepare.cell_text import TEXT
from ray_jobs.prepare.columns import describe, find_columns
from ray_jobs.prepare.labels import find_classes
from ray_jobs.prepare.pixel_range import find_pixel_range
from ray_jobs.prepare.row_validation import CheckedRows, read_rows
from ray_jobs.prepare.shard_plan import NewShard, Plan, make_plan, read_earlier
from ray_jobs.prepare.shard_writer import ShardFacts, ShardWriter
from ray_jobs.prepare.sources import open_source
from ray_jobs.storage.folder import Folder

QUARANTINE = "quarantine/part-00000.parquet"

_MAX_RAISED_FRACTION = 0.2
"""With a larger fraction of bad rows, a setting is wrong rather than the rows."""
_REMEDIES = {
    "missing_key": "set prepare.key_column to a column without empty cells",
    "duplicate_key": "set prepare.key_column to a column whose values are unique",
    "missing_label": "set prepare.label_column to another column, or --prepare.unlabelled '' to "
    "skip these rows",
    "bad_label": "name the labels of the positive class in prepare.positive_label, and those "
    "without a meaning in prepare.unlabelled",
    "missing_image": "check prepare.images, and prepare.image_pattern or prepare.image_column",
    "ambiguous_image": "give prepare.images or the image paths more precisely",
    "image_outside_folder": "set prepare.images to a folder that contains all images",
    "unreadable_image": "replace these files",
    "animated_image": "extract one frame of each of these files",
    "too_large_image": "shrink these images, or raise prepare.max_image_pixels",
    "non_numeric_text": "set prepare.number_rules for these columns, or name them in "
    "prepare.exclude_columns",
    "non_finite_number": "correct these cells, or name their columns in prepare.exclude_columns",
    "bad_split": "correct prepare.split_column",
    "missing_group": "fill prepare.group_column",
}
_TASKS_PER_CPU = 2
_CANCEL_TIMEOUT_S = 30.0


def prepare(spec: RunSpec) -> Manifest:
    """Write the prepared folder and return its manifest.

    Raises:
        JobError: If the table or the images do not match the spec, a split would lack a class, or
            more than `max_bad_fraction` of the rows cannot be used. In the last case the rows are
            in quarantine/, and there is no new manifest.
    """
    output, categorical = Folder(spec.prepare.output), spec.data.categorical
    earlier = read_earlier(output)
    if earlier:
        # A value must have the same text as in the rows that are already prepared.
        text_rules = earlier.manifest.prepare.text_rules | spec.prepare.text_rules
        spec = spec.overlay({"prepare.text_rules": text_rules})
    source = open_source(spec.prepare, categorical)
    if source.split_column:
        spec = spec.overlay({"prepare.split_column": source.split_column})
    if source.image_names:
        spec = spec.overlay({"prepare.image_columns": source.image_names})
    options = spec.prepare
    label = source.table.column(options.label_column)
    classes = find_classes(label, options)
    columns = find_columns(source.table, options, categorical, classes.codes_of(label))
    numbers, words = (
        tuple(column.name for column in columns if column.role == role)
        for role in ("number", "category")
    )
    numeric_columns = numbers if options.numeric_columns is None else options.numeric_columns
    categorical = tuple(dict.fromkeys((*categorical, *words)))
    if options.missing_image == "keep" and not (numeric_columns or categorical):
        raise JobError(
            "prepare.missing_image=keep predicts rows without an image from numbers and words, but "
            "there are none; name some in prepare.numeric_columns or data.categorical, or set "
            "prepare.missing_image=quarantine"
        )
    options = options.model_copy(update=_stored_rules(columns, options))
    spec = spec.model_copy(update={"prepare": options})
    rows = read_rows(source, options, numeric_columns, classes, categorical)
    _check_quarantine(rows, options, output)
    readers = tuple(source.readers[name] for name in options.image_columns or ("",))
    pixel_range, pixel_note = find_pixel_range(rows, readers, options, earlier)
    writer = ShardWriter(
        readers=readers,
        output=output,
        numeric_columns=numeric_columns,
        categorical=categorical,
        spec=options,
        pixel_range=pixel_range,
        seed=spec.run.seed,
    )
    notes = source.notes
    # Free the table's cells, which may be large.
    del source
    plan = make_plan(rows, spec, classes, writer, earlier)
    _require_both_classes(rows, plan)

    facts = sorted(_write_new_shards(rows, plan, writer, spec), key=lambda f: f.index)
    _quarantine_bad_images(rows, facts)
    try:
        _check_quarantine(rows, options, output)
        _require_both_classes(rows, plan)
        _require_images(facts, plan, options)
    except JobError:
        _delete_unlisted(output, earlier.manifest.splits if earlier else {})
        raise
    manifest = Manifest(
        prepare=options,
        seed=spec.run.seed,
        image=writer.image,
        columns=columns,
        numeric_columns=numeric_columns,
        vocabularies=_fit_vocabularies(rows, plan),
        negative_label=classes.negative,
        positive_label=classes.positive,
        splits={split: _split_info(rows, plan, facts, split) for split in SPLITS},
        cuts=plan.cuts,
        statistics=_fit_statistics(rows, plan, numeric_columns),
        quarantine=_count_reasons(rows),
    )
    require_shards(output, manifest)
    manifest.write(output)
    _delete_unlisted(output, manifest.splits)
    notes = (*notes, *([pixel_note] if pixel_note else ()), classes.note)
    _print_summary(manifest, notes, plan, output)
    return manifest


def _stored_rules(columns: Sequence[Column], options: PrepareSpec) -> dict[str, dict[str, str]]:
    """Return the rules that later runs and `predict` read the columns by."""
    used = [column for column in columns if column.rule and column.role != "left_out"]
    numbers = {column.name: column.rule for column in used if column.role == "number"}
    texts = {column.name: column.rule for column in used if column.role != "number"}
    return {"number_rules": options.number_rules | numbers, "text_rules": texts}


def _write_new_shards(
    rows: CheckedRows, plan: Plan, writer: ShardWriter, spec: RunSpec
) -> Iterator[ShardFacts]:
    """Yield the facts of each new shard once it is written, in any order."""
    from rich.progress import track

    finished = journal.read_finished(writer.output) if plan.new else {}
    todo = []
    for split, index, chosen in plan.new:
        # Fingerprints take time, so compute them only if there is something to compare with.
        name = journal.entry_name(writer, split, index, rows.take(chosen)) if finished else ""
        if name in finished:
            yield finished[name]
        else:
            todo.append((split, index, chosen))
    if todo:
        with connection.connected(spec.run.address, num_cpus=1, worker_logs=spec.run.worker_logs):
            yield from track(
                _write_shards(rows, todo, writer),
                description="Writing shards",
                total=len(todo),
                disable=not sys.stdout.isatty(),
                transient=True,
            )


def _write_shards(
    rows: CheckedRows, todo: Sequence[NewShard], writer: ShardWriter
) -> Iterator[ShardFacts]:
    """Write shards in Ray tasks, a few at a time, and yield the facts of each as it is written.

    Each task receives only the rows of its shard.
    """
    import ray
    from ray.exceptions import RayError

    task, shared = ray.remote(num_cpus=1)(journal.write_and_record), ray.put(writer)
    pending: list[ray.ObjectRef] = []

    def next_facts() -> ShardFacts:
        ready, pending[:] = ray.wait(pending)
        facts = ray.get(ready[0])
        if isinstance(facts, str):
            raise JobError(
                f"prepare.output={str(writer.output)!r} could not be written: {facts}; check free "
                "space and permissions, and run the same command again to resume"
            )
        return facts

    try:
        for split, index, chosen in todo:
            # Look up the CPUs each time, since a cluster may grow.
            if len(pending) >= _TASKS_PER_CPU * max(ray.cluster_resources().get("CPU", 1), 1):
                yield next_facts()
            pending.append(task.remote(shared, split, index, rows.take(chosen)))
        while pending:
            yield next_facts()
    except RayError as error:
        raise JobError(
            f"a task failed ({type(error).__name__}); set --run.worker_logs true to see its log"
        ) from error
    finally:
        for ref in pending:
            ray.cancel(ref)
        if pending:
            # Otherwise they would keep writing while shards are deleted.
            ray.wait(pending, num_returns=len(pending), timeout=_CANCEL_TIMEOUT_S)


def _quarantine_bad_images(rows: CheckedRows, facts: Sequence[ShardFacts]) -> None:
    bad_rows = [bad for shard in facts for bad in shard.bad_rows]
    keys = pa.array([bad.key for bad in bad_rows], TEXT)
    indices = pc.index_in(keys, value_set=rows.keys).to_pylist()
    for row, bad in zip(indices, bad_rows, strict=True):
        rows.quarantine(row, bad.reason, bad.detail)


def _check_quarantine(rows: CheckedRows, options: PrepareSpec, output: Folder) -> None:
    """Write the quarantine, and check that not too many rows are bad.

    Raises:
        JobError: If more than `max_bad_fraction` of the rows are bad.
    """
    _write_quarantine(rows, output)
    bad = [row for row, (reason, _) in rows.quarantined.items() if reason != "unlabelled"]
    num_rows = len(rows) - len(rows.quarantined) + len(bad)
    if len(bad) <= options.max_bad_fraction * num_rows:
        return
    first = min(bad)
    key, (_, detail) = rows.keys[first].as_py(), rows.quarantined[first]
    counts = Counter(rows.quarantined[row][0] for row in bad)
    ((reason, most),) = counts.most_common(1)
    remedy = _REMEDIES.get(reason, "correct these rows")
    if most < len(bad) or len(bad) < _MAX_RAISED_FRACTION * num_rows:
        remedy += ", or raise prepare.max_bad_fraction to continue without them"
    raise JobError(
        f"{len(bad):,} of {count_text(num_rows, 'row')} ({len(bad) / num_rows:.1%}) cannot be "
        f"used, more than prepare.max_bad_fraction={options.max_bad_fraction:g} allows: "
        f"{_format_counts(counts)}. The first: "
        f"{detail if key is None else f'{key!r}, {detail}'}. All of them are in "
        f"{output}/{QUARANTINE}; {remedy}"
    )


def _write_quarantine(rows: CheckedRows, output: Folder) -> None:
    bad = sorted(rows.quarantined)
    keys = rows.keys.take(pa.array(bad, pa.int64())).to_pylist()
    quarantined = [(key, *rows.quarantined[row]) for key, row in zip(keys, bad, strict=True)]
    schema = pa.schema([(name, pa.string()) for name in ("key", "reason", "detail")])
    entries = [dict(zip(schema.names, e, strict=True)) for e in (*quarantined, *rows.unmatched)]
    stream = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(entries, schema=schema), stream)
    output.write_bytes(QUARANTINE, stream.getvalue().to_pybytes())


def _count_reasons(rows: CheckedRows) -> dict[str, int]:
    counts = Counter(reason for reason, _ in rows.quarantined.values())
    counts.update(reason for _, reason, _ in rows.unmatched)
    return dict(sorted(counts.items()))


def _good(rows: CheckedRows, plan: Plan, split: Split) -> np.ndarray:
    return plan.members[split][rows.good[plan.members[split]]]


def _class_counts(rows: CheckedRows, plan: Plan, split: Split) -> tuple[int, int]:
    counts = np.bincount(rows.labels[_good(rows, plan, split)], minlength=2).tolist()
    return counts[0], counts[1]


def _require_both_classes(rows: CheckedRows, plan: Plan) -> None:
    for split in SPLITS:
        counts = _class_counts(rows, plan, split)
        if not all(counts):
            remedy = (
                f"mark rows of both classes as {split}"
                if rows.splits_note
                else "add such rows, correct those in quarantine, or, if this folder was prepared "
                "before, set another prepare.output to make new splits"
            )
            raise JobError(
                f"the {split} split would have {count_text(counts[0], 'row')} of class 0 and "
                f"{counts[1]:,} of class 1 (splits {plan.note}), but it needs both classes; "
                f"{remedy}"
            )


def _require_images(facts: Sequence[ShardFacts], plan: Plan, options: PrepareSpec) -> None:
    """Check that some row has an image: otherwise, a setting must be wrong."""
    shards = [f.shard for f in facts if f.shard] + [s for kept in plan.kept.values() for s in kept]
    if shards and all(shard.num_without_image == shard.num_rows for shard in shards):
        raise JobError(
            f"no row has an image in prepare.images={options.images!r}; correct it, "
            "prepare.image_pattern or prepare.image_column (prepare.missing_image=keep keeps rows "
            "without one)"
        )


def _split_info(
    rows: CheckedRows, plan: Plan, facts: Sequence[ShardFacts], split: Split
) -> SplitInfo:
    counts = _class_counts(rows, plan, split)
    new = (f.shard for f in facts if f.split == split and f.shard)
    weights = None
    if rows.weights is not None:
        good = _good(rows, plan, split)
        sums = np.bincount(rows.labels[good], rows.weights[good], minlength=2).tolist()
        weights = (sums[0], sums[1])
    return SplitInfo(
        num_rows=sum(counts),
        class_counts=counts,
        class_weights=weights,
        shards=(*plan.kept[split], *new),
    )


def _fit_statistics(
    rows: CheckedRows, plan: Plan, numeric_columns: tuple[str, ...]
) -> NumericStatistics | None:
    if not numeric_columns:
        return None
    return fit_numeric_statistics(rows.numeric_RF[_good(rows, plan, "train")], numeric_columns)


def _fit_vocabularies(rows: CheckedRows, plan: Plan) -> tuple[Vocabulary, ...]:
    chosen = pa.array(_good(rows, plan, "train"))
    return tuple(
        fit_vocabulary((text.as_py() for text in texts.take(chosen)), name)
        for name, texts in rows.categories.items()
    )


def _delete_unlisted(output: Folder, splits: Mapping[Split, SplitInfo]) -> None:
    """Delete the shards that are in no split of the manifest, and the journal."""
    listed = {shard.path for info in splits.values() for shard in info.shards}
    for split in SPLITS:
        for name in list(output.names(split)):
            if PurePosixPath(name).match("part-*.parquet") and name not in listed:
                output.delete(name)
    journal.clear(output)


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {n:,}" for reason, n in sorted(counts.items()))


def _print_summary(manifest: Manifest, notes: Sequence[str], plan: Plan, output: Folder) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("split")
    for label in (manifest.negative_label, manifest.positive_label):
        table.add_column(label, justify="right")
    for name in ("rows", "shards", "new shards", "MB"):
        table.add_column(name, justify="right")
    for split, info in manifest.splits.items():
        megabytes = sum(shard.num_bytes for shard in info.shards) / 1e6
        num_shards = len(info.shards)
        counts = (*info.class_counts, info.num_rows, num_shards, num_shards - len(plan.kept[split]))
        table.add_row(split, *map(str, counts), f"{megabytes:.1f}")
    lines = [*notes, f"splits: {plan.note}", *describe(manifest.columns)]
    if manifest.image.optional:
        counts = [f"{info.num_without_image:,} in {s}" for s, info in manifest.splits.items()]
        lines.append(f"rows without an image, kept: {', '.join(counts)}")
    if (weights := manifest.splits["train"].class_weights) is not None:
        column, rows = manifest.prepare.weight_column, manifest.splits["train"].num_rows
        lines.append(
            f"row weights: column {column}; training weight of {manifest.negative_label} "
            f"{weights[0]:.6g}, of {manifest.positive_label} {weights[1]:.6g}, mean "
            f"{sum(weights) / rows:.6g}"
        )
    if manifest.quarantine:
        lines.append(f"quarantine: {_format_counts(manifest.quarantine)} ({output}/{QUARANTINE})")
    console = Console(highlight=False)
    console.print(f"Prepared {output}", soft_wrap=True, markup=False)
    console.print(table)
    console.print("\n".join(lines), soft_wrap=True, markup=False)
