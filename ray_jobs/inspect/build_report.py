"""Builds the report of prepared data from its shards and manifest."""

import sys
from collections import defaultdict
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from ray_jobs.checks import column_drift
from ray_jobs.config.prepare_spec import SPLITS, Split
from ray_jobs.data.manifest import Manifest
from ray_jobs.inspect import column_statistics
from ray_jobs.inspect.column_statistics import category_statistics, numeric_statistics
from ray_jobs.inspect.data_findings import find_problems
from ray_jobs.inspect.duplicates import FLAT_CONTRAST, NEAR_BITS, find_duplicates, find_shared_keys
from ray_jobs.inspect.report_schema import (
    CategoryColumn,
    ImageColumn,
    ImageFormat,
    ImageRef,
    ImageSummary,
    NumericColumn,
    QuarantinedRow,
    QuarantineReason,
    Report,
    SplitSummary,
)
from ray_jobs.inspect.shard_scan import ScannedSplit, Scans, read_columns, scan_split
from ray_jobs.storage.folder import Folder

_COLUMNS_AT_ONCE = 16
_SHEET_ROWS = 8
_EXAMPLES = 5
_BLACK, _WHITE = 16.0, 239.0


def build_report(folder: Folder, manifest: Manifest, max_rows: int) -> Report:
    """Return the report of prepared data.

    Args:
        folder: Prepared data.
        manifest: Its manifest.
        max_rows: Approximate maximum number of rows to inspect per split.
    """
    scans = _scan(folder, manifest, max_rows)
    image = manifest.image
    report = Report(
        prepared=str(folder),
        class_names=(manifest.negative_label, manifest.positive_label),
        splits={split: _split_summary(manifest, split, scan) for split, scan in scans.items()},
        store=ImageFormat(
            encoding=image.encoding, height=image.height, width=image.width, columns=image.columns
        ),
        numeric=_numeric(folder, manifest, scans),
        categorical=_categorical(folder, manifest, scans),
        images=tuple(_image_column(i, c, scans) for i, c in enumerate(image.columns)),
        duplicates=find_duplicates(scans),
        keys=find_shared_keys(scans),
        quarantine=_quarantine(folder, manifest),
        contact_sheet=_contact_sheet(scans),
        thresholds={
            "psi": column_drift.PSI_THRESHOLD,
            "p_value": column_drift.P_VALUE_THRESHOLD,
            "missing_share": column_drift.MISSING_THRESHOLD,
            "leak_auc": column_statistics.LEAK_THRESHOLD,
            "near_bits": NEAR_BITS,
            "flat_contrast": FLAT_CONTRAST,
            "black_brightness": _BLACK,
            "white_brightness": _WHITE,
        },
    )
    return report.model_copy(update={"findings": find_problems(report, manifest)})


def _scan(folder: Folder, manifest: Manifest, max_rows: int) -> Scans:
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        scans: dict[Split, ScannedSplit] = {}
        for split in SPLITS:
            task = progress.add_task(split, total=manifest.splits[split].num_rows)
            advance = partial(progress.advance, task)
            scans[split] = scan_split(folder, manifest, split, max_rows, advance)
    return scans


def _split_summary(manifest: Manifest, split: Split, scan: ScannedSplit) -> SplitSummary:
    info = manifest.splits[split]
    num_rows = sum(other.num_rows for other in manifest.splits.values())
    return SplitSummary(
        num_rows=info.num_rows,
        class_counts=info.class_counts,
        share=info.num_rows / max(num_rows, 1),
        positive_share=info.class_counts[1] / info.num_rows if info.num_rows else None,
        num_shards=len(info.shards),
        num_bytes=sum(shard.num_bytes for shard in info.shards),
        rows_inspected=len(scan.rows_R),
    )


def _numeric(folder: Folder, manifest: Manifest, scans: Scans) -> tuple[NumericColumn, ...]:
    statistics, names = [], manifest.numeric_columns
    for start in range(0, len(names), _COLUMNS_AT_ONCE):
        chunk = names[start : start + _COLUMNS_AT_ONCE]
        tables: dict[Split, pa.Table] = {
            split: read_columns(folder, manifest.splits[split], chunk, scan.rows_R)
            for split, scan in scans.items()
        }
        for name in chunk:
            values: dict[Split, np.ndarray] = {}
            for split, table in tables.items():
                values[split] = table[name].to_numpy()
            statistics.append(numeric_statistics(name, values, _labels(scans)))
    return tuple(statistics)


def _categorical(folder: Folder, manifest: Manifest, scans: Scans) -> tuple[CategoryColumn, ...]:
    statistics = []
    for vocabulary in manifest.vocabularies:
        codes: dict[Split, np.ndarray] = {}
        for split, scan in scans.items():
            info = manifest.splits[split]
            table = read_columns(folder, info, [vocabulary.column], scan.rows_R)
            codes[split] = vocabulary.codes(text.as_py() for text in table.column(0))
        statistics.append(category_statistics(vocabulary, codes, _labels(scans)))
    return tuple(statistics)


def _labels(scans: Scans) -> dict[Split, np.ndarray]:
    return {split: scan.label_R for split, scan in scans.items()}


def _image_column(i: int, column: str, scans: Scans) -> ImageColumn:
    splits, examples = {}, []
    for split, scan in scans.items():
        brightness, present = scan.brightness_RI[:, i], scan.content_RI[:, i] != 0
        flat = scan.contrast_RI[:, i] < FLAT_CONTRAST
        kinds = {
            "black": flat & (brightness < _BLACK),
            "white": flat & (brightness > _WHITE),
            "flat": flat & (brightness >= _BLACK) & (brightness <= _WHITE),
        }
        splits[split] = ImageSummary(
            num_rows=len(present),
            missing=int((~present).sum()),
            unreadable=int((present & np.isnan(brightness)).sum()),
            **{kind: int(rows.sum()) for kind, rows in kinds.items()},
        )
        for rows in kinds.values():
            examples += [scan.image(r, i) for r in np.flatnonzero(rows)[:_EXAMPLES]]
    brightness, contrast = (
        numeric_statistics(
            f"{column} {name}",
            {split: getattr(scan, f"{name}_RI")[:, i] for split, scan in scans.items()},
            _labels(scans),
        )
        for name in ("brightness", "contrast")
    )
    return ImageColumn(
        column=column,
        splits=splits,
        brightness=brightness,
        contrast=contrast,
        examples=tuple(examples),
    )


def _quarantine(folder: Folder, manifest: Manifest) -> tuple[QuarantineReason, ...]:
    examples: dict[str, list[QuarantinedRow]] = defaultdict(list)
    for name in folder.names("quarantine"):
        with pq.ParquetFile(folder.filesystem.open_input_file(folder.locate(name))) as file:
            for batch in file.iter_batches(columns=["key", "reason", "detail"]):
                for row in batch.to_pylist():
                    rows = examples[row["reason"]]
                    if len(rows) < _EXAMPLES:
                        rows.append(QuarantinedRow(key=row["key"], detail=row["detail"] or ""))
    # Count by the manifest, since the folder can contain rows of a later prepare that failed.
    return tuple(
        QuarantineReason(reason=reason, num_rows=num_rows, examples=tuple(examples[reason]))
        for reason, num_rows in sorted(manifest.quarantine.items(), key=lambda item: -item[1])
    )


def _contact_sheet(scans: Scans) -> tuple[ImageRef, ...]:
    images = []
    for scan in scans.values():
        for label in (0, 1):
            rows = np.flatnonzero(scan.label_R == label)
            for r in rows[np.argsort(scan.key_hash_R[rows], kind="stable")][:_SHEET_ROWS]:
                images += [scan.image(r, int(i)) for i in np.flatnonzero(scan.content_RI[r])]
    return tuple(images)
