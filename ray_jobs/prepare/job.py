"""Turn raw images and a table into shards with a manifest.

Reads: a table with one row per example, and images, either as single files or inside Parquet, tar
or TFRecord files.
Writes: train/, validation/ and test/ with Parquet shards, quarantine/ with the unusable rows, and
manifest.json, written last.

Run:   python -m ray_jobs.prepare ray_jobs/specs/houses.yaml --prepare.output prepared

With --prepare.dry_run true, it prints within seconds what the columns are, how the rows would be
split and the first problems, and writes nothing.

The driver reads the table, checks its rows and assigns them to splits and shards. Each Ray task
reads and converts the images of one shard and returns its statistics. A later run keeps the shards
whose rows have not changed; a run that was interrupted resumes when started again.
"""

# pyright: reportAttributeAccessIssue=false

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

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
from ray_jobs.checks.finding import (
    Finding,
    from_message,
    ok,
    print_findings,
    require_no_error,
)
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import SPLITS, PrepareSpec, Split
from ray_jobs.config.spec import RunSpec
from ray_jobs.config.text import count_text
from ray_jobs.data.manifest import Column, Manifest, SplitInfo, require_shards
from ray_jobs.prepare.cell_text import TEXT
from ray_jobs.prepare.columns import describe, find_columns
from ray_jobs.prepare.findings import (
    UNLABELLED,
    count_reasons,
    remedy_of,
    row_findings,
    sample_images,
)
from ray_jobs.prepare.labels import Classes, find_classes
from ray_jobs.prepare.pixel_range import find_pixel_range
from ray_jobs.prepare.row_validation import CheckedRows, read_rows
from ray_jobs.prepare.shard_plan import Earlier, Plan, make_plan, read_earlier
from ray_jobs.prepare.shard_tasks import clear_progress, write_shards
from ray_jobs.prepare.shard_writer import ShardFacts, ShardWriter
from ray_jobs.prepare.sources import open_source
from ray_jobs.prepare.sources.source import ImageReader
from ray_jobs.storage.folder import Folder

if TYPE_CHECKING:
    from rich.table import Table

QUARANTINE = "quarantine/part-00000.parquet"

_MAX_RAISED_FRACTION = 0.2
"""With a larger fraction of bad rows, a setting is wrong rather than the rows."""
_MAX_FINDINGS = 10


@dataclass(frozen=True)
class Inputs:
    """What `prepare` has understood before it reads any image."""

    spec: RunSpec
    """The settings, with those that were found."""
    rows: CheckedRows
    classes: Classes
    columns: tuple[Column, ...]
    numeric_columns: tuple[str, ...]
    readers: tuple[ImageReader, ...]
    """One reader per image name."""
    notes: tuple[str, ...]
    earlier: Earlier | None
    """The result of an earlier prepare in the same folder."""


def prepare(spec: RunSpec) -> Manifest:
    """Write the prepared folder and return its manifest.

    With `prepare.dry_run`, write nothing, print what was understood and the first findings, and
    return the manifest as it would be without new shards.

    Raises:
        JobError: If the table or the images do not match the spec, a split would lack a class, or
            more than `max_bad_fraction` of the rows cannot be used. In the last case the rows are
            in quarantine/, and there is no new manifest.
    """
    inputs = read_inputs(spec)
    if spec.prepare.dry_run:
        return _print_dry_run(inputs)
    spec, rows, earlier = inputs.spec, inputs.rows, inputs.earlier
    output = Folder(spec.prepare.output)
    _check_quarantine(rows, spec.prepare, output)
    writer, notes = _make_writer(inputs)
    plan = _make_plan(inputs, writer)

    facts = sorted(write_shards(rows, plan.new, writer, spec.run), key=lambda f: f.index)
    _quarantine_bad_images(rows, facts)
    try:
        _check_quarantine(rows, spec.prepare, output)
        _require_both_classes(rows, plan)
        _require_images(facts, plan, spec.prepare)
    except JobError:
        _delete_unlisted(output, earlier.manifest.splits if earlier else {})
        raise
    manifest = _make_manifest(inputs, writer, plan, facts)
    require_shards(output, manifest)
    manifest.write(output)
    _delete_unlisted(output, manifest.splits)
    _print_summary(f"Prepared {output}", inputs, notes, (plan, manifest))
    return manifest


def read_inputs(spec: RunSpec) -> Inputs:
    """Read the table, find the images, and decide what the columns and rows are.

    Raises:
        JobError: If the table or the images do not match the spec.
    """
    earlier = read_earlier(Folder(spec.prepare.output))
    if earlier:
        # A value must have the same meaning as in the rows that are already prepared.
        known, own = earlier.manifest.prepare, spec.prepare
        number_rules = dict(own.number_rules)
        for name, rule in own.number_rules.items():
            if (earlier_rule := known.number_rules.get(name, "")).startswith(f"{rule}:"):
                number_rules[name] = earlier_rule
        rules = {"text_rules": known.text_rules | own.text_rules, "number_rules": number_rules}
        spec = spec.overlay({f"prepare.{name}": of_name for name, of_name in rules.items()})
    source = open_source(spec.prepare, spec.data.categorical)
    options = spec.prepare.model_copy(update=dict(source.settings))
    label = source.table.column(options.label_column)
    classes = find_classes(label, options)
    columns = find_columns(source.table, options, spec.data.categorical, classes.codes_of(label))
    numbers, words = (
        tuple(column.name for column in columns if column.role == role)
        for role in ("number", "category")
    )
    numeric_columns = numbers if options.numeric_columns is None else options.numeric_columns
    categorical = tuple(dict.fromkeys((*spec.data.categorical, *words)))
    if options.missing_image == "keep" and not (numeric_columns or categorical):
        raise JobError(
            "prepare.missing_image=keep predicts rows without an image from numbers and words, but "
            "there are none; name some in prepare.numeric_columns or data.categorical, or set "
            "prepare.missing_image=quarantine"
        )
    options = options.model_copy(update=_stored_rules(columns, options))
    has_images = any(refs.has_image.any() for refs in source.images.values())
    if options.missing_image == "keep" and not has_images:
        raise _no_images(options)
    return Inputs(
        spec=spec.model_copy(update={"prepare": options}),
        rows=read_rows(source, options, numeric_columns, classes, categorical),
        classes=classes,
        columns=columns,
        numeric_columns=numeric_columns,
        readers=tuple(source.readers[name] for name in options.image_columns or ("",)),
        notes=(*source.notes, classes.note),
        earlier=earlier,
    )


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run."""

    findings: list[Finding]
    notes: tuple[str, ...]
    planned: "tuple[Plan, Manifest] | JobError"
    """The plan and the manifest without new shards, or why there is none; a finding says the
    same."""


def dry_run(inputs: Inputs) -> DryRun:
    """Read a sample of the images, plan the splits, and return all findings; write nothing."""
    rows = inputs.rows
    bad, num_rows = _bad_rows(rows)
    is_error = len(bad) > inputs.spec.prepare.max_bad_fraction * num_rows
    examples = {rows.quarantined[row][0]: _describe_row(rows, row) for row in reversed(bad)}
    findings = list(row_findings(count_reasons(rows), num_rows, examples, is_error=is_error))
    check, notes = "images", inputs.notes
    if is_error and len(bad) == num_rows:
        return DryRun(findings, notes, JobError(findings[0].sentence))
    try:
        writer, notes = _make_writer(inputs)
        findings += sample_images(rows, writer)
        check = "splits"
        plan = _make_plan(inputs, writer)
    except JobError as failure:
        return DryRun([*findings, from_message(check, str(failure))], notes, failure)
    if inputs.spec.prepare.missing_image == "keep":
        has_image = np.any([refs.has_image for refs in rows.images], axis=0)
        notes = (*notes, f"rows without an image, kept: {(rows.good & ~has_image).sum():,}")
    return DryRun(findings, notes, (plan, _make_manifest(inputs, writer, plan, [])))


def _print_dry_run(inputs: Inputs) -> Manifest:
    """Print the result of a dry run, and return its manifest.

    Raises:
        JobError: If a finding is an error.
    """
    result = dry_run(inputs)
    planned = None if isinstance(result.planned, JobError) else result.planned
    _print_summary("Dry run, nothing was written", inputs, result.notes, planned)
    print_findings(result.findings[:_MAX_FINDINGS] or [ok("findings", "none")])
    require_no_error(result.findings)
    if isinstance(result.planned, JobError):
        raise result.planned
    return result.planned[1]


def _make_writer(inputs: Inputs) -> tuple[ShardWriter, tuple[str, ...]]:
    """Return the writer of the shards, and all notes for the summary."""
    options, rows = inputs.spec.prepare, inputs.rows
    pixel_range, note = find_pixel_range(rows, inputs.readers, options, inputs.earlier)
    writer = ShardWriter(
        readers=inputs.readers,
        output=Folder(options.output),
        numeric_columns=inputs.numeric_columns,
        categorical=tuple(rows.categories),
        spec=options,
        pixel_range=pixel_range,
        seed=inputs.spec.run.seed,
    )
    return writer, (*inputs.notes, *([note] if note else ()))


def _make_plan(inputs: Inputs, writer: ShardWriter) -> Plan:
    plan = make_plan(inputs.rows, inputs.spec, inputs.classes, writer, inputs.earlier)
    _require_both_classes(inputs.rows, plan)
    return plan


def _make_manifest(
    inputs: Inputs, writer: ShardWriter, plan: Plan, facts: Sequence[ShardFacts]
) -> Manifest:
    rows = inputs.rows
    return Manifest(
        prepare=writer.spec,
        seed=writer.seed,
        image=writer.image,
        columns=inputs.columns,
        numeric_columns=writer.numeric_columns,
        vocabularies=_fit_vocabularies(rows, plan),
        negative_label=inputs.classes.negative,
        positive_label=inputs.classes.positive,
        splits={split: _split_info(rows, plan, facts, split) for split in SPLITS},
        cuts=plan.cuts,
        statistics=_fit_statistics(rows, plan, writer.numeric_columns),
        quarantine=count_reasons(rows),
    )


def _stored_rules(columns: Sequence[Column], options: PrepareSpec) -> dict[str, dict[str, str]]:
    """Return the rules that later runs and `predict` read the columns by."""
    used = [column for column in columns if column.rule and column.role != "left_out"]
    numbers = {column.name: column.rule for column in used if column.role == "number"}
    texts = {column.name: column.rule for column in used if column.role != "number"}
    return {"number_rules": options.number_rules | numbers, "text_rules": texts}


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
    bad, num_rows = _bad_rows(rows)
    if len(bad) <= options.max_bad_fraction * num_rows:
        return
    counts = Counter(rows.quarantined[row][0] for row in bad)
    ((reason, most),) = counts.most_common(1)
    remedy = remedy_of(reason)
    if most < len(bad) or len(bad) < _MAX_RAISED_FRACTION * num_rows:
        remedy += ", or raise prepare.max_bad_fraction to continue without them"
    raise JobError(
        f"{len(bad):,} of {count_text(num_rows, 'row')} ({len(bad) / num_rows:.1%}) cannot be "
        f"used, more than prepare.max_bad_fraction={options.max_bad_fraction:g} allows: "
        f"{_format_counts(counts)}. The first: {_describe_row(rows, bad[0])}. All of them are in "
        f"{output}/{QUARANTINE}; {remedy}"
    )


def _bad_rows(rows: CheckedRows) -> tuple[list[int], int]:
    """Return the quarantined rows in order, and the number of all rows, without unlabelled ones."""
    bad = sorted(row for row, (reason, _) in rows.quarantined.items() if reason != UNLABELLED)
    return bad, len(rows) - len(rows.quarantined) + len(bad)


def _describe_row(rows: CheckedRows, row: int) -> str:
    key, (_, detail) = rows.keys[row].as_py(), rows.quarantined[row]
    return detail if key is None else f"{key!r}, {detail}"


def _write_quarantine(rows: CheckedRows, output: Folder) -> None:
    bad = sorted(rows.quarantined)
    keys = rows.keys.take(pa.array(bad, pa.int64())).to_pylist()
    quarantined = [(key, *rows.quarantined[row]) for key, row in zip(keys, bad, strict=True)]
    schema = pa.schema([(name, pa.string()) for name in ("key", "reason", "detail")])
    entries = [dict(zip(schema.names, e, strict=True)) for e in (*quarantined, *rows.unmatched)]
    stream = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(entries, schema=schema), stream)
    output.write_bytes(QUARANTINE, stream.getvalue().to_pybytes())


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
        raise _no_images(options)


def _no_images(options: PrepareSpec) -> JobError:
    return JobError(
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
    """Delete the shards that are in no split of the manifest, and the records of finished ones."""
    listed = {shard.path for info in splits.values() for shard in info.shards}
    for split in SPLITS:
        for name in list(output.names(split)):
            if PurePosixPath(name).match("part-*.parquet") and name not in listed:
                output.delete(name)
    clear_progress(output)


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {n:,}" for reason, n in sorted(counts.items()))


def _print_summary(
    title: str, inputs: Inputs, notes: Sequence[str], planned: tuple[Plan, Manifest] | None
) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(title)
    if planned:
        plan, manifest = planned
        console.print(_split_table(manifest, plan))
        notes = (*notes, f"splits: {plan.note}", *_row_notes(manifest))
    console.print("\n".join([*notes, *describe(inputs.columns)]))


def _row_notes(manifest: Manifest) -> Iterator[str]:
    """Yield notes on the weights of rows, and unless in a dry run on images and quarantine."""
    if (weights := manifest.splits["train"].class_weights) is not None:
        column, rows = manifest.prepare.weight_column, manifest.splits["train"].num_rows
        yield (
            f"row weights: column {column}; training weight of {manifest.negative_label} "
            f"{weights[0]:.6g}, of {manifest.positive_label} {weights[1]:.6g}, mean "
            f"{sum(weights) / rows:.6g}"
        )
    if manifest.prepare.dry_run:
        return
    if manifest.image.optional:
        counts = [f"{info.num_without_image:,} in {s}" for s, info in manifest.splits.items()]
        yield f"rows without an image, kept: {', '.join(counts)}"
    if manifest.quarantine:
        counts = _format_counts(manifest.quarantine)
        yield f"quarantine: {counts} ({manifest.prepare.output}/{QUARANTINE})"


def _split_table(manifest: Manifest, plan: Plan) -> "Table":
    from rich.table import Table

    table = Table("split")
    is_dry = manifest.prepare.dry_run
    facts = () if is_dry else ("shards", "new shards", "MB")
    for label in (manifest.negative_label, manifest.positive_label, "rows", *facts):
        table.add_column(label, justify="right")
    for split, info in manifest.splits.items():
        num_shards = len(info.shards)
        megabytes = sum(shard.num_bytes for shard in info.shards) / 1e6
        facts = (str(num_shards), str(num_shards - len(plan.kept[split])), f"{megabytes:.1f}")
        counts = map(str, (*info.class_counts, info.num_rows))
        table.add_row(split, *counts, *(() if is_dry else facts))
    return table
