"""Converted models give the probabilities of the model in other runtimes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mm_model.mean_model import MeanModel
from mm_model.model import build_model
from mm_model.spec import FusionSpec, ImageSpec, ModelSpec, NumericSpec, TextSpec
from mm_model.statistics import fit_numeric_statistics
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.data.batch import INPUT_TYPES
from ray_jobs.data.manifest import ImageInfo, Manifest
from ray_jobs.export.conversion import write_litert, write_onnx
from ray_jobs.export.runners import open_litert, open_onnx, open_saved_model
from ray_jobs.train.finalize import export_saved_model
from tests.mm_model.examples import (
    COLOUR,
    SMALLEST_OF_EACH_FAMILY,
    TEXT,
    rows_with_all_inputs,
    with_random_heads,
)

KINDS = [kind for kind in SMALLEST_OF_EACH_FAMILY if kind != "tiny"]


def manifest_of(size: int) -> Manifest:
    return Manifest(
        prepare=PrepareSpec(image_size=size),
        seed=0,
        image=ImageInfo(height=size, width=size, names=("a", "b", "c")),
        numeric_columns=("x", "y", "z"),
        vocabularies=(COLOUR,),
        negative_label="0",
        positive_label="1",
        splits={},
        cuts=None,
        statistics=None,
        quarantine={},
    )


def rows_and_model(
    kind: str = "tiny", text: str = "hashed", fusion: str = "gated", views: int = 1
) -> tuple[dict[str, np.ndarray], Any]:
    size = SMALLEST_OF_EACH_FAMILY[kind]
    given, _ = rows_with_all_inputs(5, num_images=2, size=size)
    spec = ModelSpec(
        image=ImageSpec(kind=kind, weights=None, units=8, inference_views=views),
        numeric=NumericSpec(units=(8,)),
        text=TextSpec(kind=text, units=8),
        fusion=FusionSpec(kind=fusion, units=8),
    )
    statistics = fit_numeric_statistics(given["numeric"])
    model = build_model(spec, statistics, (2, size, size, 3), vocabularies=[COLOUR], text=TEXT)
    with_random_heads(model)
    rows = {name: values.astype(INPUT_TYPES[name]) for name, values in given.items()}
    # Some untrained backbones give logits far from 0.
    logits = np.asarray(model.blend(model.head_logits(rows)))
    model.calibration.set([1 / logits.std()], -logits.mean() / logits.std())
    return rows, model


def require_equal(
    folder: Path, rows: dict[str, np.ndarray], model: Any, litert: bool = True
) -> None:
    """Check the probabilities in all runtimes, or all but LiteRT."""
    expected = np.asarray(model(rows))[:, 0]
    assert np.ptp(expected) > 0.01
    size = rows["image"].shape[-2]
    saved = str(folder / "saved_model")
    export_saved_model(model, manifest_of(size), saved)
    write_onnx(model, str(folder / "model.onnx"), None)
    runners = [open_saved_model(saved), open_onnx(str(folder / "model.onnx"))]
    if litert:
        write_litert(saved, str(folder / "model.tflite"), "float32")
        runners.append(open_litert(str(folder / "model.tflite")))
    for run in runners:
        np.testing.assert_allclose(run(rows), expected, atol=1e-4)
        # Any number of rows.
        one = {name: values[:1] for name, values in rows.items()}
        np.testing.assert_allclose(run(one), expected[:1], atol=1e-4)


@pytest.mark.parametrize("fusion", ["gated", "cross_attention"])
def test_all_inputs_and_fusions_are_converted(tmp_path, fusion):
    require_equal(tmp_path, *rows_and_model(fusion=fusion))


@pytest.mark.slow
def test_the_mean_of_models_and_several_views_are_converted(tmp_path):
    rows, model = rows_and_model(views=2)
    _, other = rows_and_model()
    codes = [[list(range(COLOUR.num_codes))], [list(range(COLOUR.num_codes))[::-1]]]
    require_equal(tmp_path, rows, MeanModel([model, other], codes))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_backbone_of_each_family_is_converted(tmp_path, kind):
    require_equal(tmp_path, *rows_and_model(kind), litert=kind != "swin_tiny")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert_tiny", "distilbert_base", "roberta_base", "minilm_l6"])
def test_text_encoders_are_converted(tmp_path, kind):
    require_equal(tmp_path, *rows_and_model(text=kind))


def test_operations_that_a_runtime_lacks_are_named(tmp_path, monkeypatch, capfd):
    import tensorflow as tf

    rows, model = rows_and_model()
    monkeypatch.setattr(
        type(model), "call", lambda self, inputs, training=False: tf.roll(
            tf.math.lgamma(tf.reduce_mean(inputs["numeric"], axis=1, keepdims=True)), 1, axis=0
        ),
    )  # fmt: skip
    lacking = r"lacks operations of the model: {0} \(in .*{0}\)"
    with pytest.raises(JobError, match="ONNX " + lacking.format("Lgamma")):
        write_onnx(model, str(tmp_path / "model.onnx"), None)
    saved = str(tmp_path / "saved_model")
    export_saved_model(model, manifest_of(rows["image"].shape[-2]), saved)
    with pytest.raises(JobError, match="LiteRT " + lacking.format("Roll")):
        write_litert(saved, str(tmp_path / "model.tflite"), "float32")
    assert "loc(" not in capfd.readouterr().err
