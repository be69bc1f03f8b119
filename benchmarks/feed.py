"""Rows a second into a training worker, beside tf.data, Ray's documented way and a bare loop.

Method: 4,000 photo-like JPEGs, stored at 320 px, become uint8 batches of 32 × 224 × 224 px. Every
way runs in a process of its own with all cores; after one epoch to warm up, at least three epochs
are timed. The ways take turns, three rounds; medians count.

    tf.data       the same JPEGs as files: shuffle, parallel map (read, decode, resize), batch,
                  prefetch; the fastest of several degrees of parallelism, found anew in each round
    decoder       one process a core: cv2 decodes and resizes JPEGs that are in memory
    Ray           `read_images` → `map_batches` (resize) → `to_tf`, as Ray's guides show it
    jpeg          ours: store jpeg, decoded by the training process, no cache
    tasks         ours, `data.decode: workers`: decoded by Ray Data tasks
    cached        ours: the same shards, decoded rows in Ray's object store
    raw           ours: store raw at 224 px

Run:   python -m benchmarks.feed [--rows 4000] [--rounds 3]
Ends in one line of JSON; the ratios are ours / theirs.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.photos import write_photos
from ray_jobs.config.spec import DataSpec, RunSpec
from ray_jobs.data.manifest import read_manifest
from ray_jobs.prepare.job import prepare
from ray_jobs.storage.folder import Folder

STORED, SIZE, BATCH = 320, 224, 32
CORES = os.cpu_count() or 1
EPOCHS = 3
LEAST_S = 5.0


def write_data(folder: Path, num_rows: int) -> None:
    """Write raw data, both stores, and the stored JPEGs as files."""
    write_photos(folder, {"train": num_rows, "validation": 8, "test": 8}, 480, 400)
    for store, size in (("jpeg", STORED), ("raw", SIZE)):
        options = {
            "images": str(folder / "images"),
            "table": str(folder / "table.csv"),
            "output": str(folder / store),
            "split_column": "split",
            "store": store,
            "image_size": size,
        }
        prepare(RunSpec.model_validate({"prepare": options}))
    (folder / "files").mkdir()
    for shard in sorted((folder / "jpeg" / "train").iterdir()):
        rows = pq.read_table(shard, columns=["key", "image"])
        for key, content in zip(rows["key"].to_pylist(), rows["image"].to_pylist(), strict=True):
            (folder / "files" / f"{key}.jpg").write_bytes(content)


def timed(epoch: Callable[[], int]) -> float:
    """Return rows a second over at least three epochs, after one to warm up."""
    epoch()
    started, rows, epochs = time.perf_counter(), 0, 0
    while epochs < EPOCHS or time.perf_counter() - started < LEAST_S:
        rows += epoch()
        epochs += 1
    return rows / (time.perf_counter() - started)


# -- theirs ---------------------------------------------------------------------------------------


def tfdata(folder: Path) -> float:
    """Time a tf.data pipeline tuned by hand."""
    import tensorflow as tf

    files = sorted(str(path) for path in (folder / "files").iterdir())

    def decode(path: Any) -> Any:
        image = tf.io.decode_jpeg(tf.io.read_file(path), 3, dct_method="INTEGER_FAST")
        return tf.cast(tf.image.resize(image, (SIZE, SIZE)) + 0.5, tf.uint8)

    def make(parallel: int) -> Any:
        dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files))
        dataset = dataset.map(decode, num_parallel_calls=parallel, deterministic=False)
        options = tf.data.Options()
        options.threading.private_threadpool_size = CORES
        return dataset.batch(BATCH, drop_remainder=True).prefetch(4).with_options(options)

    def epoch(dataset: Any) -> int:
        return sum(int(batch.shape[0]) for batch in dataset)

    def short(parallel: int) -> float:
        dataset = make(parallel)
        started = time.perf_counter()
        return epoch(dataset) / (time.perf_counter() - started)

    short(CORES)
    best = max((CORES, 2 * CORES, 4 * CORES, tf.data.AUTOTUNE), key=short)
    dataset = make(best)
    return timed(lambda: epoch(dataset))


def decode_all(folder: Path) -> float:
    """Time cv2 alone, on one core."""
    import cv2

    cv2.setNumThreads(1)
    contents = [np.fromfile(path, np.uint8) for path in sorted((folder / "files").iterdir())[:400]]

    def epoch() -> int:
        for content in contents:
            pixels: Any = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB)
            cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
        return len(contents)

    return timed(epoch)


def decoder(folder: Path) -> float:
    """Time cv2 alone, one process a core."""
    processes = [_process("decode_all", folder) for _ in range(CORES)]
    return sum(_rate(process) for process in processes)


def ray_documented(folder: Path) -> float:
    """Time Ray Data as its guides show it."""
    import cv2
    import ray.data

    ray.init(num_cpus=CORES + 1, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def resize(batch: Any) -> Any:
        images = np.stack([cv2.resize(image, (SIZE, SIZE)) for image in batch["image"]])
        return {"image": images, "label": np.zeros(len(images), np.float32)}

    dataset = ray.data.read_images(str(folder / "files"), mode="RGB").map_batches(resize)
    batches = dataset.to_tf("image", "label", batch_size=BATCH, drop_last=True)
    return timed(lambda: sum(int(images.shape[0]) for images, _ in batches))


# -- ours -----------------------------------------------------------------------------------------


def _feed(folder: Path, store: str, data: DataSpec) -> float:
    from ray_jobs.data.cache import choose_kind, make_index, open_cache
    from ray_jobs.data.loader import FeedOptions, TrainingFeed
    from ray_jobs.data.prefetch import prefetch
    from ray_jobs.data.sampler import TrainingSampler
    from ray_jobs.train.device_batch import as_tensor

    manifest = read_manifest(Folder(folder / store))
    kind = choose_kind(data, manifest, SIZE * SIZE * 3, 0)
    cache = None
    if kind == "object_store" or data.decode == "workers":
        import ray

        ray.init(num_cpus=CORES + 1, logging_level=logging.ERROR)
        cache = open_cache(kind, manifest, SIZE, make_index())
    order = TrainingSampler.of(manifest.splits["train"], BATCH, 0, data)
    decode = "trainer" if data.decode == "auto" else data.decode
    options = FeedOptions(data=data, decode=decode, threads=CORES, cache=cache)
    feed = TrainingFeed(Folder(folder / store), manifest, order, 0, 1, options)

    def tensors() -> Iterator[Any]:
        for batch in feed.batches(0, 1 << 40):
            yield as_tensor(batch["image"])

    # One stream through all epochs, as the training loop has it.
    stream = prefetch(tensors(), data.prefetch_batches)
    steps = manifest.splits["train"].num_rows // BATCH
    rate = timed(lambda: sum(int(next(stream).shape[0]) for _ in range(steps)))
    stream.close()
    return rate


def jpeg(folder: Path) -> float:
    """Time our feed of JPEGs, without a cache."""
    return _feed(folder, "jpeg", DataSpec(image_size=SIZE, cache="none"))


def tasks(folder: Path) -> float:
    """Time our feed of JPEGs, decoded by Ray Data tasks."""
    return _feed(folder, "jpeg", DataSpec(image_size=SIZE, decode="workers", cache="none"))


def cached(folder: Path) -> float:
    """Time our feed of JPEGs, decoded rows in the object store."""
    return _feed(folder, "jpeg", DataSpec(image_size=SIZE, cache="object_store"))


def raw(folder: Path) -> float:
    """Time our feed of pixels."""
    return _feed(folder, "raw", DataSpec(cache="none"))


WAYS: dict[str, Callable[[Path], float]] = {
    "tf.data": tfdata,
    "decoder": decoder,
    "Ray": ray_documented,
    "jpeg": jpeg,
    "tasks": tasks,
    "cached": cached,
    "raw": raw,
}


def _process(way: str, folder: Path) -> subprocess.Popen[str]:
    code = (
        "import sys, pathlib; from benchmarks import feed; "
        "print(getattr(feed, sys.argv[1])(pathlib.Path(sys.argv[2])))"
    )
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "RAY_DATA_USE_DATASOURCE_V2": "0"}
    command = [sys.executable, "-c", code, way, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def _rate(process: subprocess.Popen[str]) -> float:
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args} failed")
    return float(output.strip().splitlines()[-1])


def _row_bytes(folder: Path) -> float:
    split = read_manifest(Folder(folder)).splits["train"]
    return sum(shard.num_bytes for shard in split.shards) / split.num_rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS), help="of: " + ", ".join(WAYS))
    arguments = parser.parse_args()
    ways = [way for way in WAYS if way in arguments.ways.split(",")]
    rates: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, arguments.rows)
        for _ in range(arguments.rounds):
            for way in ways:
                rates[way].append(_rate(_process(WAYS[way].__name__, folder)))
        stored = {
            store: sum(
                s.num_bytes for s in read_manifest(Folder(folder / store)).splits["train"].shards
            )
            / arguments.rows
            for store in ("jpeg", "raw")
        }
    median = {way: statistics.median(found) for way, found in rates.items()}
    print("\n| way | rows/s, median | each round |\n|---|---|---|")
    for way, found in rates.items():
        print(f"| {way} | {median[way]:,.0f} | {', '.join(f'{rate:,.0f}' for rate in found)} |")
    print(f"\nbytes a row: jpeg {stored['jpeg']:,.0f}, raw {stored['raw']:,.0f}; {CORES} cores")
    ratios = {
        "vs_tfdata": ("jpeg", "tf.data"),
        "vs_decoder": ("jpeg", "decoder"),
        "raw_vs_tfdata": ("raw", "tf.data"),
        "cached_vs_tfdata": ("cached", "tf.data"),
        "vs_ray_documented": ("jpeg", "Ray"),
    }
    print(
        json.dumps(
            {
                name: round(median[ours] / median[theirs], 3)
                for name, (ours, theirs) in ratios.items()
                if ours in median and theirs in median
            }
        )
    )


if __name__ == "__main__":
    main()
