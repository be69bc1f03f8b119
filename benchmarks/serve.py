"""Compares the server with bare TensorFlow and with a plain FastAPI application, on loopback.

Method: a run with an EfficientNetB0 at 224 pixels and one with a `tiny` branch at 96 pixels, both
untrained, answer requests with JPEGs of 640 × 480 pixels and five numbers. Clients send their next
request when they have the answer to the last one. Beside them, one after the other:

    bare      a loop of TensorFlow that decodes and resizes the same JPEGs (tf.data, in parallel)
              and calls the model, with batches of the mean size that the server had
    fastapi   an application that decodes with OpenCV and calls the model once per request

Run:   python -m benchmarks.serve [--seconds 10]
The last line of the output is JSON: requests per second, p50 and p99 in milliseconds, and the
server's rows per second divided by those of both peers.
"""

import argparse
import asyncio
import base64
import io
import json
import math
import multiprocessing
import os
import re
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

NUMBERS = ("a", "b", "c", "d", "e")
CLIENTS = (1, 8, 64)
NUM_PHOTOS = 64
KINDS = {"efficientnet_b0": 224, "tiny": 96}
ROWS_PER_REQUEST = {"efficientnet_b0": (1,), "tiny": (1, 16)}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=10, help="duration of each measurement")
    arguments = parser.parse_args()
    os.environ["RAY_metrics_report_interval_ms"] = "500"  # noqa: SIM112  # as Ray reads it
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    found = []
    with tempfile.TemporaryDirectory() as local:
        for kind, side in KINDS.items():
            run = Path(local, kind)
            _in_process(write_run, run, kind, side)
            found += measure(run, kind, arguments.seconds)
    print(json.dumps(found))


def measure(run: Path, kind: str, seconds: float) -> list[dict[str, Any]]:
    """Return the figures of one run for each number of clients and rows per request."""
    from ray_jobs.config.inference_spec import ServeSpec
    from ray_jobs.serve.job import serving

    cases = [(rows, clients) for rows in ROWS_PER_REQUEST[kind] for clients in CLIENTS]
    found = []
    spec = ServeSpec(run=str(run), port=_free_port(), num_replicas=2)
    with serving(spec) as (url, _, _):
        for num_rows, clients in cases:
            before = _batches()
            result = asyncio.run(_load(f"{url}/predict", num_rows, clients, seconds))
            rows, batches = (a - b for a, b in zip(_batches(), before, strict=True))
            result |= {"batch": rows / max(batches, 1), "num_rows": num_rows}
            found.append({"kind": kind, "clients": clients, "server": result})
    port = _free_port()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply_async(_fastapi, (run, port))
        _wait_for(port)
        for case in found:
            num_rows, clients = case["server"]["num_rows"], case["clients"]
            url = f"http://127.0.0.1:{port}/predict"
            case["fastapi"] = asyncio.run(_load(url, num_rows, clients, seconds))
        pool.terminate()
    for case in found:
        batch = max(round(case["server"]["batch"]), 1)
        case["bare"] = {"rows_per_s": _in_process(_bare, run, batch, seconds)}
        for peer in ("bare", "fastapi"):
            ratio = case["server"]["rows_per_s"] / case[peer]["rows_per_s"]
            case[f"server/{peer}"] = ratio
        print(json.dumps(case), flush=True)
    return found


def write_run(folder: Path, kind: str, side: int) -> None:
    """Write the run folder of an untrained model."""
    from mm_model.model import build_model
    from mm_model.spec import ImageSpec, ModelSpec
    from mm_model.statistics import fit_numeric_statistics
    from ray_jobs.config.prepare_spec import PrepareSpec
    from ray_jobs.data.manifest import ImageInfo, Manifest
    from ray_jobs.storage.folder import Folder

    numbers = np.random.default_rng(0).normal(size=(100, len(NUMBERS)))
    statistics = fit_numeric_statistics(numbers, NUMBERS)
    model = build_model(
        ModelSpec(image=ImageSpec(kind=kind, weights=None)), statistics, (side, side, 3)
    )
    (folder / "model").mkdir(parents=True)
    model.save(folder / "model" / "model.keras")
    Manifest(
        prepare=PrepareSpec(image_size=side), seed=0, image=ImageInfo(height=side, width=side),
        numeric_columns=NUMBERS, negative_label="no", positive_label="yes", splits={}, cuts=None,
        statistics=statistics, quarantine={},
    ).write(Folder(folder))  # fmt: skip
    Folder(folder).write_json("summary.json", {"decision_threshold": 0.5})


def photos() -> list[bytes]:
    """Return JPEGs of smooth random images."""
    from PIL import Image

    rng = np.random.default_rng(0)
    files = []
    for _ in range(NUM_PHOTOS):
        small = rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)
        image = Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=90)
        files.append(stream.getvalue())
    return files


async def _load(url: str, num_rows: int, clients: int, seconds: float) -> dict[str, Any]:
    """Send requests for some seconds, from when every client has had an answer."""
    import httpx2

    files = [base64.b64encode(content).decode() for content in photos()]
    cells = dict.fromkeys(NUMBERS, 0.5)
    bodies = [
        json.dumps(
            {"rows": [{**cells, "image": files[(i + j) % NUM_PHOTOS]} for j in range(num_rows)]}
        )
        for i in range(NUM_PHOTOS)
    ]
    times: list[tuple[float, float]] = []
    end, cold = math.inf, set(range(clients))
    limits = httpx2.Limits(max_connections=clients)
    headers = {"Content-Type": "application/json"}
    async with httpx2.AsyncClient(timeout=120, limits=limits, headers=headers) as client:

        async def send(first: int) -> None:
            nonlocal end
            number = first
            while (begin := time.perf_counter()) < end:
                response = await client.post(url, content=bodies[number % NUM_PHOTOS])
                response.raise_for_status()
                times.append((begin, time.perf_counter()))
                number += clients
                if first in cold:
                    cold.remove(first)
                    end = end if cold else time.perf_counter() + seconds

        await asyncio.gather(*(send(number) for number in range(clients)))
    counted = np.array([done - begin for begin, done in times if end - seconds <= done <= end])
    return {
        "requests_per_s": len(counted) / seconds,
        "rows_per_s": num_rows * len(counted) / seconds,
        "p50_ms": 1000 * float(np.percentile(counted, 50)),
        "p99_ms": 1000 * float(np.percentile(counted, 99)),
    }


def _bare(run: Path, batch: int, seconds: float) -> float:
    """Return the rows per second of TensorFlow alone."""
    import tensorflow as tf

    model, side = _load_model(run)
    data = tf.data.Dataset.from_tensor_slices(photos()).repeat()
    data = data.map(
        lambda content: tf.cast(
            tf.image.resize(tf.io.decode_jpeg(content, 3), (side, side), antialias=True), tf.uint8
        ),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    batches = iter(data.batch(batch).prefetch(2))
    numbers = tf.fill((batch, len(NUMBERS)), 0.5)
    for _ in range(3):
        model(next(batches), numbers)
    start, num_rows = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        model(next(batches), numbers).numpy()
        num_rows += batch
    return num_rows / (time.perf_counter() - start)


def _fastapi(run: Path, port: int) -> None:
    """Serve a model as the documentation of FastAPI suggests."""
    import cv2
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    model, side = _load_model(run)

    class Row(BaseModel):
        a: float
        b: float
        c: float
        d: float
        e: float
        image: str

    class Rows(BaseModel):
        rows: list[Row]

    app = FastAPI()

    def decode(text: str) -> Any:
        content = np.frombuffer(base64.b64decode(text), np.uint8)
        pixels: Any = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB)
        return cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)

    @app.post("/predict")
    def predict(request: Rows) -> list[float]:
        images = np.stack([decode(row.image) for row in request.rows])
        numbers = np.array([[row.a, row.b, row.c, row.d, row.e] for row in request.rows])
        return model(images, numbers.astype(np.float32)).numpy()[:, 0].tolist()

    for num_rows in (1, 16):
        images = np.zeros((num_rows, side, side, 3), np.uint8)
        model(images, np.zeros((num_rows, len(NUMBERS)), np.float32))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def _load_model(run: Path) -> tuple[Any, int]:
    import tensorflow as tf

    from mm_model import load_model

    model: Any = load_model(run / "model" / "model.keras")
    side = model.network.input["image"].shape[1]
    signature = [
        tf.TensorSpec((None, side, side, 3), tf.uint8),  # type: ignore[call-arg]
        tf.TensorSpec((None, len(NUMBERS)), tf.float32),  # type: ignore[call-arg]
    ]
    call = tf.function(
        lambda image, numeric: model({"image": image, "numeric": numeric}, training=False),
        input_signature=signature,
    )
    return call, side


def _batches() -> tuple[float, float]:
    """Return the rows and the calls of the model so far, from the metrics of Ray."""
    import httpx2
    import ray

    time.sleep(2)  # several intervals of the metrics
    port = ray.nodes()[0]["MetricsExportPort"]
    text = httpx2.get(f"http://127.0.0.1:{port}/metrics").text

    def total(name: str) -> float:
        return sum(map(float, re.findall(rf"^ray_multimodal_{name}{{.*}} (\S+)$", text, re.M)))

    return total("rows_total"), total("batch_rows_count")


def _in_process(function: Any, *arguments: Any) -> Any:
    """Call a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _wait_for(port: int) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.1)


if __name__ == "__main__":
    main()
