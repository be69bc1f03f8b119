"""Prepared data with whatever an inspection is to find, and what it finds."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm_model.statistics import fit_vocabulary
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.config.spec import InspectSpec
from ray_jobs.data.manifest import ImageInfo, Manifest, SplitInfo
from ray_jobs.inspect.job import inspect
from ray_jobs.inspect.report_schema import Report
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.tiny import _write_shard, jpeg

SIZE = 32
SPLITS = ("train", "validation", "test")


def photo(seed: int, size: int = SIZE) -> np.ndarray:
    """Pixels that look like nothing else: soft blobs of colour."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def rows(split: str, count: int, **columns: Any) -> dict[str, Any]:
    """Rows of a split with a photo each; every other one is positive."""
    seed = SPLITS.index(split) * 10_000
    return {
        "key": [f"{split}-{i}" for i in range(count)],
        "image": [jpeg(photo(seed + i)) for i in range(count)],
        "label": [i % 2 for i in range(count)],
        **columns,
    }


def write(
    folder: Path,
    splits: dict[str, dict[str, Any]],
    *,
    image: ImageInfo | None = None,
    categorical: tuple[str, ...] = (),
    quarantine: list[tuple[str | None, str, str]] | None = None,
    labels: tuple[str, str] = ("no", "yes"),
) -> Path:
    """Write prepared data with the given columns; of those with no role all are numbers."""
    image = image or ImageInfo(height=SIZE, width=SIZE)
    pixels = pa.binary(image.height * image.width * 3) if image.encoding == "raw" else pa.binary()
    types = {"key": pa.string(), "label": pa.int8()}
    types |= dict.fromkeys(image.columns, pixels) | dict.fromkeys(categorical, pa.string())
    infos = {}
    for split in SPLITS:
        columns = splits.get(split, {name: [] for name in splits["train"]})
        table = pa.table(
            {
                name: pa.array(values, types.get(name, pa.float32()), from_pandas=True)
                for name, values in columns.items()
            }
        )
        shard = _write_shard(folder, f"{split}/part-00000.parquet", table, rows_per_group=7)
        positives = int(np.sum(columns["label"]))
        infos[split] = SplitInfo(
            num_rows=table.num_rows,
            class_counts=(table.num_rows - positives, positives),
            shards=(shard,) if table.num_rows else (),
        )
    bad = quarantine or []
    if bad:
        (folder / "quarantine").mkdir()
        names = ("key", "reason", "detail")
        columns = {name: [row[i] for row in bad] for i, name in enumerate(names)}
        pq.write_table(pa.table(columns), folder / "quarantine" / "part-00000.parquet")
    train = splits["train"]
    Manifest(
        prepare=PrepareSpec(),
        seed=0,
        image=image,
        numeric_columns=tuple(name for name in train if name not in types),
        vocabularies=tuple(fit_vocabulary(train[name], name) for name in categorical),
        negative_label=labels[0],
        positive_label=labels[1],
        splits=infos,
        cuts=None,
        statistics=None,
        quarantine={reason: sum(b[1] == reason for b in bad) for _, reason, _ in bad},
    ).write(Folder(folder))
    return folder


def look(folder: Path, **settings: Any) -> Report:
    return inspect(InspectSpec(prepared=str(folder), **settings))


def kinds(report: Report) -> list[str]:
    return [finding.code for finding in report.findings]


def text_of(report: Report, kind: str) -> str:
    (finding,) = [finding for finding in report.findings if finding.code == kind]
    return finding.text


def stored(folder: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((folder / split).glob("*")))


def psi(first: list[float], second: list[float]) -> float:
    return sum((q - p) * np.log(q / p) for p, q in zip(first, second, strict=True))
