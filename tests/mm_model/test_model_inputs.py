import keras
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import mm_model
from mm_model.fusion import FUSIONS
from mm_model.model import build_model
from mm_model.spec import FusionSpec, ImageSpec, ModelSpec, NumericSpec
from mm_model.statistics import Vocabulary
from tests.mm_model.examples import (
    COLOUR,
    NO_RANDOMNESS,
    SMALLEST_OF_EACH_FAMILY,
    UNTRAINED,
    half_precision,
    model_with_all_inputs,
    rows,
    rows_with_all_inputs,
    with_random_heads,
)


@pytest.mark.parametrize(
    "kind",
    [
        # One backbone consists of layers of the network, the other is a nested model.
        pytest.param(k, marks=() if k in ("tiny", "mobilenet_v3_small") else pytest.mark.slow)
        for k in SMALLEST_OF_EACH_FAMILY
    ],
)
def test_every_family_takes_several_images_and_categories(kind, tmp_path):
    size = SMALLEST_OF_EACH_FAMILY[kind]
    inputs, y = rows_with_all_inputs(4, num_images=2, size=size)
    spec = ModelSpec(
        image=ImageSpec(kind=kind, weights=None, units=8),
        numeric=NumericSpec(units=(8,)),
        fusion=FusionSpec(units=8),
    )
    statistics = mm_model.fit_numeric_statistics(inputs["numeric"])
    model = build_model(spec, statistics, (2, size, size, 3), vocabularies=[COLOUR])
    assert model.input_names == ["image", "image_mask", "numeric", "category"]
    model.compile("adam", "binary_crossentropy", run_eagerly=True)
    assert np.isfinite(model.train_on_batch(inputs, y))
    # The heads start at zero, so only the second step changes the layers below them.
    entries = np.asarray(model.network.get_layer("category_embedding").entries[0])
    top = model.network.get_layer("image_top_dense").get_weights()[0]
    assert np.isfinite(model.train_on_batch(inputs, y))
    assert np.abs(model.network.get_layer("image_top_dense").get_weights()[0] - top).max() > 0
    change = np.asarray(model.network.get_layer("category_embedding").entries[0]) - entries
    assert np.abs(change).max() > 0
    expected = np.asarray(model(inputs))
    model.save(tmp_path / "model.keras")
    again = mm_model.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(np.asarray(again(inputs)), expected)
    assert again.network.get_layer("category_embedding").vocabularies == (COLOUR,)


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


def test_a_row_of_equal_images_has_the_probability_of_one_image():
    image, numbers, _ = rows()
    statistics = mm_model.fit_numeric_statistics(numbers)
    one = with_random_heads(mm_model.create_model((16, 16, 3), (3,), statistics, **UNTRAINED))
    three = mm_model.create_model((3, 16, 16, 3), (3,), statistics, **UNTRAINED)
    for layer in one.network.layers:
        three.network.get_layer(layer.name).set_weights(layer.get_weights())
    expected = np.asarray(one([image, numbers]))
    got = np.asarray(three([np.stack([image] * 3, axis=1), numbers]))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert expected.std() > 0


def test_missing_images_do_not_change_the_statistics_of_batch_norm():
    inputs, _ = rows_with_all_inputs(count=2, num_images=2)
    photo, numbers = inputs["image"][:, :1], np.zeros((2, 3))

    def statistics_after(second: np.ndarray, mask: list[float]) -> list[np.ndarray]:
        keras.utils.set_random_seed(0)
        model = mm_model.create_model((2, 16, 16, 3), (3,), **NO_RANDOMNESS)
        image = np.concatenate([photo, second], axis=1)
        given = {"image": image, "image_mask": np.array([mask] * 2), "numeric": numbers}
        model(given, training=True)
        return [np.asarray(v) for v in model.non_trainable_variables if "moving" in v.path]

    twice = statistics_after(photo, [1, 1])
    for a, b in zip(twice, statistics_after(np.zeros_like(photo), [1, 0]), strict=True):
        np.testing.assert_array_equal(a, b)
    black = statistics_after(np.zeros_like(photo), [1, 1])
    assert any((a != b).any() for a, b in zip(twice, black, strict=True))


def test_without_a_mask_all_images_are_present():
    inputs, y = rows_with_all_inputs()
    model = model_with_all_inputs(inputs)
    as_list = [inputs["image"], inputs["numeric"], inputs["category"]]
    as_dict = {name: inputs[name] for name in ("category", "image", "numeric")}
    model.run_eagerly = True
    model.fit(as_list, y, validation_data=(as_dict, y), epochs=1, verbose=0)
    expected = np.asarray(model({**inputs, "image_mask": np.ones((16, 3))}))
    np.testing.assert_array_equal(np.asarray(model(as_list)), expected)
    np.testing.assert_array_equal(np.asarray(model(as_dict)), expected)
    np.testing.assert_allclose(model.predict(as_dict, verbose=0), expected, rtol=1e-4)
    assert (np.asarray(model(inputs)) != expected).any()


def test_each_image_of_a_row_is_augmented_independently():
    image, _, _ = rows(count=2)
    model = mm_model.create_model((3, 16, 16, 3), (3,), **UNTRAINED)
    network = model.network
    augmented = keras.Model(
        [network.input["image"], network.input["image_mask"]],
        network.get_layer("augment_colour").output,
    )
    same = [np.stack([image] * 3, axis=1).astype("float32"), np.ones((2, 3), "float32")]
    seen = np.asarray(augmented(same, training=True)).reshape(2, 3, -1)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (np.abs(seen[:, a] - seen[:, b]).mean(axis=1) > 1).all()


def test_the_numeric_branch_needs_only_categories():
    inputs, y = rows_with_all_inputs()
    empty = mm_model.fit_numeric_statistics(np.empty((16, 0)))
    for statistics, shape in ((None, (0,)), (None, None), (empty, (0,))):
        spec = ModelSpec.model_validate({"image": {"kind": "none", "weights": None}})
        model = build_model(spec, statistics, (16, 16, 3), shape, [COLOUR])
        assert model.input_names == ["category"]
        assert model.heads == ["numeric"]
        model.compile("adam", "binary_crossentropy", run_eagerly=True)
        model.fit({"category": inputs["category"]}, y, epochs=1, verbose=0)
        by_position = np.asarray(model([inputs["image"], inputs["numeric"], inputs["category"]]))
        np.testing.assert_array_equal(by_position, np.asarray(model(inputs["category"])))


def test_without_a_numeric_branch_categories_are_ignored():
    inputs, _ = rows_with_all_inputs(num_images=1)
    spec = ModelSpec.model_validate({**UNTRAINED, "numeric": {"kind": "none"}})
    model = build_model(spec, None, (16, 16, 3), vocabularies=[COLOUR])
    assert model.input_names == ["image"]
    image = inputs["image"][:, 0]
    expected = np.asarray(model({"image": image}))
    np.testing.assert_array_equal(
        np.asarray(model([image, inputs["numeric"], inputs["category"]])), expected
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            lambda x: [x["image"], x["numeric"]],
            r"takes \['image', 'numeric', 'category'\], got 2 inputs",
        ),
        (lambda x: [x["image"]] * 4, r"takes \['image', 'numeric', 'category'\], got 4 inputs"),
        (
            lambda x: {"image": x["image"], "numeric": x["numeric"]},
            r"\['category'\] are missing; .* got \['image', 'numeric', 'image_mask'\]",
        ),
    ],
)
def test_missing_inputs_are_named(given, message):
    inputs, _ = rows_with_all_inputs()
    model = mm_model.create_model((3, 16, 16, 3), (3,), vocabularies=[COLOUR], **UNTRAINED)
    with pytest.raises(ValueError, match=message):
        model(given(inputs))


def test_a_model_learns_from_a_category_and_is_uncertain_without_it():
    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    words = rng.choice(list("abcdefgh"), 1024)
    y = np.isin(words, ("a", "b")).astype(int)
    numbers = rng.normal(size=(1024, 2))
    letter = mm_model.fit_vocabulary(words, "letter")
    model = mm_model.create_model(
        (16, 16, 3),
        (2,),
        mm_model.fit_numeric_statistics(numbers),
        vocabularies=[letter],
        learning_rate=3e-3,
        image={"kind": "none", "weights": None},
        numeric={"category_dropout": 0.2},
    )
    model.fit([numbers, letter.codes(words)[:, None]], y, epochs=15, batch_size=32, verbose=0)

    def mean_probability(code: int) -> float:
        # Random numbers that are not in the training rows.
        unseen = rng.normal(size=(64, 2))
        return float(model.predict([unseen, np.full((64, 1), code)], verbose=0).mean())

    for word in letter.words:
        p = mean_probability(int(letter.codes([word])[0]))
        assert p > 0.9 if word in "ab" else p < 0.1, word
    # Training has neither missing nor unknown words nor invalid codes. A quarter of the rows is
    # positive; predicting this share has a loss of 0.56.
    for code in (Vocabulary.MISSING, Vocabulary.UNKNOWN, 99, -5):
        p = mean_probability(code)
        assert -0.25 * np.log(p) - 0.75 * np.log(1 - p) < 0.65, p


def test_a_model_learns_from_the_one_informative_image_of_several():
    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    y = rng.integers(0, 2, 384)
    image = rng.integers(0, 120, (384, 3, 16, 16, 3))
    # Among positive rows, one random image of three is brighter.
    image[np.arange(384), rng.integers(0, 3, 384)] += 100 * y[:, None, None, None]
    model = mm_model.create_model(
        (3, 16, 16, 3), (1,), **{**NO_RANDOMNESS, "numeric": {"kind": "none"}}, learning_rate=3e-3
    )
    train, test = slice(256), slice(256, None)
    model.fit([image[train]], y[train], epochs=6, batch_size=32, verbose=0)
    p = model.predict([image[test]], verbose=0)[:, 0]
    assert roc_auc_score(y[test], p) > 0.99


def test_numbers_reach_their_encoding_in_full_precision():
    numbers = np.random.default_rng(0).normal(100_000, 10, (64, 3))
    statistics = mm_model.fit_numeric_statistics(numbers)
    inputs = {"image": np.zeros((64, 16, 16, 3), np.uint8), "numeric": numbers.astype(np.float32)}

    def encoded() -> np.ndarray:
        model = mm_model.create_model((16, 16, 3), (3,), statistics, **UNTRAINED)
        seen = []
        encode = model.network.get_layer("numeric_encoding")
        call = encode.call
        encode.call = lambda x: seen.append(call(x)) or seen[-1]
        probability = model(inputs)
        assert keras.backend.standardize_dtype(probability.dtype) == "float32"
        return np.asarray(seen[0])

    expected = encoded()
    with half_precision():
        np.testing.assert_array_equal(encoded(), expected)
    assert expected[:, 0].std() == pytest.approx(1, rel=0.01)
