"""Joins a million records with a million images and measures memory and unmatched rows.

Method: Parquet records and WebDataset tars (10,000 images of 8 × 8 pixels each, from 300 distinct
encodings), both in random order; 1,000 records have no image, and 1,000 images have no record.
`prepare` joins them and writes shards. The keys in its quarantine are compared with the unmatched
ones. Twice a second, a thread reads the resident memory (PSS, which counts shared memory once) of
this process, with and without its children, which include Ray's processes. Generating the data is
not measured.

Run:   python -m benchmarks.join [--rows 1000000] [--join_only] [--folder DIR]
The last line of the output is JSON.
"""

import argparse
import io
import json
import os
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.memory import resident_bytes
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.config.spec import RunSpec
from ray_jobs.prepare.job import prepare
from ray_jobs.prepare.sources.webdataset import open_source

IMAGES_PER_TAR = 10_000
NUM_ENCODINGS = 300
NUM_UNMATCHED = 1_000
IMAGE_SIZE = 8
NUMERIC_COLUMNS = ("a", "b", "c", "d")


def write_data(folder: Path, rows: int, seed: int) -> None:
    """Write table.parquet with keys 0 … rows - 1, and tars with the same keys plus 1,000."""
    rng = np.random.default_rng(seed)
    keys = rng.permutation(rows)
    columns: dict[str, Any] = {"key": [_key(key) for key in keys]}
    columns |= {name: rng.normal(size=rows).astype(np.float32) for name in NUMERIC_COLUMNS}
    columns["label"] = (keys % 3 == 0).astype(np.int8)
    pq.write_table(pa.table(columns), folder / "table.parquet")
    encodings = [_jpeg(rng) for _ in range(NUM_ENCODINGS)]
    images = rng.permutation(rows) + NUM_UNMATCHED
    for number, start in enumerate(range(0, rows, IMAGES_PER_TAR)):
        with tarfile.open(folder / f"images-{number:05d}.tar", "w") as tar:
            for key in images[start : start + IMAGES_PER_TAR]:
                content = encodings[key % NUM_ENCODINGS]
                info = tarfile.TarInfo(f"{_key(key)}.jpg")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Measure the peak memory in MB of this process (`driver`) and with its children (`all`)."""
    peaks = {"driver": 0.0, "all": 0.0}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            for name, with_children in (("driver", False), ("all", True)):
                memory_mb = resident_bytes(os.getpid(), with_children=with_children) / 1e6
                peaks[name] = max(peaks[name], memory_mb)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def join_alone(options: PrepareSpec) -> dict[str, set[str]]:
    """Open the source only, and return the unmatched keys by reason."""
    source = open_source(options)
    is_missing = source.images[""].path.is_null()
    return {
        "missing_image": set(source.table.column("key").filter(is_missing).to_pylist()),
        "no_record": {key for key, reason, _ in source.unmatched if reason == "no_record"},
    }


def join_and_prepare(options: PrepareSpec) -> dict[str, set[str]]:
    """Run `prepare`, and return the keys in its quarantine by reason."""
    prepare(RunSpec(prepare=options))
    keys: dict[str, set[str]] = {}
    for path in sorted(Path(options.output, "quarantine").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            keys.setdefault(row["reason"], set()).add(row["key"])
    return keys


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--join_only", action="store_true", help="open the source only")
    parser.add_argument("--folder", help="parent of the temporary data folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        write_data(folder, args.rows, args.seed)
        options = PrepareSpec(
            source="webdataset",
            images=str(folder / "*.tar"),
            table=str(folder / "table.parquet"),
            output=str(folder / "prepared"),
            numeric_columns=NUMERIC_COLUMNS,
            image_size=IMAGE_SIZE,
            max_bad_fraction=min(1.0, 2.5 * NUM_UNMATCHED / args.rows),
        )
        start = time.perf_counter()
        with peak_memory() as peaks:
            unmatched = join_alone(options) if args.join_only else join_and_prepare(options)
        seconds = time.perf_counter() - start
    expected = {
        "missing_image": {_key(key) for key in range(NUM_UNMATCHED)},
        "no_record": {_key(args.rows + key) for key in range(NUM_UNMATCHED)},
    }
    result = {
        "rows": args.rows,
        "with_prepare": not args.join_only,
        "seconds": round(seconds, 1),
        "rows_per_s": round(args.rows / seconds),
        "driver_mb": round(peaks["driver"]),
        "all_mb": round(peaks["all"]),
        "records_without_image": len(unmatched.get("missing_image", ())),
        "images_without_record": len(unmatched.get("no_record", ())),
        "all_unmatched_reported": unmatched == expected,
    }
    for name, value in result.items():
        print(f"{name:24} {value}")
    print(json.dumps(result))


def _key(number: int) -> str:
    return f"{number:09d}"


def _jpeg(rng: np.random.Generator) -> bytes:
    content = io.BytesIO()
    pixels = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


if __name__ == "__main__":
    main()
