"""An S3 server on this machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest

from ray_jobs.storage.folder import Folder


@contextmanager
def s3_folder() -> Iterator[Folder]:
    """An empty folder; its endpoint is in the environment, as for a self-hosted S3."""
    moto_server = pytest.importorskip("moto.server", reason="needs moto[server]")
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with patch.dict(os.environ, environment):
        bucket = Folder("s3://pictures?region=us-east-1&allow_bucket_creation=true")
        bucket.filesystem.create_dir("pictures")
        yield Folder("s3://pictures/data")
    server.stop()
