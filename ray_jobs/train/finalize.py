"""From the best epoch to the model that people use: blended, calibrated, saved, summed up.

Enters: the outcome of the loop, on rank 0.  Leaves: model/model.keras, model/saved_model and
summary.json in the run folder.
"""

import tempfile
from typing import TYPE_CHECKING, Any

from ray_jobs.data.batch import INPUT_TYPES
from ray_jobs.storage.folder import Folder

if TYPE_CHECKING:
    from ray_jobs.train.checkpoints.checkpoint import BestCheckpoint, LoopState
    from ray_jobs.train.loop import Loop

SUMMARY = "summary.json"
MODEL = "model/model.keras"


def is_finished(folder: Folder) -> bool:
    """Whether a run has come to its end, whose last step is to write the summary."""
    return folder.exists(SUMMARY)


def finish(
    loop: "Loop", state: "LoopState", best: "BestCheckpoint", folder: Folder, train_s: float
) -> dict[str, Any]:
    """Write the best model, blended and calibrated on the validation rows, and the summary.

    The summary comes last: a run folder that has one is finished.

    Args:
        loop: that trained it.
        state: in which training ended.
        best: model of its best epoch.
        folder: of the run.
        train_s: how long the last attempt trained.
    """
    from mm_model.calibration import fit_blend, fit_calibration, log_loss, sigmoid
    from ray_jobs.train.checkpoints.checkpoint import assign
    from ray_jobs.train.metrics import choose_threshold, validation_metrics
    from ray_jobs.train.model_factory import new_model

    spec, label_N = loop.spec, best.label_N
    # A model of its own, outside the strategy, whose variables are plain ones; in float32. With the
    # same weights to start from, since an ImageNet backbone has a layer more than one without.
    model = new_model(spec, loop.manifest)
    assign(model.variables, best.model, "best weights")
    blend_M, bias = model.blend.weights_M(), -loop.logit_shift
    logits_NM = best.head_logits_NM.astype("float64")
    before = log_loss(logits_NM @ blend_M + bias, label_N)
    scale = 1.0
    if spec.train.calibrate:
        if model.blends:
            blend_M = fit_blend(logits_NM, label_N)
            model.blend.set(blend_M)
        scale, bias = fit_calibration(logits_NM @ blend_M, label_N)
    model.calibration.set([scale], bias)
    probability_N = sigmoid(scale * (logits_NM @ blend_M) + bias)
    threshold = choose_threshold(label_N, probability_N, spec.train.decision_threshold)
    with tempfile.TemporaryDirectory() as path:
        model.save(f"{path}/model.keras")
        export_saved_model(model, f"{path}/saved_model")
        folder.delete("model")
        folder.upload(path, "model")
    summary = {
        "run": spec.run.name,
        "epochs": state.epoch,
        "steps": state.step,
        "best_epoch": (state.best_epoch or 0) + 1,
        "stopped_early": state.epoch < spec.train.epochs,
        "decision_threshold": threshold,
        "validation": validation_metrics(label_N, probability_N),
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


def export_saved_model(model: Any, path: str) -> None:
    """Write a TensorFlow SavedModel: `serve(image uint8, numeric float32, …)` → probability."""
    import keras
    import tensorflow as tf

    signature = {
        name: tf.TensorSpec(tensor.shape, INPUT_TYPES[name], name=name)  # type: ignore[call-arg]
        for name, tensor in model.network.input.items()
    }
    archive: Any = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(
        "serve", lambda inputs: {"probability": model(inputs, training=False)}, [signature]
    )
    archive.write_out(path, verbose=False)
