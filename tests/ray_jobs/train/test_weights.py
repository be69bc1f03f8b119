"""Weights of rows in training, validation and calibration (keras#2071, autogluon#942)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics

from mm_model.calibration import fit_calibration, sigmoid
from ray_jobs.cluster.strategy import WorkerContext
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train import finalize as module
from ray_jobs.train.finalize import finalize
from ray_jobs.train.loop import Loop
from ray_jobs.train.metrics import validation_metrics
from tests.ray_jobs.arrays import arrays_of, distance
from tests.ray_jobs.tiny import write_prepared

WEIGHTS = (1, 3, 2, 1, 2)
NUM_ROWS = {"train": 20, "validation": 15, "test": 3}


def loop_of(folder: Path, batch_size: int, class_weight: str = "balanced", **train: Any) -> Any:
    """A linear model without dropout and prior, trained by SGD."""
    model = {
        "image": {"kind": "none"},
        "numeric": {"units": []},
        "dropout": 0,
        "l2": 0.01,
    }
    section = {"optimizer": "sgd", "schedule": "constant", "learning_rate": 0.1, "epochs": 3}
    section |= {"global_batch_size": batch_size, "class_weight": class_weight, **train}
    spec = {"data": {"prepared": str(folder)}, "model": model, "train": section}
    return Loop(RunSpec.model_validate(spec), read_manifest(Folder(folder)), WorkerContext())


def trained(loop: Any) -> dict[str, np.ndarray]:
    loop.run()
    return arrays_of(loop.trainable)


@pytest.mark.parametrize("class_weight", ["balanced", "none"])
def test_a_weight_of_two_trains_like_the_row_twice(tmp_path, class_weight):
    """In full batches, for any unit of the weights."""
    write_prepared(tmp_path / "twice", NUM_ROWS, weights=WEIGHTS, repeat=True)
    twice = trained(loop_of(tmp_path / "twice", 36, class_weight))
    for unit in (1.0, 1000.0):
        folder = tmp_path / f"weighted-{unit}"
        write_prepared(folder, NUM_ROWS, weights=tuple(unit * w for w in WEIGHTS))
        loop = loop_of(folder, 20, class_weight)
        before = arrays_of(loop.trainable)
        weighted = trained(loop)
        assert distance(weighted, before) > 1e-2
        # The numbers' statistics, which the encoding uses, are those of the rows without weights.
        assert distance(weighted, twice) <= 1e-5


def test_validation_metrics_and_class_weights_use_the_weights(tmp_path):
    weights = np.resize(WEIGHTS, 15)
    write_prepared(tmp_path / "data", NUM_ROWS, weights=WEIGHTS)
    loop = loop_of(tmp_path / "data", 20, calibrate=False, decision_threshold="f1")
    train_weights, label = np.resize(WEIGHTS, 20), np.arange(20) % 3 == 0
    by_class = [train_weights[~label].sum(), train_weights[label].sum()]
    assert loop.logit_shift == pytest.approx(np.log(by_class[0] / by_class[1]))
    state = loop.run()
    best = loop.best[state.best_epoch]
    assert best.weight_N.tolist() == weights.tolist()
    logit = best.head_logits_NM[:, 0] - loop.logit_shift
    expected = metrics.log_loss(best.label_N, 1 / (1 + np.exp(-logit)), sample_weight=weights)
    record = state.history[state.best_epoch]
    assert record["val/log_loss"] == pytest.approx(expected, rel=1e-5)
    assert record["val/roc_auc"] == pytest.approx(
        metrics.roc_auc_score(best.label_N, logit, sample_weight=weights)
    )


@pytest.mark.parametrize("unit", [1, 1000])
def test_calibration_uses_the_weights_in_any_unit(tmp_path, monkeypatch, unit):
    # The export takes long; `test_train` covers it.
    monkeypatch.setattr(module, "export_saved_model", lambda *_: None)
    write_prepared(tmp_path / "data", NUM_ROWS, weights=tuple(unit * w for w in WEIGHTS))
    loop = loop_of(tmp_path / "data", 20, decision_threshold="f1")
    state = loop.run()
    summary = finalize(loop, state, Folder(tmp_path / "run"), train_s=1.0)
    best = loop.best[state.best_epoch]
    logit, label, weight = best.head_logits_NM[:, 0], best.label_N, np.resize(WEIGHTS, 15)
    scale, bias = fit_calibration(logit, label, weight / weight.mean())
    found = summary["calibration"]
    assert (found["scale"], found["bias"]) == pytest.approx((scale, bias), rel=1e-6)
    assert scale != pytest.approx(fit_calibration(logit, label)[0], rel=1e-2)
    rows = (label, sigmoid(scale * logit.astype(np.float64) + bias))
    assert summary["validation"] == pytest.approx(validation_metrics(*rows, weight))
