"""A run with photos, numbers and words, the requests for it, and a real server."""

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mm_model.statistics import fit_numeric_statistics, fit_vocabulary
from ray_jobs.config.inference_spec import ServeSpec
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.serve.job import serving
from ray_jobs.storage.folder import Folder
from ray_jobs.train.finalize import REFERENCE
from tests.ray_jobs.heads import free_ports
from tests.ray_jobs.tiny import write_prepared
from tests.ray_jobs.trained import write_run
from tests.ray_jobs.tune.searches import require_nothing_left

TOKEN = "secret"
NUM_PHOTOS = 12
MAX_MB = 2
SECOND_SHARE = 0.2


def photo(seed: int, side: int = 40) -> bytes:
    """Return a photo that is not square."""
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side + 9, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG" if seed % 2 else "JPEG")
    return stream.getvalue()


def row_of(seed: int, **changes: Any) -> dict[str, Any]:
    """Return a row of a request."""
    image = base64.b64encode(photo(seed)).decode()
    cells = {"living area": 80.5 + 10 * seed, "rooms": 1 + seed % 5, "type": "flat"}
    return {"house": f"h{seed}", **cells, "image": image} | changes


@pytest.fixture(scope="session")
def served_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `run`, the table `rows.csv` of the rows of `row_of`, and their photos."""
    folder = tmp_path_factory.mktemp("served")
    columns = ("living area", "rooms")
    numbers = np.random.default_rng(1).normal([150, 3], [30, 1], (40, 2))
    prepare = PrepareSpec(
        key_column="house", label_column="sold", image_pattern="{house}.jpg", image_size=16
    )
    changes = {
        "prepare": prepare,
        "numeric_columns": columns,
        "statistics": fit_numeric_statistics(numbers, columns),
        "vocabularies": (fit_vocabulary(["flat", "villa"] * 9, "type"),),
        "negative_label": "unsold",
        "positive_label": "sold",
    }
    sizes = {"train": 9, "validation": 9, "test": 9}
    manifest = write_prepared(folder / "prepared", sizes).model_copy(update=changes)
    write_run(folder / "run", manifest)
    reference = {"living area": numbers[:, 0], "rooms": numbers[:, 1], "type": ["flat"] * 40}
    Folder(folder / "run").write_parquet(REFERENCE, pa.table(reference))
    lines = ["house,living area,rooms,type"]
    for seed in range(NUM_PHOTOS):
        cells = row_of(seed)
        lines.append(",".join(str(cells[name]) for name in lines[0].split(",")))
        (folder / f"h{seed}.jpg").write_bytes(photo(seed))
    shutil.copytree(folder / "run", folder / "second")
    (folder / "photos").mkdir()
    (folder / "photos" / "h1.jpg").write_bytes(photo(1))
    (folder / "photos" / "link.jpg").symlink_to(folder / "h2.jpg")
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return folder


class Server(NamedTuple):
    """A running server."""

    spec: ServeSpec
    url: str
    client: httpx2.Client
    """Sends the token."""


@pytest.fixture(scope="module")
def server(served_run: Path, ray_local: None) -> Iterator[Server]:
    """A server on a real Ray, which requires a token."""
    from ray import serve

    token = served_run / "token"
    token.write_text(TOKEN + "\n")
    spec = ServeSpec(
        run=str(served_run / "run"),
        port=int(free_ports(1)[0]),
        token_file=str(token),
        max_batch_size=4,
        max_queued_requests=8,
        max_request_mb=MAX_MB,
        image_folders=(str(served_run / "photos"),),
        second_run=str(served_run / "second"),
        second_share=SECOND_SHARE,
    )
    try:
        with (
            serving(spec) as (url, _, _),
            httpx2.Client(headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client,
        ):
            yield Server(spec, url, client)
    finally:
        serve.shutdown()
    require_nothing_left()
