import asyncio
import base64
import io
import json
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from ray_jobs.cluster import compat_ray
from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import PredictSpec, ServeSpec
from ray_jobs.predict.job import predict
from ray_jobs.serve.job import serve, serving
from tests.ray_jobs.serve.conftest import MAX_MB, NUM_PHOTOS, TOKEN, Server, photo, row_of
from tests.ray_jobs.trained import THRESHOLD


def answers(response: httpx2.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    return response.json()["predictions"]


def detail(response: httpx2.Response, status: int) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["detail"])


@pytest.fixture
def post(server: Server):
    """Post rows, and return the response."""
    return lambda *rows: server.client.post(f"{server.url}/predict", json={"rows": rows})


def test_a_request_has_the_probabilities_that_predict_writes(
    served_run, post, predict_here, tmp_path
):
    predict(
        PredictSpec(
            run=str(served_run / "run"),
            data=str(served_run / "rows.csv"),
            images=str(served_run / "{house}.jpg"),
            output=str(tmp_path),
        )
    )
    expected = pq.read_table(tmp_path)
    # More rows than a batch, with numbers of several types.
    found = answers(post(*(row_of(seed) for seed in range(NUM_PHOTOS))))
    assert [row["key"] for row in found] == expected["key"].to_pylist()
    probability = [row["probability"] for row in found]
    np.testing.assert_allclose(probability, expected["probability"].to_numpy(), atol=1e-6)
    assert len(set(probability)) == NUM_PHOTOS
    labels = ["sold" if p >= THRESHOLD else "unsold" for p in probability]
    assert [row["label"] for row in found] == labels
    for seed in (0, 5):
        (alone,) = answers(post(row_of(seed)))
        assert alone["probability"] == pytest.approx(probability[seed], abs=1e-6)


def test_a_row_that_cannot_be_used_has_its_reason_and_the_others_an_answer(post):
    broken = base64.b64encode(photo(0)[:200]).decode()
    huge = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(huge, "PNG")
    rows = [
        row_of(0),
        row_of(1, image=broken),
        row_of(2, **{"living area": "ninety"}),
        row_of(3, **{"living area": None, "type": None}),
        row_of(4, image=base64.b64encode(huge.getvalue()).decode()),
        row_of(5, type="castle", house=None),
        row_of(6, image="data:image/png;base64,"),
        row_of(7, house=2**127),
    ]
    found = answers(post(*rows))
    reasons = [row["error"] and row["error"].partition(":")[0] for row in found]
    assert reasons == [
        None, "unreadable_image", "non_numeric_text", None, "too_large_image", None,
        "unreadable_image", None,
    ]  # fmt: skip
    for row in found:
        assert (row["probability"] is None) == (row["label"] is None) == (row["error"] is not None)
    assert found[2]["error"] == "non_numeric_text: living area is 'ninety'"
    assert found[6]["error"] == "unreadable_image: the file is empty"
    assert [found[5]["key"], found[7]["key"]] == ["6", str(2**127)]


def test_values_that_no_table_can_contain_have_an_answer_or_a_reason(server, post):
    whole = answers(post(row_of(0, rooms=10**400), row_of(1, rooms=float(10**300))))
    assert [row["error"].partition(":")[0] for row in whole] == ["non_finite_number"] * 2
    content = json.dumps({"rows": [row_of(0, house="\ud800", type="\x00")]})
    (odd,) = answers(server.client.post(f"{server.url}/predict", content=content))
    assert odd["probability"] is not None
    for text in ("1,5", "1.234,5", "2024-01-31", "1 000", "5 €"):
        response = post(row_of(0, rooms=text), row_of(1))
        assert response.status_code in (200, 422)
        assert "--prepare." not in response.text


def test_a_form_has_the_same_answer_as_json(server, post):
    (expected,) = answers(post(row_of(1)))
    cells = {name: str(cell) for name, cell in row_of(1).items() if name != "image"}
    files = {"image": ("photo.png", photo(1))}
    found = server.client.post(f"{server.url}/predict", data=cells, files=files)
    assert answers(found) == [expected]
    found = server.client.post(f"{server.url}/predict", data=cells, files={"photo": photo(1)})
    assert "unknown column" in detail(found, 422)
    found = server.client.post(f"{server.url}/predict", data=cells, files={"rooms": b"3"})
    assert detail(found, 422) == "rooms: unknown column of images"
    form = b'--x\r\nContent-Disposition: form-data; name="rooms"\r\n\r\n3\r\n--x--\r\n'
    for end, status in (("", 422), ("; charset=undefined", 400)):
        headers = {"Content-Type": f"Multipart/Form-Data; boundary=x{end}"}
        found = server.client.post(f"{server.url}/predict", content=form, headers=headers)
        assert detail(found, status)


def test_the_open_inference_protocol_has_the_same_answers(server, post):
    rows = [row_of(seed) for seed in range(3)]
    expected = answers(post(*rows))
    model = f"{server.url}/v2/models/run"
    inputs = [
        {**tensor, "shape": [3], "data": [row[tensor["name"]] for row in rows]}
        for tensor in server.client.get(model).json()["inputs"]
    ]
    assert {tensor["name"]: tensor["datatype"] for tensor in inputs} == {
        "house": "BYTES", "living area": "FP64", "rooms": "FP64", "type": "BYTES",
        "image": "BYTES",
    }  # fmt: skip
    answer = server.client.post(f"{model}/infer", json={"id": "7", "inputs": inputs}).json()
    probability, label = answer["outputs"]
    assert answer["id"] == "7"
    assert probability["data"] == [row["probability"] for row in expected]
    assert label["data"] == [row["label"] for row in expected]
    nested = [{**t, "shape": [3, 1], "data": [[value] for value in t["data"]]} for t in inputs]
    assert server.client.post(f"{model}/infer", json={"id": "7", "inputs": nested}).json() == answer
    json_type = {"Content-Type": "application/json"}
    detail(server.client.post(f"{model}/infer", content=b"{", headers=json_type), 400)
    inputs[0]["shape"] = [2]
    text = detail(server.client.post(f"{model}/infer", json={"inputs": inputs}), 422)
    assert "must have the shape [3]" in text
    for probe in ("live", "ready"):
        assert httpx2.get(f"{server.url}/v2/health/{probe}").status_code == 200


def test_the_error_for_a_wrong_request_says_what_is_wrong(server, post):
    misspelt = {"roms" if name == "rooms" else name: cell for name, cell in row_of(0).items()}
    text = detail(post(row_of(0), misspelt), 422)
    assert "rows.1.roms: unknown column; did you mean 'rooms'?" in text
    assert "rows.1.rooms: Field required" in text
    for address in ("http://127.0.0.1/a.jpg", "file:///etc/hostname", "/etc/hostname"):
        text = detail(post(row_of(0, image=address)), 422)
        assert text == (
            "row 1, image: an image must be base64 or a data URI; the server reads files only in "
            "--image_folders"
        )
    uri = f"data:image/png;base64,{row_of(1)['image']}"
    assert answers(post(row_of(1, image=uri))) == answers(post(row_of(1)))
    assert "at least 1 item" in detail(post(), 422)
    for content in (b"{", b"\xff", b"[" * 100_000):
        detail(server.client.post(f"{server.url}/predict", content=content), 400)


def test_only_images_in_the_allowed_folders_are_read(server, served_run, post):
    folder = served_run / "photos"
    (expected,) = answers(post(row_of(1)))
    (found,) = answers(post(row_of(1, image=f"{folder}/h1.jpg")))
    assert found == expected
    body = {"rows": [row_of(1, image=f"{folder}/h1.jpg")]}
    assert server.client.post(f"{server.url}/explain", json=body).json()["maps"]
    for name in ("absent.jpg", "link.jpg"):
        (found,) = answers(post(row_of(1, image=f"{folder}/{name}")))
        assert found["error"].startswith("missing_image: ")
    outside = (
        f"{served_run}/h1.jpg",
        f"{folder}/../h1.jpg",
        f"{folder}//h1.jpg",
        f"{folder}/./h1.jpg",
        f"file://{folder}/h1.jpg",
        f"{folder}",
        "http://169.254.169.254/latest/meta-data",
    )
    for uri in outside:
        assert "only in --image_folders" in detail(post(row_of(1, image=uri)), 422)


def test_maps_show_what_the_model_looks_at(server):
    body = {"rows": [row_of(1)]}
    maps = server.client.post(f"{server.url}/explain", json=body).json()["maps"]
    header, _, content = maps["image"].partition(",")
    assert (header, list(maps)) == ("data:image/jpeg;base64", ["image"])
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.size == (16, 16)
        assert np.ptp(np.asarray(image)) > 50
    two = {"rows": [row_of(1), row_of(2)]}
    text = detail(server.client.post(f"{server.url}/explain", json=two), 422)
    assert text == "/explain takes one row"
    bad = {"rows": [row_of(1, rooms="many")]}
    text = detail(server.client.post(f"{server.url}/explain", json=bad), 422)
    assert text == "non_numeric_text: rooms is 'many'"


def test_the_second_model_answers_its_share_of_the_requests(server, post):
    models = Counter(post(row_of(0)).json()["model"] for _ in range(100))
    assert models.total() == 100
    # Fewer or more in one of a million runs.
    assert 2 <= models["second"] <= 45


def test_metrics_have_batches_outcomes_and_drift(server, post):
    import ray

    rows = [row_of(seed, rooms=50) for seed in range(NUM_PHOTOS)]
    for _ in range(40):
        answers(post(*rows))
    for _ in range(20):
        # The second model answers some of them.
        answers(post(row_of(0, rooms="many")))
    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"

    def values(name: str) -> dict[str, float]:
        families = text_string_to_metric_families(httpx2.get(url).text)
        samples = [s for f in families for s in f.samples if s.name == name]
        own = [s for s in samples if s.labels["deployment"] == "model"]
        return {s.labels.get("column", s.labels.get("outcome", "")): s.value for s in own}

    # Ray exports metrics every 10 seconds.
    deadline, outcomes = time.monotonic() + 60, {}
    while outcomes.get("ok", 0) < 300 or "non_numeric_text" not in outcomes:
        assert time.monotonic() < deadline
        time.sleep(1)
        outcomes = values("ray_multimodal_rows_total")
    found = values("ray_multimodal_input_psi")
    assert found["rooms"] > 1 > found["type"]
    batches = values("ray_multimodal_batch_rows_count")
    assert 1 <= values("ray_multimodal_batch_rows_sum")[""] / batches[""] <= 4


def test_a_request_without_the_token_or_with_a_large_body_is_rejected(server, post):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
        response = httpx2.post(f"{server.url}/predict", json={"rows": [row_of(0)]}, headers=headers)
        assert "requires a bearer token" in detail(response, 401)
    assert httpx2.get(f"{server.url}/docs").status_code == 401
    large = row_of(0, image="a" * (MAX_MB * 2**20))
    assert detail(post(large), 413) == f"the request exceeds --max_request_mb={MAX_MB}"

    def chunks():
        for _ in range(3 * MAX_MB):
            yield b" " * 2**20

    # Without a Content-Length.
    for path in ("predict", "v2/models/run/infer"):
        detail(server.client.post(f"{server.url}/{path}", content=chunks()), 413)


def test_a_running_ray_serve_keeps_its_address(server):
    other = server.spec.model_copy(update={"port": server.spec.port + 1})
    with (
        pytest.raises(JobError, match=f"already runs on this cluster .*--port {server.spec.port} "),
        serving(other),
    ):
        pass


def test_the_documentation_describes_the_columns_of_the_run(server):
    document = server.client.get(f"{server.url}/openapi.json").json()
    row = document["components"]["schemas"]["Row"]
    assert set(row["properties"]) == {"house", "living area", "rooms", "type", "image"}
    assert set(row["required"]) == {"living area", "rooms", "type", "image"}
    assert "flat, villa" in row["properties"]["type"]["description"]
    body = document["paths"]["/predict"]["post"]["requestBody"]["content"]
    form = body["multipart/form-data"]["schema"]["properties"]
    assert form["image"]["format"] == "binary"
    page = server.client.get(server.url).text
    assert re.findall(r' name="([^"]+)"', page)[1:] == ["image", "living area", "rooms", "type"]
    assert re.findall(r'<option value="(\w+)"', page) == ["flat", "villa"]
    # The page loads nothing from elsewhere.
    assert "http" not in page.replace("http-equiv", "")


def test_a_command_as_in_the_documentation_gets_an_answer(server, served_run):
    command = [
        "curl", "-sS", "--oauth2-bearer", TOKEN, f"{server.url}/predict",
        "-F", f"image=@{served_run}/h1.jpg", "-F", "living area=90", "-F", "rooms=3",
        "-F", "type=flat",
    ]  # fmt: skip
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert '"label":' in printed


def test_overload_is_answered_with_503_and_nothing_accepted_is_lost(server, post):
    expected = answers(post(row_of(0)))

    async def send_many() -> list[httpx2.Response]:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        limits = httpx2.Limits(max_connections=100)
        async with httpx2.AsyncClient(headers=headers, timeout=60, limits=limits) as client:
            url, body = f"{server.url}/predict", {"rows": [row_of(0)]}
            return await asyncio.gather(*(client.post(url, json=body) for _ in range(100)))

    responses = asyncio.run(send_many())
    refused = [response for response in responses if response.status_code == 503]
    accepted = [response for response in responses if response.status_code == 200]
    assert len(refused) + len(accepted) == 100
    assert refused
    assert {response.headers["Retry-After"] for response in refused} == {"1"}
    for response in accepted:
        assert response.json()["predictions"][0]["probability"] == pytest.approx(
            expected[0]["probability"], abs=1e-6
        )


@pytest.mark.parametrize("num_bodies", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_clients_that_hang_up_and_random_bodies_do_no_harm(server, post, num_bodies):
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {TOKEN}\r\n"
    for _ in range(10):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: 100000\r\n\r\n".encode() + b"{" * 500)
    rng, memory = random.Random(0), []
    good = json.dumps({"rows": [row_of(0)]}).encode()
    for number in range(num_bodies):
        body = bytearray(good[: rng.randrange(1, 300)] if rng.random() < 0.5 else good)
        for _ in range(rng.randrange(4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        kind = rng.choice(["application/json", "multipart/form-data; boundary=x", "text/plain"])
        response = server.client.post(
            f"{server.url}/predict", content=bytes(body), headers={"Content-Type": kind}
        )
        assert response.status_code in (200, 400, 422), (response.status_code, response.text, body)
        if number % 1000 == 0:
            memory.append(replica_memory())
    assert answers(post(row_of(0)))
    assert memory[-1] < memory[len(memory) // 4] + 50 * 2**20, memory


def replica_memory() -> int:
    """Return the memory of both replicas in bytes."""
    processes = compat_ray.psutil().Process().children(recursive=True)
    found = [p.memory_info().rss for p in processes if p.name().startswith("ray::ServeRepl")]
    assert len(found) == 2
    return sum(found)


class Load:
    """Sends requests in threads until it is stopped."""

    def __init__(self, server: Server, num_clients: int = 3) -> None:
        self.server, self.is_stopped = server, threading.Event()
        self.responses: list[httpx2.Response] = []
        self.threads = [threading.Thread(target=self._send) for _ in range(num_clients)]

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_stopped.set()
        for thread in self.threads:
            thread.join()

    def _send(self) -> None:
        while not self.is_stopped.is_set():
            url, body = f"{self.server.url}/predict", {"rows": [row_of(0)]}
            self.responses.append(self.server.client.post(url, json=body))

    def wait_for(self, condition: Callable[[httpx2.Response], bool]) -> None:
        deadline = time.monotonic() + 120
        while not (self.responses and condition(self.responses[-1])):
            assert time.monotonic() < deadline
            self.is_stopped.wait(0.1)


@pytest.mark.slow  # starts three replicas
def test_the_model_is_replaced_and_a_killed_replica_restarted_under_load(
    server, served_run, tmp_path
):
    import ray

    shutil.copytree(served_run / "run", tmp_path / "newer")
    newer = server.spec.model_copy(update={"run": str(tmp_path / "newer")})
    for spec, name in ((newer, "newer"), (server.spec, "run")):
        with Load(server) as load:
            load.wait_for(lambda response: response.status_code == 200)
            with serving(spec):
                load.wait_for(lambda response, name=name: response.json()["model"] == name)
        assert {response.status_code for response in load.responses} == {200}
        models = {response.json()["model"] for response in load.responses}
        assert models == {"run", "newer", "second"}
    with Load(server) as load:
        load.wait_for(lambda response: response.status_code == 200)
        (replica,) = [
            actor
            for actor in ray.util.list_named_actors(all_namespaces=True)
            if actor["name"].startswith("SERVE_REPLICA::") and "#model#" in actor["name"]
        ]
        ray.kill(ray.get_actor(**replica), no_restart=True)
        load.wait_for(lambda response: response.status_code != 200)
        load.wait_for(lambda response: response.status_code == 200)
    # Those that it was answering, and those that found the queue full.
    statuses = Counter(response.status_code for response in load.responses)
    assert set(statuses) <= {200, 500, 502, 503}
    assert statuses[500] + statuses[502] <= 3


def test_a_missing_token_file_or_run_is_rejected(served_run, no_ray, tmp_path):
    with pytest.raises(JobError, match="is not a run folder"):
        serve(ServeSpec(run=str(tmp_path)))
    spec = ServeSpec(run=str(served_run / "run"), token_file=str(tmp_path / "none"))
    with pytest.raises(JobError, match="could not read --token_file="):
        serve(spec)
    (tmp_path / "empty").touch()
    with pytest.raises(JobError, match="is empty; write a token into it"):
        serve(spec.model_copy(update={"token_file": str(tmp_path / "empty")}))
