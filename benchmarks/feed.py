"""Compares the rows per second of our feed with tf.data, Ray's guides and bare decoding.

Method: 4,000 photo-like JPEGs, stored at 320 px, become uint8 batches of 32 × 224 × 224 px. Each
method runs in a separate process on all cores; after one warm-up epoch, at least three epochs are
timed. The methods take turns for three rounds; medians are reported.

    tf.data       the same JPEGs as files: shuffle, parallel map (read, decode, resize), batch,
                  prefetch; with the fastest of several degrees of parallelism in each round
    decoder       one process per core: cv2 decodes and resizes JPEGs in memory
    Ray           `read_images` → `map_batches` (resize) → `to_tf`, as in Ray's guides
    jpeg          ours: stored as JPEG, read by Ray Data, decoded by the training process, no cache
    direct        ours, read in place instead, also with an idle Ray in the background
    tasks         ours, `data.decode: workers`: decoded by Ray Data tasks as well
    cached        ours: as jpeg, with decoded rows in Ray's object store
    raw           ours: as jpeg, stored as pixels at 224 px

Run:   python -m benchmarks.feed [--rows 4000] [--rounds 3] [--methods jpeg,tf.data]
The last line of the output is JSON; the ratios are ours / theirs.
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
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
MAX_EPOCHS = 200
MIN_S = 5.0


def write_data(folder: Path, num_rows: int) -> None:
    """Write raw data, prepared data with both stores, and the stored JPEGs as files."""
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


def measure_rate(epoch: Callable[[], int]) -> float:
    """Return the rows per second over at least three epochs, after a warm-up epoch."""
    epoch()
    started, rows, epochs = time.perf_counter(), 0, 0
    while epochs < EPOCHS or time.perf_counter() - started < MIN_S:
        rows += epoch()
        epochs += 1
    return rows / (time.perf_counter() - started)


# -- theirs ---------------------------------------------------------------------------------------


def tfdata(folder: Path) -> float:
    """Measure a manually tuned tf.data pipeline."""
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

    def quick_rate(parallel: int) -> float:
        dataset = make(parallel)
        started = time.perf_counter()
        return epoch(dataset) / (time.perf_counter() - started)

    quick_rate(CORES)
    best = max((CORES, 2 * CORES, 4 * CORES, tf.data.AUTOTUNE), key=quick_rate)
    dataset = make(best)
    return measure_rate(lambda: epoch(dataset))


def decode_all(folder: Path) -> float:
    """Measure cv2 on one core."""
    import cv2

    cv2.setNumThreads(1)
    contents = [np.fromfile(path, np.uint8) for path in sorted((folder / "files").iterdir())[:400]]

    def epoch() -> int:
        for content in contents:
            pixels: Any = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB)
            cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
        return len(contents)

    return measure_rate(epoch)


def decoder(folder: Path) -> float:
    """Measure cv2 in one process per core."""
    with ProcessPoolExecutor(CORES) as processes:
        return sum(processes.map(decode_all, [folder] * CORES))


def ray_documented(folder: Path) -> float:
    """Measure Ray Data as in its guides."""
    import cv2
    import ray.data

    ray.init("local", num_cpus=CORES + 1, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def resize(batch: Any) -> Any:
        images = np.stack([cv2.resize(image, (SIZE, SIZE)) for image in batch["image"]])
        return {"image": images, "label": np.zeros(len(images), np.float32)}

    dataset = ray.data.read_images(str(folder / "files"), mode="RGB").map_batches(resize)
    batches = dataset.to_tf("image", "label", batch_size=BATCH, drop_last=True)
    return measure_rate(lambda: sum(int(images.shape[0]) for images, _ in batches))


# -- ours -----------------------------------------------------------------------------------------


def _feed(store: str, data: DataSpec, folder: Path, direct: bool = False) -> float:
    """Measure our feed with shards of one kind."""
    import ray

    from ray_jobs.data.cache import choose_cache, make_cache_index, open_cache
    from ray_jobs.data.loader import FeedOptions, ReadAhead, TrainingFeed
    from ray_jobs.data.prefetch import prefetch
    from ray_jobs.data.ray_reading import places_dataset
    from ray_jobs.data.sampler import TrainingSampler
    from ray_jobs.train.device_batch import as_tensor

    manifest = read_manifest(Folder(folder / store))
    ray.init("local", num_cpus=CORES + 1, logging_level=logging.ERROR)
    kind = choose_cache(data, manifest, SIZE * SIZE * 3, 0)
    index = make_cache_index() if kind == "object_store" else None
    cache = open_cache(kind, manifest, SIZE, index)
    sampler = TrainingSampler.of(manifest.splits["train"], BATCH, 0, data)
    last = sampler.steps_before(MAX_EPOCHS)
    decode = "trainer" if data.decode == "auto" else data.decode
    options = FeedOptions(data=data, decode=decode, threads=CORES, cache=cache)
    worker = (Folder(folder / store), manifest, sampler, 0, 1)
    feed = TrainingFeed(*worker, options)
    if not direct:
        plan = feed.plan(0, last, is_cached=cache is not None)
        places = places_dataset(list(plan.unread_places()), decode)
        rows = ReadAhead(feed.iterate(feed.dataset(places, plan).iterator()), 0)
        feed = TrainingFeed(*worker, replace(options, ahead={"train": rows}))

    def tensors() -> Iterator[Any]:
        for batch in feed.batches(0, last):
            yield as_tensor(batch["image"])

    # One stream through all epochs, as in the training loop.
    stream = prefetch(tensors(), data.prefetch_batches)
    steps = manifest.splits["train"].num_rows // BATCH
    rate = measure_rate(lambda: sum(int(next(stream).shape[0]) for _ in range(steps)))
    stream.close()
    return rate


METHODS: dict[str, Callable[[Path], float]] = {
    "tf.data": tfdata,
    "decoder": decoder,
    "Ray": ray_documented,
    "jpeg": partial(_feed, "jpeg", DataSpec(image_size=SIZE, cache="none")),
    "direct": partial(_feed, "jpeg", DataSpec(image_size=SIZE, cache="none"), direct=True),
    "tasks": partial(_feed, "jpeg", DataSpec(image_size=SIZE, decode="workers", cache="none")),
    "cached": partial(_feed, "jpeg", DataSpec(image_size=SIZE, cache="object_store")),
    "raw": partial(_feed, "raw", DataSpec(cache="none")),
}


def measure(method: str, folder: Path) -> float:
    """Return the rows per second of a method, measured in a separate process."""
    command = [sys.executable, "-m", "benchmarks.feed", "--method", method, "--folder", str(folder)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "RAY_DATA_USE_DATASOURCE_V2": "0"}
    output = subprocess.check_output(command, text=True, env=environment)
    return float(output.strip().splitlines()[-1])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS), help="some of: %(default)s")
    for name in ("--method", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.method:
        print(METHODS[arguments.method](Path(arguments.folder)))
        return
    rates: dict[str, list[float]] = {name: [] for name in arguments.methods.split(",")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder, arguments.rows)
        for _ in range(arguments.rounds):
            for name, measured in rates.items():
                measured.append(measure(name, folder))
        row_bytes = {
            store: read_manifest(Folder(folder / store)).splits["train"].row_bytes
            for store in ("jpeg", "raw")
        }
    median = {name: statistics.median(measured) for name, measured in rates.items()}
    print("\n| method | rows/s, median | each round |\n|---|---|---|")
    for name, measured in rates.items():
        each = ", ".join(f"{rate:,.0f}" for rate in measured)
        print(f"| {name} | {median[name]:,.0f} | {each} |")
    print(
        f"\nbytes per row: jpeg {row_bytes['jpeg']:,.0f}, raw {row_bytes['raw']:,.0f}; "
        f"{CORES} cores"
    )
    ratios = {
        "vs_tfdata": ("jpeg", "tf.data"),
        "vs_decoder": ("jpeg", "decoder"),
        "raw_vs_tfdata": ("raw", "tf.data"),
        "cached_vs_tfdata": ("cached", "tf.data"),
        "vs_direct": ("jpeg", "direct"),
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
