"""The whole model with all random layers: in parts, compiled, saved and exported."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import mm_model
from mm_model import per_row_random
from mm_model.model import build_model
from mm_model.spec import ModelSpec
from tests.mm_model.examples import (
    COLOUR,
    TEXT,
    UNTRAINED,
    half_precision,
    rows_with_all_inputs,
    with_random_heads,
)

ALL_RANDOM_LAYERS = {
    **UNTRAINED,
    "augmentation": {"flip": "horizontal_and_vertical", "rand_augment": 0.5},
    "numeric": {"category_dropout": 0.3, "units": (8,)},
    "text": {"missing_dropout": 0.3},
    "dropout": 0.4,
}


FUSIONS = pytest.mark.parametrize("fusion", ["gated", "cross_attention"])


def model_and_rows(
    fusion: str = "gated",
) -> tuple[mm_model.FusionModel, dict[str, np.ndarray], np.ndarray]:
    """A model whose batch norms use no batch statistics, which differ between parts."""
    keras.utils.set_random_seed(0)
    inputs, y = rows_with_all_inputs(8, num_images=2)
    inputs["numeric"] = inputs["numeric"].astype(np.float32)
    statistics = mm_model.fit_numeric_statistics(inputs["numeric"])
    options = {**ALL_RANDOM_LAYERS, "fusion": {"modality_dropout": 0.5, "kind": fusion}}
    spec = ModelSpec.model_validate(options)
    model = build_model(spec, statistics, (2, 16, 16, 3), vocabularies=[COLOUR], text=TEXT)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    model.compile(loss="binary_crossentropy")
    return with_random_heads(model), inputs, y[:, None].astype(np.float32)


@FUSIONS
def test_parts_of_a_batch_have_the_logits_of_the_whole_batch(fusion):
    model, inputs, _ = model_and_rows(fusion)
    states = [np.array(v) for v in per_row_random.random_states(model)]
    assert len(states) > 5

    def logits(count: int) -> np.ndarray:
        parts = []
        for index in range(count):
            for v, state in zip(per_row_random.random_states(model), states, strict=True):
                v.assign(state)
            part = {k: np.split(v, count)[index] for k, v in inputs.items()}
            with per_row_random.batch_part(index, count):
                parts.append(np.asarray(model.head_logits(part, training=True)))
        return np.concatenate(parts)

    whole = logits(1)
    advanced = [np.array(v) for v in per_row_random.random_states(model)]
    at_inference = np.asarray(model.head_logits(inputs))
    # Rounding depends on the position in the batch and accumulates over layers.
    tolerance = 1e-3 * np.abs(whole).max()
    assert np.abs(whole - at_inference).max() > 100 * tolerance
    for count in (2, 4):
        np.testing.assert_allclose(logits(count), whole, atol=tolerance)
        for v, state in zip(per_row_random.random_states(model), advanced, strict=True):
            np.testing.assert_array_equal(v, state)


@FUSIONS
def test_a_model_with_all_random_layers_loads_in_safe_mode_and_exports(fusion, tmp_path):
    model, inputs, _ = model_and_rows(fusion)
    model(inputs, training=True)
    expected = np.asarray(model(inputs))
    model.save(tmp_path / "model.keras")
    again = mm_model.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(np.asarray(again(inputs)), expected)
    for layer in model.network.layers:
        found = again.network.get_layer(layer.name)
        assert type(found) is type(layer)
        assert found.get_config() == layer.get_config()
    signature = {
        name: tf.TensorSpec((None, *value.shape[1:]), value.dtype, name)
        for name, value in inputs.items()
    }
    model.export(tmp_path / "saved_model", input_signature=[signature], verbose=False)
    exported = tf.saved_model.load(str(tmp_path / "saved_model"))
    np.testing.assert_allclose(exported.serve(inputs), expected, atol=1e-6)


@FUSIONS
def test_a_step_with_all_random_layers_compiles_with_xla(fusion):
    model, inputs, y = model_and_rows(fusion)

    @tf.function(jit_compile=True)
    def step(inputs, y):
        with tf.GradientTape() as tape:
            p = model(inputs, training=True)
            loss = model.compute_loss(inputs, y, p, training=True)
        gradients = tape.gradient(loss, model.trainable_variables)
        return loss, [tf.convert_to_tensor(g) for g in gradients]

    with per_row_random.batch_part(1, 2):
        loss, gradients = step(inputs, y)
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in gradients)


def test_a_step_in_half_precision_has_loss_and_gradients_in_full_precision():
    with half_precision():
        model, inputs, y = model_and_rows()
        with tf.GradientTape() as tape:
            p = model(inputs, training=True)
            loss = model.compute_loss(inputs, y, p, training=True)
        gradients = tape.gradient(loss, model.trainable_variables)
        gradients = [tf.convert_to_tensor(g) for g in gradients]
    for tensor in (p, loss, *gradients):
        assert keras.backend.standardize_dtype(tensor.dtype) == "float32"
        assert np.isfinite(tensor).all()
