"""An application on a cluster from a configuration, and a second model."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import ServeSpec
from ray_jobs.predict.trained_run import open_run
from ray_jobs.serve.job import serve
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.heads import free_ports, running_head
from tests.ray_jobs.serve.conftest import row_of


@pytest.mark.slow  # starts a cluster
def test_serve_deploy_accepts_the_configuration(served_run, no_ray, tmp_path):
    (port,) = free_ports(1)
    file = tmp_path / "serve.yaml"
    serve(
        ServeSpec(
            run=str(served_run / "run"),
            second_run=str(served_run / "second"),
            port=int(port),
            config_file=str(file),
        )
    )
    with running_head(tmp_path / "head.log") as environment:
        command = [str(Path(sys.executable).with_name("serve")), "deploy", str(file)]
        address = environment["RAY_API_SERVER_ADDRESS"]
        subprocess.run([*command, "--address", address], env=environment, check=True)
        deadline = time.monotonic() + 120
        while True:
            assert time.monotonic() < deadline
            try:
                body = {"rows": [row_of(0)]}
                response = httpx2.post(f"http://127.0.0.1:{port}/predict", json=body, timeout=60)
            except httpx2.TransportError:
                continue
            if response.status_code == 200:
                break
    assert response.json()["predictions"][0]["label"] in ("sold", "unsold")


def test_a_second_model_with_other_inputs_and_a_folder_on_the_web_are_refused(
    served_run, no_ray, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(served_run / "run", other)
    manifest = open_run(str(other)).manifest
    changes = {"numeric_columns": ("area", "rooms"), "statistics": None}
    os.remove(other / "manifest.json")
    manifest.model_copy(update=changes).write(Folder(other))
    spec = ServeSpec(run=str(served_run / "run"), second_run=str(other))
    with pytest.raises(JobError, match=r"takes other inputs \(area, rooms, type, image, house\)"):
        serve(spec)
    spec = ServeSpec(run=str(served_run / "run"), image_folders=("https://example.org/photos",))
    with pytest.raises(JobError, match="names the web address https://example"):
        serve(spec)
