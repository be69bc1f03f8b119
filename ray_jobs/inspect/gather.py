"""Prepared data → the report: what `scan` reads, put together from the parts that judge it."""

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from ray_jobs.config.spec import SPLITS, Split
from ray_jobs.data.batch import KEY
from ray_jobs.data.manifest import Manifest
from ray_jobs.inspect import columns, duplicates
from ray_jobs.inspect.columns import category_facts, numeric_facts
from ray_jobs.inspect.facts import (
    BadRowExample,
    CategoryFacts,
    DuplicateFacts,
    ImageFacts,
    ImageInfoFacts,
    ImagePair,
    ImageRef,
    KeyFacts,
    NumericFacts,
    OverlapFacts,
    PictureFacts,
    QuarantineFacts,
    Report,
    SharedKey,
    SplitFacts,
)
from ray_jobs.inspect.scan import Place, ScannedSplit, read_columns, rgb_pixels, scan_split
from ray_jobs.storage.folder import Folder

Scans = Mapping[Split, ScannedSplit]

_COLUMNS_AT_ONCE = 16
_SHEET_ROWS = 8
_PAIRS = 50
_EXAMPLES = 5
_BLACK, _WHITE = 16.0, 239.0
_THUMBNAIL = 128


class _References:
    """Finds key and label of rows by their places among those looked at."""

    def __init__(self, folder: Folder, manifest: Manifest, scans: Scans) -> None:
        self.folder, self.manifest, self.scans = folder, manifest, scans

    def find(self, places: Iterable[Place]) -> tuple[ImageRef, ...]:
        """Return the images at some places."""
        places = list(places)
        keys: dict[tuple[Split, int], str] = {}
        for split in SPLITS:
            if rows := {self._row(place) for place in places if place.split == split}:
                rows_R = np.array(sorted(rows), np.int64)
                table = read_columns(self.folder, self.manifest.splits[split], [KEY], rows_R)
                names = table.column(0).to_pylist()
                keys |= {(split, row): n for row, n in zip(sorted(rows), names, strict=True)}
        return tuple(
            ImageRef(
                split=place.split,
                row=self._row(place),
                key=keys[place.split, self._row(place)],
                column=self.manifest.image.columns[place.column],
                label=int(self.scans[place.split].label_R[place.index]),
            )
            for place in places
        )

    def _row(self, place: Place) -> int:
        return int(self.scans[place.split].rows_R[place.index])


def gather(folder: Folder, manifest: Manifest, max_rows: int) -> Report:
    """Return the report of prepared data, without findings yet.

    Args:
        folder: prepared data.
        manifest: of it.
        max_rows: of a split to look at.
    """
    scans = _scan(folder, manifest, max_rows)
    rows = sum(info.num_rows for info in manifest.splits.values())
    image = manifest.image
    refs = _References(folder, manifest, scans)
    return Report(
        prepared=str(folder),
        class_names=(manifest.negative_label, manifest.positive_label),
        splits={split: _split_facts(manifest, split, rows, scans) for split in SPLITS},
        store=ImageInfoFacts(
            encoding=image.encoding, height=image.height, width=image.width, columns=image.columns
        ),
        numeric=_numeric(folder, manifest, scans),
        categorical=_categorical(folder, manifest, scans),
        images=tuple(_image_facts(manifest, scans, i, refs) for i in range(len(image.columns))),
        duplicates=_duplicates(scans, refs),
        keys=_shared_keys(scans, refs),
        quarantine=_quarantine(folder, manifest),
        contact_sheet=_contact_sheet(scans, refs),
        thresholds={
            "psi": columns.PSI_THRESHOLD,
            "p_value": columns.P_VALUE_THRESHOLD,
            "missing_share": columns.MISSING_THRESHOLD,
            "leak_auc": columns.LEAK_THRESHOLD,
            "near_bits": duplicates.NEAR_BITS,
            "flat_contrast": duplicates.FLAT_CONTRAST,
            "black_brightness": _BLACK,
            "white_brightness": _WHITE,
        },
    )


def _scan(folder: Folder, manifest: Manifest, max_rows: int) -> dict[Split, ScannedSplit]:
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        scans = {}
        for split in SPLITS:
            info = manifest.splits[split]
            task = progress.add_task(f"Looking at {split}", total=info.num_rows)
            scans[split] = scan_split(
                folder, info, manifest.image, max_rows,
                lambda rows, task=task: progress.advance(task, rows),
            )  # fmt: skip
    return scans


def _split_facts(manifest: Manifest, split: Split, all_rows: int, scans: Scans) -> SplitFacts:
    info = manifest.splits[split]
    return SplitFacts(
        num_rows=info.num_rows,
        class_counts=info.class_counts,
        share=info.num_rows / max(all_rows, 1),
        positive_share=info.class_counts[1] / info.num_rows if info.num_rows else None,
        num_shards=len(info.shards),
        num_bytes=sum(shard.num_bytes for shard in info.shards),
        rows_inspected=len(scans[split].rows_R),
    )


def _numeric(folder: Folder, manifest: Manifest, scans: Scans) -> tuple[NumericFacts, ...]:
    found, names = [], manifest.numeric_columns
    for start in range(0, len(names), _COLUMNS_AT_ONCE):
        chunk = names[start : start + _COLUMNS_AT_ONCE]
        tables: dict[Split, pa.Table] = {
            split: read_columns(folder, manifest.splits[split], chunk, scans[split].rows_R)
            for split in SPLITS
        }
        for name in chunk:
            values: dict[Split, np.ndarray] = {}
            for split, table in tables.items():
                values[split] = np.asarray(table.column(name).to_numpy(), np.float64)
            found.append(numeric_facts(name, values, _labels(scans)))
    return tuple(found)


def _categorical(folder: Folder, manifest: Manifest, scans: Scans) -> tuple[CategoryFacts, ...]:
    found = []
    for vocabulary in manifest.vocabularies:
        codes: dict[Split, np.ndarray] = {}
        for split in SPLITS:
            rows_R = scans[split].rows_R
            table = read_columns(folder, manifest.splits[split], [vocabulary.column], rows_R)
            texts = (text.as_py() for text in table.column(0))
            codes[split] = vocabulary.codes(texts)
        found.append(category_facts(vocabulary, codes, _labels(scans)))
    return tuple(found)


def _labels(scans: Scans) -> dict[Split, np.ndarray]:
    return {split: scan.label_R for split, scan in scans.items()}


def _image_facts(manifest: Manifest, scans: Scans, i: int, refs: _References) -> ImageFacts:
    column, splits, examples = manifest.image.columns[i], {}, []
    for split, scan in scans.items():
        brightness, there = scan.brightness_RI[:, i], scan.content_RI[:, i] != 0
        flat = scan.contrast_RI[:, i] < duplicates.FLAT_CONTRAST
        black, white = flat & (brightness < _BLACK), flat & (brightness > _WHITE)
        splits[split] = PictureFacts(
            num_rows=len(there),
            missing=int((~there).sum()),
            unreadable=int((there & np.isnan(brightness)).sum()),
            black=int(black.sum()),
            white=int(white.sum()),
            flat=int((flat & ~black & ~white).sum()),
        )
        for kind in (black, white, flat & ~black & ~white):
            examples += [Place(split, int(r), i) for r in np.flatnonzero(kind)[:_EXAMPLES]]
    return ImageFacts(
        column=column,
        splits=splits,
        brightness=numeric_facts(
            f"{column} brightness",
            {s: scan.brightness_RI[:, i] for s, scan in scans.items()},
            _labels(scans),
        ),
        contrast=numeric_facts(
            f"{column} contrast",
            {s: scan.contrast_RI[:, i] for s, scan in scans.items()},
            _labels(scans),
        ),
        examples=refs.find(examples),
    )


def _duplicates(scans: Scans, refs: _References) -> DuplicateFacts:
    found = []
    for overlap in duplicates.overlaps(scans, _PAIRS):
        images = refs.find(place for pair in overlap.pairs for place in pair[:2])
        found.append(
            OverlapFacts(
                first=overlap.first,
                second=overlap.second,
                exact=overlap.num_exact,
                near=overlap.num_near,
                complete=overlap.complete,
                examples=tuple(
                    ImagePair(first=one, second=other, exact=pair[2], distance=pair[3])
                    for one, other, pair in zip(
                        images[::2], images[1::2], overlap.pairs, strict=True
                    )
                ),
            )
        )
    return DuplicateFacts(
        within={split: duplicates.duplicates_within(scan) for split, scan in scans.items()},
        conflicting=duplicates.conflicting(scans),
        overlaps=tuple(found),
    )


def _shared_keys(scans: Scans, refs: _References) -> KeyFacts:
    shared = list(duplicates.shared_keys(scans).values())
    examples = []
    for places in shared[:_EXAMPLES]:
        (image,) = refs.find([Place(*places[0], 0)])
        examples.append(SharedKey(key=image.key, splits=tuple(split for split, _ in places)))
    return KeyFacts(num_shared=len(shared), examples=tuple(examples))


def _quarantine(folder: Folder, manifest: Manifest) -> tuple[QuarantineFacts, ...]:
    examples: dict[str, list[BadRowExample]] = defaultdict(list)
    for name in folder.names("quarantine"):
        with pq.ParquetFile(folder.filesystem.open_input_file(folder.locate(name))) as file:
            for batch in file.iter_batches(columns=["key", "reason", "detail"]):
                for row in batch.to_pylist():
                    if len(examples[row["reason"]]) < _EXAMPLES:
                        examples[row["reason"]].append(
                            BadRowExample(key=row["key"], detail=row["detail"] or "")
                        )
    # The counts are the manifest's: a prepare that failed since has left its own rows there.
    return tuple(
        QuarantineFacts(reason=reason, num_rows=rows, examples=tuple(examples[reason]))
        for reason, rows in sorted(manifest.quarantine.items(), key=lambda item: -item[1])
    )


def _contact_sheet(scans: Scans, refs: _References) -> tuple[ImageRef, ...]:
    places = []
    for split, scan in scans.items():
        for label in (0, 1):
            rows = np.flatnonzero(scan.label_R == label)
            chosen = rows[np.argsort(scan.key_hash_R[rows], kind="stable")][:_SHEET_ROWS]
            columns = range(scan.content_RI.shape[1])
            places += [Place(split, int(row), i) for row in chosen for i in columns]
    return refs.find(p for p in places if scans[p.split].content_RI[p.index, p.column] != 0)


def thumbnails(
    folder: Folder, manifest: Manifest, images: Iterable[ImageRef]
) -> dict[tuple[Split, int, str], bytes]:
    """Return small JPEGs by split, row and column; those that cannot be read are left out."""
    wanted: dict[tuple[Split, str], set[int]] = defaultdict(set)
    for image in images:
        wanted[image.split, image.column].add(image.row)
    found = {}
    for (split, column), rows in wanted.items():
        rows_R = np.array(sorted(rows), np.int64)
        table = read_columns(folder, manifest.splits[split], [column], rows_R)
        for row, content in zip(rows_R, table.column(0), strict=True):
            try:
                pixels = rgb_pixels(content.as_py(), manifest.image)
            except ValueError:
                continue
            found[split, int(row), column] = _thumbnail(pixels)
    return found


def _thumbnail(pixels: np.ndarray) -> bytes:
    height, width = pixels.shape[:2]
    scale = min(_THUMBNAIL / max(height, width), 1)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    quality = [cv2.IMWRITE_JPEG_QUALITY, 85]
    return cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), quality)[1].tobytes()
