import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from ray_jobs.checks.local import hub_problem, weights_problem


def test_imagenet_weights_are_downloaded_or_found_in_the_cache_of_keras(tmp_path, monkeypatch):
    models = tmp_path / "models"
    models.mkdir()
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr("ray_jobs.checks.local._IMAGENET", "https://127.0.0.1:1/")
    problem = weights_problem("imagenet", "efficientnet_b5")
    assert problem.startswith("https://127.0.0.1:1/: not reachable")
    (models / "efficientnetb5_notop.h5").write_bytes(b"")
    assert weights_problem("imagenet", "efficientnet_b5") == ""
    (models / "weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5").write_bytes(b"")
    assert weights_problem("imagenet", "mobilenet_v3_small") == ""


def test_weights_must_exist_at_their_path_or_uri(tmp_path):
    file = tmp_path / "own.weights.h5"
    assert weights_problem(str(file), "tiny") == "there is no such file"
    assert weights_problem(file.as_uri(), "tiny") == "there is no such object"
    file.write_bytes(b"")
    assert weights_problem(str(file), "tiny") == weights_problem(file.as_uri(), "tiny") == ""


class Signed(BaseHTTPRequestHandler):
    """Answers requests whose URL is signed for GET."""

    def do_GET(self) -> None:
        self.send_response(206 if self.path.endswith("?key=of-get") else 403)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


def test_a_signed_url_is_requested_with_get():
    with HTTPServer(("127.0.0.1", 0), Signed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        file = f"http://127.0.0.1:{server.server_port}/a.weights.h5"
        assert weights_problem(f"{file}?key=of-get", "tiny") == ""
        assert weights_problem(f"{file}?key=other", "tiny") == "the server answers 403"
        server.shutdown()


def test_weights_of_packages_and_folders(tmp_path, monkeypatch):
    assert weights_problem(str(tmp_path), "vit_base") == ""
    assert weights_problem(tmp_path.as_uri(), "bert_base") == ""
    assert weights_problem("preset:vit_base_patch16_224_imagenet", "vit_base") == ""
    assert weights_problem("package", "efficientnet_lite0") == ""
    assert hub_problem() == ""
    monkeypatch.setattr("ray_jobs.checks.local.find_spec", lambda name: None)
    assert (
        weights_problem("package", "efficientnet_lite0") == "the extra `weights` is not installed"
    )
    assert hub_problem() == "not installed: keras_hub, safetensors, tokenizers"
