"""The final model equals the trained one and needs no pretrained weights."""

import json
import re
from typing import Any

import keras
import numpy as np
import pytest

from mm_model import load_model
from mm_model.freezing import apply_stage
from mm_model.spec import StageSpec
from ray_jobs.cluster.strategy import WorkerContext
from ray_jobs.config.spec import RunSpec
from ray_jobs.storage.folder import Folder
from ray_jobs.train import finalize as module
from ray_jobs.train.checkpoints.checkpoint import BestCheckpoint, LoopState
from ray_jobs.train.finalize import MODEL, SUMMARY, finalize
from ray_jobs.train.loop import Loop
from ray_jobs.train.model_factory import new_model
from tests.ray_jobs.arrays import arrays_of
from tests.ray_jobs.tiny import write_prepared


def config_of(model: Any) -> str:
    """The model's structure, without the numbers of unnamed layers and memory addresses."""
    config = json.dumps(model.get_config(), sort_keys=True)
    config = re.sub(r', "shared_object_id": \d+', "", config)
    return re.sub(r'_\d+(?=["/_])', "", config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "precision"), [("imagenet", "float32"), ("file", "mixed_bfloat16")]
)
def test_finalize_needs_no_pretrained_weights_and_keeps_the_structure(
    tmp_path, monkeypatch, source, precision
):
    from keras.src.applications import efficientnet

    # As Keras downloads it.
    file = tmp_path / "b0.weights.h5"
    keras.applications.EfficientNetB0(include_top=False, weights=None).save_weights(file)

    def download(*_: Any, **__: Any) -> str:
        if not file.exists():
            raise OSError("the host is unreachable")
        return str(file)

    monkeypatch.setattr(efficientnet.file_utils, "get_file", download)
    # The export takes long; `test_train` covers it.
    monkeypatch.setattr(module, "export_saved_model", lambda *_: None)
    manifest = write_prepared(tmp_path / "prepared", {"train": 40, "validation": 9}, size=32)
    image = {
        "kind": "efficientnet_b0",
        "weights": "imagenet" if source == "imagenet" else str(file),
        "units": 8,
    }
    spec = RunSpec.model_validate(
        {
            "data": {"prepared": str(tmp_path / "prepared")},
            "model": {"image": image, "numeric": {"units": [8]}, "fusion": {"units": 8}},
            "train": {"global_batch_size": 8, "calibrate": False, "precision": precision},
        }
    )
    loop = Loop(spec, manifest, WorkerContext())
    expected = new_model(spec, manifest)
    rng = np.random.default_rng(0)
    for variable in loop.trainable:
        # An untrained backbone passes almost nothing of an image on.
        scale = 1.3 if "gamma" in variable.path else 1.0
        variable.assign(scale * variable + 0.02 * rng.normal(size=variable.shape))
    for variable, trained in zip(expected.variables, loop.model.variables, strict=True):
        variable.assign(trained)
    inputs = {
        "image": rng.integers(0, 256, (9, 32, 32, 3)).astype(np.uint8),
        "numeric": rng.normal(size=(9, 3)).astype(np.float32),
    }
    logits_NM = np.asarray(expected.head_logits(inputs))
    assert np.ptp(logits_NM) > 1e-2
    apply_stage(loop.model, StageSpec(epochs=1, backbone=0))
    file.unlink()
    with pytest.raises(OSError, match=r"unreachable|b0\.weights\.h5"):
        new_model(spec, manifest)
    loop.best[0] = BestCheckpoint(arrays_of(loop.model.variables), logits_NM, np.arange(9) % 2)
    run = Folder(tmp_path / "run")
    finalize(loop, LoopState(epoch=1, step=5, best_epoch=0), run, train_s=1.0)
    assert run.exists(SUMMARY)
    model = load_model(tmp_path / "run" / MODEL)
    np.testing.assert_allclose(np.asarray(model.head_logits(inputs)), logits_NM, atol=1e-6)
    assert config_of(model) == config_of(expected)
