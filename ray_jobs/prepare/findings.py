"""Writes the quarantine, and makes the findings that `prepare`, `inspect` and `doctor` share."""

# pyright: reportAttributeAccessIssue=false

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.checks.finding import Finding, error, ok, warning
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.config.text import count_text, names_text
from ray_jobs.data.images import BadImage
from ray_jobs.data.manifest import Column, Manifest
from ray_jobs.prepare.cell_text import TEXT
from ray_jobs.prepare.columns import BY_SETTING, proposed_flags
from ray_jobs.prepare.row_validation import CheckedRows
from ray_jobs.prepare.shards.shard_writer import ShardFacts, ShardWriter
from ray_jobs.prepare.sources.source_files import map_in_threads
from ray_jobs.storage.folder import Folder

QUARANTINE = "quarantine/part-00000.parquet"
_UNLABELLED = "unlabelled"
_OF_IMAGES = ("no_record", "duplicate_image")
"""Reasons that count images without a row."""
_MAX_RAISED_FRACTION = 0.2
"""With a larger fraction of bad rows, a setting is wrong rather than the rows."""
_SAMPLE_ROWS = 64
_ROWS_PER_THREAD = 8
_REMEDIES = {
    "missing_key": "set prepare.key_column to a column without empty cells",
    "duplicate_key": "set prepare.key_column to a column whose values are unique",
    "missing_label": "set prepare.label_column to another column, or add --prepare.unlabelled '' "
    "to skip these rows",
    "bad_label": "name the labels of the positive class in prepare.positive_label, and those "
    "without a meaning in prepare.unlabelled",
    "missing_image": "check prepare.images, and prepare.image_pattern or prepare.image_column",
    "ambiguous_image": "give prepare.images or the image paths more precisely",
    "image_outside_folder": "set prepare.images to a folder that contains all images",
    "unreadable_image": "replace these files",
    "animated_image": "extract one frame of each of these files",
    "too_large_image": "shrink these images, or raise prepare.max_image_pixels",
    "non_numeric_text": "set prepare.number_rules for their columns, or name them in "
    "prepare.exclude_columns",
    "non_finite_number": "correct these cells, or name their columns in prepare.exclude_columns",
    "bad_split": "correct prepare.split_column",
    "missing_group": "fill prepare.group_column",
    "no_record": "add their rows to prepare.table",
}


def check_quarantine(rows: CheckedRows, options: PrepareSpec, output: Folder) -> None:
    """Write the quarantine, and check that not too many rows are bad.

    Raises:
        JobError: If more than `max_bad_fraction` of the rows are bad.
    """
    _write_quarantine(rows, output)
    bad, num_rows = bad_rows(rows)
    if len(bad) <= options.max_bad_fraction * num_rows:
        return
    counts = Counter(rows.quarantined[row][0] for row in bad)
    ((reason, most),) = counts.most_common(1)
    remedy = _remedy_of(reason)
    if most < len(bad) or len(bad) < _MAX_RAISED_FRACTION * num_rows:
        remedy += ", or raise prepare.max_bad_fraction to continue without them"
    raise JobError(
        f"{len(bad):,} of {count_text(num_rows, 'row')} ({len(bad) / num_rows:.1%}) cannot be "
        f"used, more than prepare.max_bad_fraction={options.max_bad_fraction:g} allows: "
        f"{format_counts(counts)}. The first: {describe_row(rows, bad[0])}. All of them are in "
        f"{output}/{QUARANTINE}; {remedy}"
    )


def quarantine_bad_images(rows: CheckedRows, facts: Sequence[ShardFacts]) -> None:
    """Quarantine the rows whose images could not be used when their shards were written."""
    found = [bad for shard in facts for bad in shard.bad_rows]
    keys = pa.array([bad.key for bad in found], TEXT)
    indices = pc.index_in(keys, value_set=rows.keys).to_pylist()
    for row, bad in zip(indices, found, strict=True):
        rows.quarantine(row, bad.reason, bad.detail)


def bad_rows(rows: CheckedRows) -> tuple[list[int], int]:
    """Return the quarantined rows in order, and the number of all rows, without unlabelled ones."""
    bad = sorted(row for row, (reason, _) in rows.quarantined.items() if reason != _UNLABELLED)
    return bad, len(rows) - len(rows.quarantined) + len(bad)


def describe_row(rows: CheckedRows, row: int) -> str:
    """Return the key of a quarantined row, and what is wrong with it."""
    key, (_, detail) = rows.keys[row].as_py(), rows.quarantined[row]
    return detail if key is None else f"{key!r}, {detail}"


def format_counts(counts: Mapping[str, int]) -> str:
    """Return the number of rows by reason as text."""
    return ", ".join(f"{reason} {n:,}" for reason, n in sorted(counts.items()))


def count_reasons(rows: CheckedRows) -> dict[str, int]:
    """Return the number of excluded rows, and of images without a row, by reason."""
    counts = Counter(reason for reason, _ in rows.quarantined.values())
    counts.update(reason for _, reason, _ in rows.unmatched)
    return dict(sorted(counts.items()))


def row_findings(
    counts: Mapping[str, int],
    num_rows: int,
    examples: Mapping[str, str] | None = None,
    *,
    is_error: bool = False,
) -> Iterator[Finding]:
    """Yield a finding for each reason of the quarantine, the most frequent first.

    Args:
        counts: Number of excluded rows by reason.
        num_rows: Number of all rows.
        examples: An excluded row by reason.
        is_error: Whether there are too many such rows.
    """
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        if reason != _UNLABELLED:
            example = (examples or {}).get(reason)
            text = f"{reason}: {count:,} of {count_text(num_rows, 'row')}"
            if reason in _OF_IMAGES:
                text = f"{reason}: {count_text(count, 'image')}"
            yield (error if is_error else warning)(
                "rows", f"{text}, such as {example}" if example else text, _remedy_of(reason)
            )


def stored_findings(manifest: Manifest) -> Iterator[Finding]:
    """Yield what `prepare` found out about the columns and rows of a prepared folder."""
    num_rows = sum(info.num_rows for info in manifest.splits.values())
    no_rows = (_UNLABELLED, *_OF_IMAGES)
    num_rows += sum(n for reason, n in manifest.quarantine.items() if reason not in no_rows)
    yield from _column_findings(manifest.columns)
    yield from row_findings(manifest.quarantine, num_rows)


def sample_images(rows: CheckedRows, writer: ShardWriter) -> tuple[list[Finding], str]:
    """Read images of up to 64 rows, evenly spread.

    Returns:
        A finding for each kind of problem, and how many rows have no image and are kept.
    """
    chosen = rows.sample(_SAMPLE_ROWS)
    chunks = [chosen[i : i + _ROWS_PER_THREAD] for i in range(0, len(chosen), _ROWS_PER_THREAD)]
    converted = map_in_threads(lambda chunk: list(writer.convert_images(rows.take(chunk))), chunks)
    bad: dict[str, list[str]] = {}
    num_without = 0
    for images in (images for chunk in converted for images in chunk):
        if isinstance(images, BadImage):
            bad.setdefault(images.reason, []).append(images.detail)
        else:
            num_without += not any(images)
    findings = []
    for reason, details in bad.items():
        text = f"{reason}: {len(details)} in a sample of {count_text(len(chosen), 'row')}"
        # A few bad images in a small sample may be fewer than prepare.max_bad_fraction in all.
        kind = error if 2 * len(details) > len(chosen) else warning
        findings.append(kind("images", f"{text}, such as {details[0]}", _remedy_of(reason)))
    return findings, f"{num_without:,} in a sample of {count_text(len(chosen), 'row')}"


def _column_findings(columns: Sequence[Column]) -> Iterator[Finding]:
    """Yield a finding on the columns that no setting leaves out."""
    left = [c for c in columns if c.role == "left_out" and c.reason not in BY_SETTING]
    if left:
        named = ", ".join(f"{names_text([c.name])} ({c.reason})" for c in left)
        text = f"{count_text(len(left), 'column')} left out: {named}"
        flags = proposed_flags(left)
        yield (
            warning("columns", text, f"to use them, add {flags}") if flags else ok("columns", text)
        )


def _write_quarantine(rows: CheckedRows, output: Folder) -> None:
    bad = sorted(rows.quarantined)
    keys = rows.keys.take(pa.array(bad, pa.int64())).to_pylist()
    quarantined = [(key, *rows.quarantined[row]) for key, row in zip(keys, bad, strict=True)]
    schema = pa.schema([(name, pa.string()) for name in ("key", "reason", "detail")])
    entries = [dict(zip(schema.names, e, strict=True)) for e in (*quarantined, *rows.unmatched)]
    output.write_parquet(QUARANTINE, pa.Table.from_pylist(entries, schema=schema))


def _remedy_of(reason: str) -> str:
    return _REMEDIES.get(reason, "correct these rows")
