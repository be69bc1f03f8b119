"""The finished model is the trained one, whatever its weights began with."""

import keras
import numpy as np
import pytest

from mm_model import load_model
from ray_jobs.cluster.strategy import WorkerContext
from ray_jobs.config.spec import RunSpec
from ray_jobs.storage.folder import Folder
from ray_jobs.train import finalize as module
from ray_jobs.train.checkpoints.checkpoint import BestCheckpoint, LoopState
from ray_jobs.train.finalize import MODEL, finish, is_finished
from ray_jobs.train.loop import Loop
from tests.ray_jobs.arrays import arrays_of
from tests.ray_jobs.tiny import write_prepared


@pytest.mark.slow
def test_a_finished_model_that_began_with_imagenets_weights_computes_what_its_best_epoch_did(
    tmp_path, monkeypatch
):
    from keras.src.applications import efficientnet

    # What Keras downloads. With these weights it makes a graph with a layer more.
    file = tmp_path / "b0.weights.h5"
    keras.applications.EfficientNetB0(include_top=False, weights=None).save_weights(file)
    monkeypatch.setattr(efficientnet.file_utils, "get_file", lambda *_, **__: str(file))
    # The export to TensorFlow takes long, and `test_train` looks at it.
    monkeypatch.setattr(module, "export_saved_model", lambda model, path: None)
    manifest = write_prepared(tmp_path / "prepared", {"train": 40, "validation": 9}, size=32)
    image = {"kind": "efficientnet_b0", "weights": "imagenet", "units": 8}
    spec = RunSpec.model_validate(
        {
            "data": {"prepared": str(tmp_path / "prepared")},
            "model": {"image": image, "numeric": {"units": [8]}, "fusion": {"units": 8}},
            "train": {"global_batch_size": 8, "calibrate": False},
        }
    )
    loop = Loop(spec, manifest, WorkerContext())
    rng = np.random.default_rng(0)
    for variable in loop.trainable:
        # As it is made, a backbone lets next to nothing of an image through.
        scale = 1.3 if "gamma" in variable.path else 1.0
        variable.assign(scale * variable + 0.02 * rng.normal(size=variable.shape))
    inputs = {
        "image": rng.integers(0, 256, (9, 32, 32, 3)).astype(np.uint8),
        "numeric": rng.normal(size=(9, 3)).astype(np.float32),
    }
    logits_NM = np.asarray(loop.model.head_logits(inputs))
    best = BestCheckpoint(arrays_of(loop.model.variables), logits_NM, np.arange(9) % 2)
    run = Folder(tmp_path / "run")
    assert not is_finished(run)
    finish(loop, LoopState(epoch=1, step=5, best_epoch=0), best, run, train_s=1.0)
    assert is_finished(run)
    found = np.asarray(load_model(tmp_path / "run" / MODEL).head_logits(inputs))
    np.testing.assert_allclose(found, logits_NM, atol=1e-5)
    assert np.ptp(logits_NM) > 1e-2
