import subprocess
import sys

import keras
import numpy as np
import pytest

import mm_model
from mm_model.fusion import FUSIONS
from mm_model.layers.numeric_encoding import NumericEncoding
from mm_model.model import build_model
from mm_model.model_inputs import INPUT_DTYPES
from mm_model.spec import FusionSpec, ImageSpec, ModelSpec, NumericSpec, TextSpec
from mm_model.statistics import Vocabulary
from tests.mm_model.examples import (
    COLOUR,
    NO_AUGMENTATION,
    SMALLEST_OF_EACH_FAMILY,
    TEXT,
    UNTRAINED,
    half_precision,
    model_with_all_inputs,
    rows_with_all_inputs,
)

FAST = ("tiny", "efficientnet_b0")
"""Of layers in the network, or in a nested model that contains layers of this project."""
OTHERS = [kind for kind in SMALLEST_OF_EACH_FAMILY if kind not in FAST]
TEXT_KINDS = ("bert_tiny", "distilbert_base", "roberta_base", "minilm_l6")


# Tests all fusions with the tiny branch, and the other families with every fusion if slow.
@pytest.mark.parametrize(
    ("kind", "text", "fusion"),
    [
        *(("tiny", "hashed", fusion) for fusion in FUSIONS),
        ("efficientnet_b0", "hashed", "skip_concat"),
        ("tiny", "bert_tiny", "cross_attention"),
        *(
            pytest.param(*kinds, fusion, marks=pytest.mark.slow)
            for kinds in [*((k, "hashed") for k in OTHERS), *(("tiny", k) for k in TEXT_KINDS)]
            for fusion in FUSIONS
        ),
    ],
)
def test_every_family_and_fusion_trains_on_all_inputs_saves_and_reloads(
    kind, text, fusion, tmp_path
):
    size = SMALLEST_OF_EACH_FAMILY[kind]
    inputs, y = rows_with_all_inputs(4, num_images=2, size=size)
    spec = ModelSpec(
        image=ImageSpec(kind=kind, weights=None, units=8),
        numeric=NumericSpec(units=(8,)),
        text=TextSpec(kind=text, units=8),
        fusion=FusionSpec(kind=fusion, units=8),
    )
    statistics = mm_model.fit_numeric_statistics(inputs["numeric"])
    model = build_model(spec, statistics, (2, size, size, 3), vocabularies=[COLOUR], text=TEXT)
    assert model.input_names == list(inputs)
    # SGD, since the update of Adam takes longer than the rest of an eager step.
    model.compile(keras.optimizers.SGD(1.0), "binary_crossentropy", run_eagerly=True)
    weights = {v.path: np.array(v) for v in model.trainable_variables}
    # The heads start at zero, so only the second step changes the layers below them.
    for _ in range(2):
        assert np.isfinite(model.train_on_batch(inputs, y))
    for name in ("image_top_dense", "category_embedding", "text_top_dense", "joint_head"):
        for v in model.network.get_layer(name).trainable_variables:
            assert np.abs(np.asarray(v) - weights[v.path]).max() > 0, v.path
    expected = np.asarray(model(inputs))
    model.save(tmp_path / "model.keras")
    again = mm_model.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(np.asarray(again(inputs)), expected)
    assert again.network.get_layer("category_embedding").vocabularies == (COLOUR,)
    backbones = [[layer.name for layer in each.backbone_layers()] for each in (model, again)]
    assert backbones[0] == backbones[1] != []


@pytest.mark.parametrize("fusion", FUSIONS)
def test_missing_images_and_the_order_of_images_do_not_change_the_logits(fusion):
    keras.utils.set_random_seed(0)
    inputs, _ = rows_with_all_inputs()
    model = model_with_all_inputs(inputs, fusion={"kind": fusion})
    expected = np.asarray(model.head_logits(inputs))
    image, mask = inputs["image"], inputs["image_mask"]
    other = np.where(mask[:, :, None, None, None] > 0, image, 255 - image)
    assert (other != image).any()
    np.testing.assert_array_equal(
        np.asarray(model.head_logits({**inputs, "image": other})), expected
    )
    order = np.array([2, 0, 1])
    permuted = {**inputs, "image": image[:, order], "image_mask": mask[:, order]}
    np.testing.assert_allclose(np.asarray(model.head_logits(permuted)), expected, atol=1e-4)
    present = np.where(mask[:, :, None, None, None] > 0, 255 - image, image)
    changed = np.asarray(model.head_logits({**inputs, "image": present}))
    assert (changed != expected).any(axis=1).all()


def test_without_a_mask_all_images_are_present():
    inputs, y = rows_with_all_inputs()
    model = model_with_all_inputs(inputs, text=None)
    as_list = [inputs["image"], inputs["numeric"], inputs["category"]]
    as_dict = {name: inputs[name].astype("float32") for name in ("category", "image", "numeric")}
    model.run_eagerly = True
    model.fit(as_list, y, validation_data=(as_dict, y), epochs=1, verbose=0)
    expected = np.asarray(model({**inputs, "image_mask": np.ones((16, 3))}))
    np.testing.assert_array_equal(np.asarray(model(as_list)), expected)
    np.testing.assert_array_equal(np.asarray(model(as_dict)), expected)
    np.testing.assert_allclose(model.predict(as_dict, verbose=0), expected, rtol=1e-4)
    assert (np.asarray(model(inputs)) != expected).any()


@pytest.mark.parametrize("absent", ["image", "numeric"])
def test_a_model_of_one_branch_ignores_the_inputs_of_the_other(absent):
    inputs, y = rows_with_all_inputs(num_images=1)
    for name in ("image_mask", "text", "text_mask"):
        del inputs[name]
    inputs["image"] = inputs["image"][:, 0]
    none = {"image": {"kind": "none", "weights": None}, "numeric": {"kind": "none"}}[absent]
    model = mm_model.create_model(
        (16, 16, 3),
        (3,),
        mm_model.fit_numeric_statistics(inputs["numeric"]),
        vocabularies=[COLOUR],
        **{**UNTRAINED, absent: none},
    )
    present = {k: v for k, v in inputs.items() if (k == "image") == (absent == "numeric")}
    assert model.input_names == list(present)
    assert model.heads == ["numeric" if absent == "image" else "image"]
    model.run_eagerly = True
    everything = list(inputs.values())
    model.fit(everything, y, epochs=1, verbose=0)
    np.testing.assert_array_equal(np.asarray(model(everything)), np.asarray(model(present)))


def test_the_numeric_branch_needs_only_categories():
    inputs, _ = rows_with_all_inputs()
    empty = mm_model.fit_numeric_statistics(np.empty((16, 0)))
    for statistics, shape in ((None, (0,)), (None, None), (empty, (0,))):
        spec = ModelSpec.model_validate({"image": {"kind": "none", "weights": None}})
        model = build_model(spec, statistics, (16, 16, 3), shape, [COLOUR])
        assert model.input_names == ["category"]
        assert model.heads == ["numeric"]
        by_position = np.asarray(model([inputs["image"], inputs["numeric"], inputs["category"]]))
        np.testing.assert_array_equal(by_position, np.asarray(model(inputs["category"])))


def test_missing_inputs_are_named():
    inputs, _ = rows_with_all_inputs()
    model = mm_model.create_model((3, 16, 16, 3), (3,), vocabularies=[COLOUR], **UNTRAINED)
    image, names = inputs["image"], r"takes \['image', 'numeric', 'category'\]"
    missing = r"\['category'\] are missing; .* got \['image', 'numeric', 'image_mask'\]"
    for given, message in (
        ([image] * 2, f"{names}, got 2 inputs"),
        ([image] * 4, f"{names}, got 4 inputs"),
        ({"image": image, "numeric": inputs["numeric"]}, missing),
    ):
        with pytest.raises(ValueError, match=message):
            model(given)


def test_a_model_learns_from_a_category_and_is_uncertain_without_it():
    keras.utils.set_random_seed(0)
    codes = np.random.default_rng(0).integers(2, 10, (1024, 1))
    y = (codes[:, 0] < 4).astype(int)
    model = mm_model.create_model(
        (16, 16, 3),
        (0,),
        vocabularies=[Vocabulary(column="letter", words=tuple("abcdefgh"))],
        learning_rate=3e-3,
        image={"kind": "none", "weights": None},
        numeric={"category_dropout": 0.2},
    )
    model.fit(codes, y, epochs=15, batch_size=32, verbose=0)
    p = model.predict(np.arange(10)[:, None], verbose=0)[:, 0]
    assert (p[2:4] > 0.9).all()
    assert (p[4:] < 0.1).all()
    # Training has neither missing nor unknown words, codes 0 and 1. A quarter of the rows is
    # positive; predicting this share has a loss of 0.56.
    assert (-0.25 * np.log(p[:2]) - 0.75 * np.log(1 - p[:2]) < 0.65).all()


def test_numbers_reach_their_encoding_in_full_precision():
    numbers = np.random.default_rng(0).normal(100_000, 10, (64, 3)).astype(np.float32)
    statistics = mm_model.fit_numeric_statistics(numbers)
    with half_precision():
        model = mm_model.create_model((16, 16, 3), (3,), statistics, **UNTRAINED)
    encode, seen = model.network.get_layer("numeric_encoding"), []
    call = encode.call
    encode.call = lambda x: seen.append(call(x)) or seen[-1]
    probability = model({"image": np.zeros((64, 16, 16, 3), np.uint8), "numeric": numbers})
    assert keras.backend.standardize_dtype(probability.dtype) == "float32"
    np.testing.assert_array_equal(seen[0], NumericEncoding(statistics, 32)(numbers))
    assert np.asarray(seen[0])[:, 0].std() == pytest.approx(1, rel=0.01)


def test_a_module_can_be_the_first_that_imports_keras():
    code = (
        "import sys, mm_model.model; assert mm_model.FusionModel is mm_model.model.FusionModel; "
        "assert 'mm_model.loading' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


LOAD = """
import sys, numpy as np, mm_model, keras
model_path, rows_path, export_path, found_path = sys.argv[1:]
rows = dict(np.load(rows_path))
label = rows.pop("label")
model = keras.saving.load_model(model_path)
model.export(export_path, verbose=False)
probability = np.asarray(model(rows))
model.fit(rows, label, batch_size=16, shuffle=False, verbose=0)
np.savez(found_path, loaded=probability, fitted=np.asarray(model(rows)))
"""


def test_keras_loads_exports_and_trains_a_saved_model_in_another_process(tmp_path):
    """Which has imported mm_model only, and Keras after it."""
    import tensorflow as tf

    inputs, label = rows_with_all_inputs()
    model = model_with_all_inputs(
        inputs,
        # Keras does not save the states of random numbers.
        fusion={"kind": "cross_attention", "modality_dropout": 0.0},
        numeric={"units": (8,), "category_dropout": 0.0},
        text=None,
        augmentation=NO_AUGMENTATION.model_dump(),
        dropout=0.0,
    )
    model.fit(inputs, label, batch_size=16, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "rows.npz", label=label, **inputs)
    paths = [str(tmp_path / n) for n in ("model.keras", "rows.npz", "exported", "found.npz")]
    subprocess.run([sys.executable, "-c", LOAD, *paths], check=True)
    found = np.load(paths[3])
    saved = np.asarray(model(inputs))
    np.testing.assert_allclose(found["loaded"], saved, atol=1e-6)
    exported = tf.saved_model.load(paths[2])
    three = {name: tf.cast(inputs[name][:3], INPUT_DTYPES[name]) for name in model.input_names}
    np.testing.assert_allclose(exported.serve(three), saved[:3], atol=1e-5)
    model.fit(inputs, label, batch_size=16, shuffle=False, verbose=0)
    np.testing.assert_allclose(found["fitted"], model(inputs), atol=1e-5)
    assert np.abs(found["fitted"] - saved).max() > 1e-4
