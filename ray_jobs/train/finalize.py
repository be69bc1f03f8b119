"""Turns the best epoch into the final model: blended, calibrated, saved and summarized.

Inputs: the loop after training, on rank 0.  Outputs: model/model.keras, model/saved_model,
validation.parquet, embeddings.parquet and summary.json in the run folder.
"""

import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ray_jobs.config.spec import RunSpec
from ray_jobs.data.batch import FEATURES, IMAGE, INPUT_TYPES, LABEL, WEIGHT
from ray_jobs.data.decoder import RowDecoder
from ray_jobs.data.manifest import Manifest
from ray_jobs.data.reader import sample_columns
from ray_jobs.data.text_input import text_reader
from ray_jobs.storage.folder import Folder

if TYPE_CHECKING:
    from mm_model.model import FusionModel
    from ray_jobs.train.checkpoints.checkpoint import LoopState
    from ray_jobs.train.loop import Loop

SUMMARY = "summary.json"
"""Written last, so a run whose folder has a summary is finished."""
MODEL = "model/model.keras"
VALIDATION = "validation.parquet"
"""The validation rows as the final model predicts them: label, probability, logits of the heads,
and weight if the data has weights."""
REFERENCE = "reference.parquet"
"""Numbers and words of a sample of the training rows."""

EMBEDDINGS = "embeddings.parquet"
"""A sample of the training and validation rows as the final model sees them: split, label,
probability, the embedding of each head, and weight if the data has weights."""

_REFERENCE_ROWS = 2000
_EMBEDDED_ROWS = 512  # of each split
_BATCH = 32


def finalize(loop: "Loop", state: "LoopState", folder: Folder, train_s: float) -> dict[str, Any]:
    """Write the best model, blended and calibrated on the validation rows, then the summary.

    Args:
        loop: The loop that trained the model.
        state: The state at the end of training.
        folder: The run folder.
        train_s: Training time of the last attempt in seconds.
    """
    from mm_model.calibration import fit_blend, fit_calibration, log_loss, sigmoid
    from mm_model.compat_keras import finalize_normalization
    from ray_jobs.train.checkpoints.checkpoint import assign
    from ray_jobs.train.metrics import choose_threshold, validation_metrics
    from ray_jobs.train.model_factory import float32_copy

    best_epoch = int(state.best_epoch or 0)
    spec, best = loop.spec, loop.best[best_epoch]
    label_N, weight_N = best.label_N, best.weight_N
    if weight_N is not None:
        # The strength of the priors is that of a number of rows.
        weight_N = weight_N.astype("float64") / weight_N.mean(dtype="float64")
    model = float32_copy(loop.model)
    assign(model.variables, best.model, "best weights")
    finalize_normalization(model)
    blend_M, bias = model.blend.weights_M(), -loop.logit_shift
    logits_NM = best.head_logits_NM.astype("float64")
    before = log_loss(logits_NM @ blend_M + bias, label_N, weight_N)
    scale = 1.0
    if spec.train.calibrate:
        if model.blends:
            blend_M = fit_blend(logits_NM, label_N, weight_N=weight_N)
            model.blend.set(blend_M)
        scale, bias = fit_calibration(logits_NM @ blend_M, label_N, weight_N)
    model.calibration.set([scale], bias)
    probability_N = sigmoid(scale * (logits_NM @ blend_M) + bias)
    with tempfile.TemporaryDirectory() as path:
        model.save(f"{path}/model.keras")
        export_saved_model(model, loop.manifest, f"{path}/saved_model")
        folder.delete("model")
        folder.upload(path, "model")
    write_validation(folder, label_N, probability_N, best.weight_N, logits_NM)
    write_embeddings(folder, model, spec, loop.manifest)
    summary = {
        "run": spec.run.name,
        "epochs": state.epoch,
        "steps": state.step,
        "best_epoch": best_epoch + 1,
        "stopped_early": state.epoch < spec.train.epochs,
        "decision_threshold": choose_threshold(
            label_N, probability_N, spec.train.decision_threshold, weight_N
        ),
        "validation": validation_metrics(label_N, probability_N, weight_N),
        "calibration": {
            "scale": scale,
            "bias": bias,
            "blend": dict(zip(model.heads, map(float, blend_M), strict=True)),
            "validation_log_loss_before": before,
        },
        "num_parameters": model.count_params(),
        "num_workers": loop.context.num_workers,
        "train_s": train_s,
    }
    folder.write_json(SUMMARY, summary)
    return summary


def write_validation(
    folder: Folder,
    label_N: np.ndarray,
    probability_N: np.ndarray,
    weight_N: np.ndarray | None,
    logits_NM: np.ndarray | None = None,
) -> None:
    """Write `VALIDATION`, on which `evaluate` chooses thresholds."""
    columns: dict[str, Any] = {"label": label_N.astype("int8"), "probability": probability_N}
    if weight_N is not None:
        columns["weight"] = weight_N
    if logits_NM is not None:
        columns["logits"] = list(logits_NM.astype("float32"))
    folder.write_parquet(VALIDATION, pa.table(columns))


def write_reference(folder: Folder, data: Folder, manifest: Manifest) -> None:
    """Write `REFERENCE`, by which `evaluate` and `predict` recognize rows unlike those of training.

    Args:
        folder: The run folder.
        data: The prepared data that the run was trained on.
        manifest: Its manifest.
    """
    columns = [*manifest.numeric_columns, *(v.column for v in manifest.vocabularies)]
    shards = manifest.splits["train"].shards
    folder.write_parquet(REFERENCE, sample_columns(data, shards, columns, _REFERENCE_ROWS))


def write_embeddings(
    folder: Folder, model: "FusionModel", spec: RunSpec, manifest: Manifest
) -> None:
    """Write `EMBEDDINGS`, by which `evaluate` and `predict` recognize unfamiliar rows."""
    from mm_model.model_inputs import inputs_by_name
    from mm_model.model_parts import with_embeddings

    text = text_reader(spec, manifest)
    with_image = bool({IMAGE, FEATURES} & set(model.input_names))
    decoder = RowDecoder(manifest, with_image=with_image, size=spec.data.image_size, text=text)
    network, data = with_embeddings(model), Folder(spec.data.prepared)
    parts: list[pa.Table] = []
    for split in ("train", "validation"):
        shards = manifest.splits[split].shards
        rows = sample_columns(data, shards, decoder.columns, _EMBEDDED_ROWS)
        for start in range(0, rows.num_rows, _BATCH):
            batch = decoder.decode(rows.slice(start, _BATCH))
            logits_BM, *embeddings = network(
                inputs_by_name(batch, model.input_names), training=False
            )
            columns: dict[str, Any] = {
                "split": [split] * len(batch[LABEL]),
                LABEL: batch[LABEL][:, 0].astype("int8"),
                "probability": np.asarray(model.probability(logits_BM))[:, 0],
            }
            for head, embedding_BF in zip(model.heads, embeddings, strict=True):
                columns[f"embedding_{head}"] = list(np.asarray(embedding_BF, "float32"))
            if manifest.is_weighted:
                columns[WEIGHT] = batch[WEIGHT][:, 0]
            parts.append(pa.table(columns))
    folder.write_parquet(EMBEDDINGS, pa.concat_tables(parts))


def read_sample(folder: Folder, name: str) -> pa.Table | None:
    """Return the rows of a file above; None for a run of an earlier version."""
    return folder.read_parquet(name) if folder.exists(name) else None


def export_saved_model(model: Any, manifest: Manifest, path: str) -> None:
    """Write a TensorFlow SavedModel, with two signatures that return the `probability`.

    `serve` takes tensors, as in `ray_jobs.data.batch`. `serving_default` takes image files, numbers
    and words, as in `mm_model.raw_inputs`; a model of precomputed features does not have it.
    """
    import keras
    import tensorflow as tf

    from mm_model.raw_inputs import StoredFormat, raw_inputs, raw_signature

    signature = {
        name: tf.TensorSpec(tensor.shape, INPUT_TYPES[name], name=name)  # type: ignore[call-arg]
        for name, tensor in model.network.input.items()
    }
    archive: Any = keras.export.ExportArchive()
    archive.track(model)

    def serve(inputs: dict[str, Any]) -> dict[str, Any]:
        return {"probability": model(inputs, training=False)}

    if FEATURES not in signature:
        rules = manifest.prepare
        quality = rules.jpeg_quality if manifest.image.encoding == "jpeg" else None
        stored = StoredFormat(manifest.image.width, rules.aspect, quality)
        placeholder = RowDecoder(manifest, with_image=True).placeholder
        convert = raw_inputs(model, stored, manifest.vocabularies, placeholder)
        archive.add_endpoint(
            "serving_default", lambda raw: serve(convert(raw)), [raw_signature(model)]
        )
    archive.add_endpoint("serve", serve, [signature])
    archive.write_out(path, verbose=False)
