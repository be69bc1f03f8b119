"""Measures, and then simulates, with how many workers the feed keeps up with fast GPUs.

Method: 16,384 photo-like JPEGs of 224 px lie in shards on a local disk, and on an S3 server (moto,
a process of its own) that answers each request 20 ms late. Each worker takes 32 rows per step.

    read       as a Ray Data task reads the windows of rank 0 of 1, 4, 16 and 64 workers
    decode     a thread decodes rows
    real       one feed per core, in processes that wait for each other in every step; rows are read
               in place
    simulated  events of W workers with the measured times, from a random place of the series on;
               `data.buffer_bytes` limits the windows that are read ahead; decoding threads share
               the rows of a step; a GPU takes 2,500 images a second; all workers wait for each
               other in every step

The simulated nodes have `--cores` cores per worker, of which one is left to reading. The network
has no limit but the latency; moto itself takes a few milliseconds per request on one core. To check
the simulation, the real feeds are also simulated.

Run:   python -m benchmarks.scale [--cores 8] [--rows 16384]
The last line of the output is JSON.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import numpy as np

SIZE, BATCH = 224, 32
GPU_ROWS_PER_S = 2_500
LATENCY_S = 0.02
WORKERS = (1, 4, 16, 64)
MAX_WINDOWS = 64
STEPS = 2_000
BUFFER_BYTES = 1 << 30
BUCKET = "feed"


# -- an object store with latency -----------------------------------------------------------------


def serve(port: Any) -> None:
    """Run an S3 server that answers late, and send its port."""
    import logging

    from moto import server as moto_server
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    parts: Any = moto_server
    moto = parts.DomainDispatcherApplication(parts.create_backend_app)

    def late(environment: Any, start: Any) -> Any:
        time.sleep(LATENCY_S)
        return moto(environment, start)

    server = make_server("127.0.0.1", 0, late, threaded=True)
    port.send(server.server_port)
    server.serve_forever()


@contextmanager
def object_store(source: Path) -> Iterator[str]:
    """Copy a folder to a late S3 server that runs during the block; yield its URI."""
    from pyarrow import fs

    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,))
    server.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ours.recv()}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with patch.dict(os.environ, environment):
            uri = f"s3://{BUCKET}?region=us-east-1&allow_bucket_creation=true"
            store, path = fs.FileSystem.from_uri(uri)
            store.create_dir(path)
            local = fs.LocalFileSystem()
            fs.copy_files(str(source), f"{path}/data", local, store)
            yield f"s3://{BUCKET}/data"
    finally:
        server.terminate()
        server.join()


# -- measured stages ------------------------------------------------------------------------------


def make_feed(folder: str, rank: int, num_workers: int, threads: int = 1) -> Any:
    """Return the training feed of a worker."""
    from ray_jobs.config.spec import RunSpec
    from ray_jobs.data.loader import FeedOptions, TrainingFeed
    from ray_jobs.data.manifest import read_manifest
    from ray_jobs.data.sampler import TrainingSampler
    from ray_jobs.storage.folder import Folder

    data = {"prepared": folder, "image_size": SIZE}
    train = {"global_batch_size": BATCH * num_workers, "num_workers": num_workers}
    spec = RunSpec.model_validate({"data": data, "train": train})
    manifest = read_manifest(Folder(folder))
    options = FeedOptions(data=spec.data, threads=threads)
    sampler = TrainingSampler.of_run(spec, manifest)
    return TrainingFeed(Folder(folder), manifest, sampler, rank, num_workers, options)


def measure_reads(folder: str, num_workers: int) -> tuple[list[float], int]:
    """Return the seconds to read each of rank 0's windows, and the steps per window."""
    from ray_jobs.data.ray_reading import read_chunks

    feed = make_feed(folder, 0, num_workers)
    stop = feed.sampler.steps_before(20)
    plan = feed.plan(0, stop)
    places = list(plan.places())[:MAX_WINDOWS]
    seconds, last = [], time.perf_counter()
    for _ in read_chunks(feed.reader, plan, places, feed.num_reads):
        seconds.append(time.perf_counter() - last)
        last = time.perf_counter()
    # The first reads also read the footers of the shards.
    return seconds[len(seconds) // 4 :], feed.sampler.steps_per_window


def measure_decoding(folder: str) -> list[float]:
    """Return the seconds per row of one decoding thread, for each of some batches."""
    import cv2

    cv2.setNumThreads(1)
    feed = make_feed(folder, 0, 1)
    chunk = feed.chunks.chunk(next(iter(feed.plan(0, 64).places())), 0, 64)
    stored, seconds = feed.reader.read(chunk.ranges), []
    for rows in list(chunk.batches_SB)[:48]:
        start = time.perf_counter()
        feed.decoder.fill_images(feed.decoder.make_batch(stored, rows), stored, rows, 0)
        seconds.append((time.perf_counter() - start) / len(rows))
    return seconds[4:]


def run_feed(
    folder: str, rank: int, num_workers: int, threads: int, barrier: Any, out: Any
) -> None:
    """Take batches in step with the other workers; rank 0 sends the rows per second and worker."""
    feed = make_feed(folder, rank, num_workers, threads)
    warm, stop = 16, 16 + 12_000 // (BATCH * num_workers)
    start = 0.0
    for step, _ in enumerate(feed.batches(0, stop)):
        barrier.wait()
        if step + 1 == warm:
            start = time.perf_counter()
    if rank == 0:
        out.send(BATCH * (stop - warm) / (time.perf_counter() - start))


def measure_real(folder: str, num_workers: int, threads: int) -> float:
    """Return the rows per second of each of several real feeds."""
    context = multiprocessing.get_context("spawn")
    barrier, (ours, theirs) = context.Barrier(num_workers), context.Pipe()
    arguments = [(folder, r, num_workers, threads, barrier, theirs) for r in range(num_workers)]
    workers = [context.Process(target=run_feed, args=one) for one in arguments]
    for worker in workers:
        worker.start()
    rows_per_s = ours.recv()
    for worker in workers:
        worker.join()
    return rows_per_s


# -- simulation -----------------------------------------------------------------------------------


def simulate(
    num_workers: int,
    threads: int,
    reads: list[float],
    steps_per_window: int,
    windows_ahead: int,
    decodes: list[float],
    gpu_rows_per_s: float,
) -> float:
    """Return the simulated rows per second of each worker.

    Args:
        num_workers: Number of workers W.
        threads: Decoding threads of a worker.
        reads: Measured seconds from one window to the next.
        steps_per_window: Steps of a window.
        windows_ahead: Maximum number of windows that are read ahead.
        decodes: Measured seconds to decode a row.
        gpu_rows_per_s: Rows per second that a GPU takes.
    """
    rng = np.random.default_rng(0)
    gpu_s, prefetch = BATCH / gpu_rows_per_s, 2
    next_read_W = rng.integers(len(reads), size=num_workers)
    read_W, decoded_W = np.zeros(num_workers), np.zeros(num_workers)
    ended, window_ended = [0.0], [0.0]
    for step in range(STEPS):
        if step % steps_per_window == 0:
            # A window is read once the one before it is read and there is room for it.
            room = window_ended[-windows_ahead] if len(window_ended) >= windows_ahead else 0.0
            read_W = np.maximum(read_W, room) + np.take(reads, next_read_W, mode="wrap")
            next_read_W += 1
        room = ended[-prefetch] if len(ended) >= prefetch else 0.0
        batch_s = rng.choice(decodes, num_workers) * BATCH / threads
        decoded_W = np.maximum(np.maximum(decoded_W, read_W), room) + batch_s
        ended.append(max(ended[-1], decoded_W.max()) + gpu_s)
        if (step + 1) % steps_per_window == 0:
            window_ended.append(ended[-1])
    first = STEPS // 4
    return BATCH * (STEPS - first) / (ended[-1] - ended[first])


def main() -> None:
    """Run from the command line."""
    from benchmarks.photos import make_jpegs
    from benchmarks.shards import write_shards

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cores", type=int, default=8, help="cores per simulated worker")
    parser.add_argument("--rows", type=int, default=16_384)
    arguments = parser.parse_args()
    here = os.cpu_count() or 1
    result: dict[str, Any] = {"cores": arguments.cores}
    with tempfile.TemporaryDirectory() as temporary:
        local = Path(temporary, "prepared")
        images = make_jpegs(SIZE)
        row_bytes = mean(len(image) for image in images)

        def ahead(num_workers: int, steps: int) -> int:
            window_bytes = row_bytes * BATCH * steps
            return max(2, int(BUFFER_BYTES / num_workers / window_bytes))

        num_rows = {"train": arguments.rows, "validation": 64, "test": 64}
        write_shards(local, num_rows, images, SIZE)
        decodes = measure_decoding(str(local))
        result["decode_us"] = round(mean(decodes) * 1e6)
        print(f"decode: {result['decode_us']} us per row and core")
        with object_store(local) as uri:
            for source, folder in (("disk", str(local)), ("object store", uri)):
                for num_workers in (1, here):
                    real = measure_real(folder, num_workers, threads=here // num_workers)
                    reads, steps = measure_reads(folder, num_workers)
                    # A feed that reads in place is one window ahead.
                    simulated = simulate(
                        num_workers, here // num_workers, reads, steps, 2, decodes, float("inf")
                    )
                    print(
                        f"{source}, {num_workers} × {here // num_workers} cores, no GPU: "
                        f"{real:,.0f} rows/s per worker, simulated {simulated:,.0f}"
                    )
                    result[f"{source} {num_workers} real"] = round(real)
                    result[f"{source} {num_workers} check"] = round(simulated)
                for num_workers in WORKERS:
                    reads, steps = measure_reads(folder, num_workers)
                    rate = simulate(
                        num_workers, arguments.cores - 1, reads, steps,
                        ahead(num_workers, steps), decodes, GPU_ROWS_PER_S,
                    )  # fmt: skip
                    print(
                        f"{source}, {num_workers} workers: window of {steps} steps read in "
                        f"{mean(reads):.3f} s; {rate:,.0f} rows/s per worker, "
                        f"{rate / GPU_ROWS_PER_S:.0%} of the GPU"
                    )
                    result[f"{source} {num_workers}"] = round(rate)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
