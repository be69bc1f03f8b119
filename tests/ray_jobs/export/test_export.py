"""The verb on a run of rows with photos, numbers and words."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import ExportSpec
from ray_jobs.export.job import PRECISIONS, export
from ray_jobs.predict.trained_run import open_run
from ray_jobs.storage.folder import Folder
from ray_jobs.train.metrics import binary_metrics
from tests.ray_jobs.raw import Raw
from tests.ray_jobs.trained import THRESHOLD, stored_rows, write_run

GUIDE = Path(__file__).parents[3] / "docs" / "export.md"


@pytest.fixture(scope="module")
def raw(ray_local, tmp_path_factory) -> Raw:
    """A folder with a table, images, prepared data `out`, and a `run`."""
    from ray_jobs.prepare.job import prepare

    raw = Raw(tmp_path_factory.mktemp("raw")).add(range(60))
    for i, row in enumerate(raw.rows):
        row["town"] = ("", "Ulm", "Ulm")[i % 3]
        row["postcode"] = 93_000 + i  # more digits than float16 has
    manifest = prepare(raw.spec(categorical=("town",)))
    write_run(raw.folder / "run", manifest)
    (raw.folder / "run" / "run.yaml").write_text(f"data: {{prepared: {raw.out()}}}\n")
    return raw


@pytest.fixture
def export_here(monkeypatch) -> None:
    """TensorFlow is already initialized in this process, so its threads cannot be set."""
    monkeypatch.setattr("ray_jobs.cluster.strategy.set_devices", lambda num_cpus, use_gpu: None)


def spec_of(raw: Raw, **changes: Any) -> ExportSpec:
    return ExportSpec(**{"run": str(raw.folder / "run"), **changes})


@pytest.mark.parametrize(
    ("kind", "precision"), [(k, p) for k, all_of in PRECISIONS.items() for p in all_of]
)
def test_every_format_and_precision_is_compared_with_the_run(raw, export_here, kind, precision):
    from mm_model import load_model

    found = export(spec_of(raw, format=kind, precision=precision))
    folder = raw.folder / "run" / "export" / f"{kind}-{precision}"
    assert json.loads((folder / "export.json").read_text()) == found
    assert (folder / found["file"]).exists()
    run = open_run(str(raw.folder / "run"))
    rows = stored_rows(raw.out(), run.manifest, "test").select(run.decoder.columns)
    model = load_model(raw.folder / "run" / "model" / "model.keras")
    batch = run.decoder.decode(rows)
    probability = np.asarray(model(batch))[:, 0].astype(np.float64)
    expected = binary_metrics(batch["label"], probability[:, None], THRESHOLD)
    assert found["num_rows"] == len(probability) > 5
    for name, value in found["metrics"]["run"].items():
        assert value == pytest.approx(expected[name], abs=1e-6), name
    limit = {"float32": 1e-5, "float16": 0.001, "int8": 0.2}[precision]
    assert found["largest_difference"] < limit
    if precision == "int8":
        assert num_int8_weights(folder / found["file"]) > 1000
    assert found["categories"] == {"town": {"Ulm": 2}}
    assert found["inputs"]["image"] == {"shape": [None, 24, 24, 3], "type": "uint8"}
    assert all(value > 0 for value in found["ms_per_row"].values())


def num_int8_weights(file: Path) -> int:
    """Return how many weights of a model are stored in 8 bits."""
    if file.suffix == ".onnx":
        import onnx

        tensors = onnx.load(file).graph.initializer
        return sum(int(np.prod(t.dims)) for t in tensors if t.data_type == onnx.TensorProto.INT8)
    from ai_edge_litert.interpreter import Interpreter

    details = Interpreter(str(file)).get_tensor_details()
    return sum(int(np.prod(t["shape"])) for t in details if t["dtype"] == np.int8)


def test_the_saved_model_answers_to_image_files_numbers_and_words(raw):
    """By the example in the guide, in a process without this package."""
    command = [sys.executable, "-m", "ray_jobs.export", "--format", "saved_model"]
    done = subprocess.run(
        [*command, "--run", str(raw.folder / "run")], capture_output=True, text=True, check=True
    )
    assert "60 image files: largest difference from predict" in done.stdout
    assert done.stderr == ""
    folder = raw.folder / "run" / "export" / "saved_model-float32"
    found = json.loads((folder / "export.json").read_text())
    assert found["photos"]["num_rows"] == 60
    assert found["photos"]["largest_difference"] < 0.01
    (script,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    for text, own in {
        "runs/NAME/model/saved_model": str(folder / "saved_model"),
        "photo.jpg": str(raw.folder / "images" / "k1.jpg"),
        "71.2, 1.01": "1.5, 1.0, 93001.0",
        "steel": "Ulm",
    }.items():
        assert text in script
        script = script.replace(text, own)
    script += "\nprint(float(answer['probability'][0, 0]))"
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=folder
    )
    expected = predicted(raw, "k1")
    assert float(answer.stdout) == pytest.approx(expected, abs=0.01)


def predicted(raw: Raw, key: str) -> float:
    """Return the probability of a stored row."""
    from mm_model import load_model

    run = open_run(str(raw.folder / "run"))
    for split in run.manifest.splits:
        rows = stored_rows(raw.out(), run.manifest, split).select(run.decoder.columns)
        keys = rows["key"].to_pylist()
        if key in keys:
            row = run.decoder.decode(rows.slice(keys.index(key), 1))
            model = load_model(raw.folder / "run" / "model" / "model.keras")
            return float(np.asarray(model(row))[0, 0])
    raise KeyError(key)


def test_unsuitable_settings_are_refused(raw, tmp_path, monkeypatch):
    with pytest.raises(JobError, match="--format onnx has no --precision float16; choose one of"):
        export(spec_of(raw, precision="float16"))
    with pytest.raises(JobError, match=r"has no manifest\.json; set --data to prepared data"):
        export(spec_of(raw, data=str(tmp_path)))
    run = Path(raw.folder / "run")
    Folder(tmp_path / "run").upload(run / "manifest.json", "manifest.json")
    Folder(tmp_path / "run").upload(run / "summary.json", "summary.json")
    Folder(tmp_path / "run").upload(run / "model", "model")
    with pytest.raises(JobError, match=r"has no run\.yaml, which names the data it was trained on"):
        export(ExportSpec(run=str(tmp_path / "run")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(JobError, match=r"needs `pip install 'multimodal-ray\[export\]'` \(onnx, "):
        export(spec_of(raw))
