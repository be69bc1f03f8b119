"""Rows of requests, and what a replica counts, without a server."""

import asyncio
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ray_jobs.predict.predictor import LOGITS
from ray_jobs.predict.row_sources import ERROR
from ray_jobs.predict.trained_run import open_run
from ray_jobs.serve.access_rules import AccessRules
from ray_jobs.serve.image_folders import ImageFolders
from ray_jobs.serve.replica_metrics import MIN_ROWS, ReplicaMetrics
from ray_jobs.serve.request_rows import RequestReader
from tests.ray_jobs.serve.conftest import photo, row_of


def reader_of(folder: Path, **changes: Any) -> RequestReader:
    """Return a reader for a run that was prepared with other settings."""
    run = open_run(str(folder / "run"))
    prepare = run.manifest.prepare.model_copy(update=changes)
    manifest = run.manifest.model_copy(update={"prepare": prepare})
    manifest.write(run.folder)
    try:
        return RequestReader(open_run(str(folder / "run")), ImageFolders((), 2**20))
    finally:
        run.manifest.write(run.folder)


def test_a_row_of_a_table_whose_keys_are_its_images_has_its_position_as_key(served_run):
    reader = reader_of(served_run, key_column="image")
    row = {**row_of(0), "image": photo(0)}
    assert reader.key(row, 3) == "4"
    assert reader.read([reader.prepare_images(row)])[ERROR].to_pylist() == [None]


def test_a_large_integer_does_not_change_how_other_rows_are_read(served_run):
    reader = reader_of(served_run)
    rows = [{**row_of(i), "image": photo(i)} for i in range(2)]
    alone = reader.read([reader.prepare_images(rows[0])])
    both = [rows[0] | {"type": 7}, rows[1] | {"type": 10**20}, rows[1] | {"rooms": 10**20}]
    read = reader.read([reader.prepare_images(row) for row in [rows[0], *both]])
    assert read.slice(0, 1).equals(alone)
    assert read[ERROR].to_pylist() == [None] * 4


def test_only_usable_rows_are_kept_for_the_drift_which_is_updated_steadily(served_run):
    metrics = ReplicaMetrics(open_run(str(served_run / "run")))

    def count(error: str | None) -> bool:
        rows = pa.table({"numeric": [[0.0, 0.0]] * 50})
        errors = pa.array([error] * 50, pa.string())
        return metrics.count(rows, pa.table({LOGITS: [[0.0] * 3] * 50, ERROR: errors}))

    assert not any(count("unreadable_image: x") for _ in range(100))
    assert not metrics._recent
    due = [50 * (i + 1) for i in range(100) if count(None)]
    assert due == [MIN_ROWS, 200, 400, 800, 1600, 2600, 3600, 4600]
    assert sum(inputs.num_rows for inputs, _ in metrics._recent) == 2000


def test_images_of_object_storage_are_named_without_its_options():
    folders = ImageFolders(("s3://bucket/photos?region=eu-west-1",), 2**20)
    assert "s3://bucket/photos/a.jpg" in folders
    assert "s3://bucket/photos/a.jpg?endpoint_override=evil" not in folders


def test_the_name_of_a_local_image_may_contain_any_character(tmp_path):
    (tmp_path / "a #1?.jpg").write_bytes(b"content")
    folders = ImageFolders((str(tmp_path),), 2**20)
    assert folders.read(f"{tmp_path}/a #1?.jpg") == b"content"


@pytest.mark.parametrize(
    ("host", "token", "status"),
    [
        ("127.0.0.1:8000", None, 200),
        ("LOCALHOST", None, 200),
        ("[::1]:8000", None, 200),
        ("evil.example:8000", None, 400),
        ("", None, 400),
        ("proxy.example", "secret", 200),
    ],
)
def test_a_private_server_answers_to_its_own_name_only(host, token, status):
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", host.encode()), (b"authorization", b"Bearer secret")]
    scope = {"type": "http", "path": "/predict", "headers": headers}
    rules = AccessRules(app, token, 100, is_private=True)
    asyncio.run(rules(scope, asyncio.Queue().get, send))
    assert sent[0]["status"] == status
