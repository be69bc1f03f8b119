"""Convert the model of a run for other runtimes.

Writes saved_model/, model.onnx or model.tflite, and export.json: how far the probabilities of
held-out rows differ from those of the run, metrics before and after, size, time per row, and the
codes of the words. ONNX and LiteRT take decoded pixels and codes of words.

Run:   python -m ray_jobs.export --run runs/first --format onnx
       python -m ray_jobs.export --run runs/first --format litert --precision int8
"""

import hashlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ray_jobs.cluster.stderr_filter import drop_stderr_lines
from ray_jobs.cluster.worker_group import import_keras
from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import ExportSpec
from ray_jobs.config.prepare_spec import Split
from ray_jobs.config.text import names_text, number_text
from ray_jobs.data.batch import FEATURES, INPUT_TYPES, LABEL
from ray_jobs.data.manifest import MANIFEST, Manifest, read_manifest, require_shards
from ray_jobs.data.reader import sample_columns
from ray_jobs.export import conversion, photo_check, runners
from ray_jobs.predict.trained_run import TrainedRun, open_run, require_match
from ray_jobs.storage.folder import Folder
from ray_jobs.train.finalize import MODEL
from ray_jobs.train.metrics import binary_metrics

EXPORT = "export.json"
PRECISIONS = {
    "saved_model": ("float32",),
    "onnx": ("float32", "int8"),
    "litert": ("float32", "float16", "int8"),
}
FILES = {"saved_model": "saved_model", "onnx": "model.onnx", "litert": "model.tflite"}
_MODULES = {
    "saved_model": (),
    "onnx": ("onnx", "onnxruntime", "tf2onnx"),
    "litert": ("ai_edge_litert",),
}
_LOG_LINES = ("All log messages before absl", "cudart_stub.cc", "XNNPACK delegate")
"""Lines that TensorFlow and LiteRT print whatever the log level is."""
_METRICS = ("roc_auc", "pr_auc", "log_loss", "ece")
_CALIBRATION_ROWS = 128
_TIMED_ROWS = 50
_BATCH = 32

Batch = Mapping[str, np.ndarray]


def export(spec: ExportSpec) -> dict[str, Any]:
    """Convert the model of a run and return the content of export.json.

    Raises:
        JobError: If the run is not finished, the format lacks an operation of the model or has
            another precision, a package is not installed, or the data does not match the run.
    """
    _require_format(spec)
    run = open_run(spec.run)
    if FEATURES in run.input_shapes:
        raise JobError(f"the model of {run.folder} takes features of a backbone; export another")
    data = Folder(spec.data or _trained_data(run))
    manifest = _read_data(run, data, spec)
    output = Folder(spec.output or f"{run.folder}/export/{spec.format}-{spec.precision}")
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as local, drop_stderr_lines(*_LOG_LINES):
        os.environ["KERAS_BACKEND"] = "tensorflow"
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import_keras()
        from ray_jobs.cluster.strategy import set_devices

        set_devices(1, use_gpu=False)
        path, content = f"{local}/{FILES[spec.format]}", run.folder.read_bytes(MODEL)
        with console.status(f"converting to {spec.format}"):
            calibration = _batches(run, data, manifest, "train", _CALIBRATION_ROWS)
            model = _convert(run, content, path, spec, (inputs for inputs, _ in calibration))
        with console.status("comparing with the run"):
            found = _describe(run, spec, hashlib.sha256(content).hexdigest(), path)
            found |= _compare(run, data, manifest, spec, model, path)
        output.delete(FILES[spec.format])
        output.upload(path, FILES[spec.format])
        output.write_json(EXPORT, found)
    _print(console, found, output)
    return found


def _require_format(spec: ExportSpec) -> None:
    precisions = PRECISIONS[spec.format]
    if spec.precision not in precisions:
        raise JobError(
            f"--format {spec.format} has no --precision {spec.precision}; choose one of "
            f"{names_text(precisions)}"
        )
    missing = [name for name in _MODULES[spec.format] if importlib.util.find_spec(name) is None]
    if missing:
        raise JobError(
            f"--format {spec.format} needs `pip install 'multimodal-ray[export]'` "
            f"({names_text(missing)} not found)"
        )


def _trained_data(run: TrainedRun) -> str:
    """Return the prepared data that a run was trained on."""
    if not run.folder.exists("run.yaml"):
        raise JobError(
            f"{run.folder} has no run.yaml, which names the data it was trained on; set --data"
        )
    return yaml.safe_load(run.folder.read_bytes("run.yaml"))["data"]["prepared"]


def _read_data(run: TrainedRun, data: Folder, spec: ExportSpec) -> Manifest:
    if not data.exists(MANIFEST):
        raise JobError(f"{data} has no {MANIFEST}; set --data to prepared data of the run")
    manifest = read_manifest(data)
    require_match(run, manifest, data)
    splits: tuple[Split, ...] = ("train", spec.split) if spec.precision == "int8" else (spec.split,)
    require_shards(data, manifest, splits)
    if not manifest.splits[spec.split].num_rows:
        raise JobError(f"the {spec.split} split of {data} has no rows; choose another --split")
    return manifest


def _batches(
    run: TrainedRun, data: Folder, manifest: Manifest, split: Split, num_rows: int
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield inputs and labels of some rows of a split."""
    shards = manifest.splits[split].shards
    table = sample_columns(data, shards, run.decoder.columns, num_rows)
    for start in range(0, table.num_rows, _BATCH):
        batch = run.decoder.decode(table.slice(start, _BATCH))
        yield {name: batch[name] for name in run.input_shapes}, batch[LABEL][:, 0]


def _convert(
    run: TrainedRun, content: bytes, path: str, spec: ExportSpec, calibration: Iterator[Batch]
) -> runners.Runner:
    """Write the converted model, and return a function that calls the model of the run."""
    import tensorflow as tf

    from mm_model import load_model
    from ray_jobs.train.finalize import export_saved_model

    with tempfile.TemporaryDirectory() as local:
        Path(local, "model.keras").write_bytes(content)
        model: Any = load_model(f"{local}/model.keras")
        if spec.format == "onnx":
            is_quantized = spec.precision == "int8"
            conversion.write_onnx(model, path, calibration if is_quantized else None)
        else:
            saved = path if spec.format == "saved_model" else f"{local}/saved_model"
            export_saved_model(model, run.manifest, saved)
            if spec.format == "litert":
                conversion.write_litert(saved, path, spec.precision)
    call = tf.function(
        lambda inputs: model(inputs, training=False), reduce_retracing=True, autograph=False
    )
    return lambda inputs: call({n: tf.constant(v) for n, v in inputs.items()}).numpy()[:, 0]


def _compare(
    run: TrainedRun,
    data: Folder,
    manifest: Manifest,
    spec: ExportSpec,
    model: runners.Runner,
    path: str,
) -> dict[str, Any]:
    """Return the differences between the probabilities of the run and of the export."""
    openers: dict[str, Callable[[str], runners.Runner]] = {
        "saved_model": runners.open_saved_model,
        "onnx": runners.open_onnx,
        "litert": runners.open_litert,
    }
    exported = openers[spec.format](path)
    labels, before, after = [], [], []
    first: Batch = {}
    for inputs, label in _batches(run, data, manifest, spec.split, spec.max_rows):
        first = first or inputs
        labels.append(label)
        before.append(model(inputs))
        after.append(exported(inputs))
    label_N, before_N, after_N = (np.concatenate(part) for part in (labels, before, after))
    metrics = {
        name: binary_metrics(label_N, probability_N.astype(np.float64), run.threshold)
        for name, probability_N in (("run", before_N), ("export", after_N))
    }
    changed = (before_N >= run.threshold) != (after_N >= run.threshold)
    found: dict[str, Any] = {
        "split": spec.split,
        "num_rows": len(label_N),
        "largest_difference": float(np.abs(after_N - before_N).max()),
        "num_changed_labels": int(changed.sum()),
        "metrics": {k: {n: v[n] for n in _METRICS} for k, v in metrics.items()},
        "ms_per_row": {"run": _ms_per_row(model, first), "export": _ms_per_row(exported, first)},
    }
    if spec.format == "saved_model" and run.takes_images:
        photos = photo_check.PhotoRows.of(run)
        if isinstance(photos, str):
            found["photos"] = {"num_rows": 0, "reason": photos}
        else:
            raw = runners.open_saved_model(path, "serving_default")
            difference = photo_check.largest_difference(run, photos, model, raw)
            found["photos"] = {
                "num_rows": len(photos.contents),
                "largest_difference": difference,
            }
    return found


def _ms_per_row(call: runners.Runner, inputs: Batch) -> float:
    """Return the median time of a call with one row, on one thread."""
    num_rows = len(next(iter(inputs.values())))
    rows = [{n: v[i : i + 1] for n, v in inputs.items()} for i in range(num_rows)]
    call(rows[0])
    times = []
    for i in range(_TIMED_ROWS):
        start = time.perf_counter()
        call(rows[i % num_rows])
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def _describe(run: TrainedRun, spec: ExportSpec, sha256: str, path: str) -> dict[str, Any]:
    """Return what a program needs to call the exported model."""
    files = [file for file in [Path(path), *Path(path).rglob("*")] if file.is_file()]
    own = run.decoder.manifest
    return {
        "run": str(run.folder),
        "model_sha256": sha256,
        "format": spec.format,
        "precision": spec.precision,
        "file": FILES[spec.format],
        "size_mib": sum(file.stat().st_size for file in files) / 2**20,
        "inputs": {
            name: {"shape": [None, *shape], "type": np.dtype(INPUT_TYPES[name]).name}
            for name, shape in run.input_shapes.items()
        },
        "numeric_columns": list(own.numeric_columns),
        "categories": {
            v.column: {word: code for code, word in enumerate(v.words, start=2)}
            for v in own.vocabularies
        },
        "text_columns": list(own.text_columns),
        "image_columns": list(run.manifest.image.names),
        "negative_label": run.manifest.negative_label,
        "positive_label": run.manifest.positive_label,
        "decision_threshold": run.threshold,
    }


def _print(console: Any, found: Mapping[str, Any], output: Folder) -> None:
    from rich.markup import escape

    name = escape(f"{output}/{found['file']}")
    run, export = found["metrics"]["run"], found["metrics"]["export"]
    console.print(f"[bold]{name}[/bold]  {found['size_mib']:.1f} MiB")
    console.print(
        f"{found['num_rows']} {found['split']} rows: largest difference in probability "
        f"{found['largest_difference']:.2g}, {found['num_changed_labels']} labels changed; "
        f"ROC AUC {number_text(run['roc_auc'], 4)} → {number_text(export['roc_auc'], 4)}, "
        f"log loss {number_text(run['log_loss'], 4)} → {number_text(export['log_loss'], 4)}"
    )
    times = found["ms_per_row"]
    console.print(f"one row on one CPU thread: {times['run']:.1f} → {times['export']:.1f} ms")
    if photos := found.get("photos"):
        text = photos.get("reason") or (
            f"largest difference from predict {photos['largest_difference']:.2g}"
        )
        console.print(f"{photos['num_rows']} image files: {escape(text)}")
