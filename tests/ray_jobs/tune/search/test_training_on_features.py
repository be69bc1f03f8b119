"""Training on the features of a frozen backbone, compared with training on images."""

from typing import Any

import numpy as np
import pytest

from ray_jobs.cluster.strategy import WorkerContext
from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import EvaluateSpec, PredictSpec
from ray_jobs.data.cache import choose_cache
from ray_jobs.data.manifest import read_manifest
from ray_jobs.data.sampler import TrainingSampler
from ray_jobs.evaluate.job import evaluate
from ray_jobs.predict.job import predict
from ray_jobs.storage.folder import Folder
from ray_jobs.train.job import fit
from ray_jobs.train.loop import Loop
from ray_jobs.tune.search.backbone_features import compute_features
from ray_jobs.tune.search.feature_trials import feature_trial_spec, is_frozen
from tests.ray_jobs.tune.search.features import SIZE, copy_weights, shards, spec_of


@pytest.mark.parametrize("frozen_by", ["trainable", pytest.param("stages", marks=pytest.mark.slow)])
def test_training_on_features_equals_training_with_a_frozen_backbone(folder, stored, frozen_by):
    spec = spec_of(folder, train__optimizer="adamw", train__learning_rate=0.01)
    if frozen_by == "stages":
        stages = [{"epochs": 4, "backbone": 0}]
        spec = spec.overlay({"model.image.trainable": True, "train.stages": stages})
    assert is_frozen(spec)
    trial = feature_trial_spec(spec, compute_features(spec) if frozen_by == "trainable" else stored)
    full = Loop(spec, read_manifest(Folder(spec.data.prepared)), WorkerContext())
    small = Loop(trial, read_manifest(Folder(trial.data.prepared)), WorkerContext())
    copy_weights(full.model, small.model)
    on_images, on_stored = (loop.run().history for loop in (full, small))
    assert len(on_images) == len(on_stored) == 4
    for expected, got in zip(on_images, on_stored, strict=True):
        for name in expected:
            if name.startswith(("val/", "train/")) and not name.endswith("_s"):
                assert got[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    losses = [record["val/log_loss"] for record in on_images]
    assert losses[-1] < losses[0] - 0.01


def test_training_on_several_views_draws_a_random_view_per_step(folder, computed_shards, tmp_path):
    spec = spec_of(folder, run__storage_path=str(tmp_path))
    output = compute_features(spec, num_views=3)
    trial = feature_trial_spec(spec, output)
    loop = Loop(trial, read_manifest(output), WorkerContext())
    state = loop.model.network.get_layer("image_view").seed_generator.state
    before = np.array(state)
    history = loop.run().history
    assert (np.array(state) - before).tolist() == [0, history[-1]["step"]]


@pytest.mark.parametrize(("buffer_bytes", "num_views"), [(1 << 30, 1), (60_000, 1), (60_000, 40)])
def test_rows_come_in_the_same_order_as_in_a_training_on_images(
    folder, tmp_path, buffer_bytes, num_views
):
    spec = spec_of(folder, data__buffer_bytes=buffer_bytes)
    images = read_manifest(Folder(spec.data.prepared))
    # Shards of the size that this number of views has.
    resized = [
        shard.model_copy(update={"num_bytes": shard.num_rows * (256 * num_views + 30)})
        for shard in shards(images, "train")
    ]
    own = images.splits["train"].model_copy(update={"shards": tuple(resized)})
    image = images.image.model_copy(update={"features": (num_views, 64)})
    small = images.model_copy(update={"image": image, "splits": {**images.splits, "train": own}})
    small.write(Folder(tmp_path))
    trial = feature_trial_spec(spec, Folder(tmp_path))
    expected, got = (
        TrainingSampler.of(m.splits["train"], s.train.global_batch_size, s.run.seed, s.data)
        for m, s in ((images, spec), (small, trial))
    )
    assert got.steps_per_window == expected.steps_per_window
    assert expected.steps_per_window == (1 if buffer_bytes == 60_000 else 256)
    for a, b in zip(expected.windows(0, 26), got.windows(0, 26), strict=True):
        for stream in range(8):
            assert expected.stream_rows(a, stream) == got.stream_rows(b, stream)
            np.testing.assert_array_equal(expected.shuffle(a, stream), got.shuffle(b, stream))


def test_a_trial_on_features_needs_no_stages_weights_or_decoding(folder, stored):
    stages = [{"epochs": 1, "backbone": 0}, {"epochs": 1}]
    weights = "somewhere.weights.h5"
    changes = {"train__stages": stages, "model__image__trainable": True, "data__cache": "disk"}
    spec = spec_of(folder, model__image__weights=weights, **changes)
    trial = feature_trial_spec(spec, stored)
    assert trial.data.prepared == stored.uri
    assert trial.train.stages == ()
    assert trial.model.image.weights is None
    assert (trial.data.cache, trial.data.decode) == ("none", "trainer")
    assert trial.model.fusion == spec.model.fusion
    # There are no decoded images to cache, either.
    assert choose_cache(spec.data, read_manifest(stored), 256, 1e9) == "none"
    with pytest.raises(ValueError, match=r"train\.cutmix_alpha=0\.5 needs images.*; set it to 0"):
        feature_trial_spec(spec.overlay({"train.cutmix_alpha": 0.5}), stored)


@pytest.mark.slow
def test_a_trial_on_features_can_be_evaluated_on_features_but_not_on_images(
    ray_local, folder, stored, tmp_path, capsys
):
    trial = feature_trial_spec(spec_of(folder, train__epochs=1), stored)
    trial = trial.overlay({"run.storage_path": str(tmp_path), "run.name": "trial"})
    summary = fit(trial)
    assert f"features of tiny at {SIZE} px" in capsys.readouterr().out
    run = str(tmp_path / "trial")
    where: dict[str, Any] = {"run": run, "output": str(tmp_path / "out")}
    metrics = evaluate(EvaluateSpec(**where, data=stored.uri, split="validation"))
    assert metrics["roc_auc"] == pytest.approx(summary["validation"]["roc_auc"], abs=1e-6)
    with pytest.raises(JobError, match=r"its images have 24 × 24 pixels, not 1 × 64"):
        evaluate(EvaluateSpec(**where, data=str(folder / "prepared")))
    (tmp_path / "raw.csv").write_text("key,alpha,beta,row\na,1,2,3\n")
    with pytest.raises(JobError, match="model was trained on backbone features"):
        predict(PredictSpec(**where, data=str(tmp_path / "raw.csv"), images=str(tmp_path)))
