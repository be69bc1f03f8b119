import keras
import numpy as np
import pytest

import mm_model
from mm_model.statistics import Vocabulary
from tests.mm_model.examples import NO_RANDOMNESS, rows, with_random_heads

WORDS = (("blue", "red"), ("green", "red"))
ALL_WORDS = ("blue", "green", "red")


def test_the_mean_model_averages_models_with_their_own_vocabularies_and_reloads(tmp_path):
    keras.utils.set_random_seed(0)
    image, numbers, _ = rows(8)
    texts = np.array(["red", "green", "blue", None, "grey", "red", "blue", "green"], object)
    joined = Vocabulary(column="colour", words=ALL_WORDS)
    models, codes, expected = [], [], []
    for words in WORDS:
        vocabulary = Vocabulary(column="colour", words=words)
        model = mm_model.create_model(
            image.shape[1:], numbers.shape[1:], mm_model.fit_numeric_statistics(numbers),
            vocabularies=[vocabulary], **NO_RANDOMNESS,
        )  # fmt: skip
        with_random_heads(model)
        models.append(model)
        codes.append([[0, 1, *vocabulary.codes(ALL_WORDS).tolist()]])
        own = {"category": vocabulary.codes(texts)[:, None]}
        expected.append(np.asarray(model({"image": image, "numeric": numbers, **own})))
    assert np.abs(expected[0] - expected[1]).min() > 1e-4
    mean = mm_model.MeanModel(models, codes)
    inputs = {"image": image, "numeric": numbers, "category": joined.codes(texts)[:, None]}
    np.testing.assert_allclose(np.asarray(mean(inputs)), np.mean(expected, axis=0), atol=1e-6)
    in_a_list = [inputs[name] for name in ("image", "numeric", "category")]
    np.testing.assert_array_equal(np.asarray(mean(in_a_list)), np.asarray(mean(inputs)))
    mean.save(tmp_path / "mean.keras")
    loaded = mm_model.load_model(tmp_path / "mean.keras")
    assert isinstance(loaded, mm_model.MeanModel)
    assert loaded.input_names == ["image", "numeric", "category"]
    np.testing.assert_array_equal(np.asarray(loaded(inputs)), np.asarray(mean(inputs)))
    other = mm_model.MeanModel(models[:1], [[]])
    without = {**inputs, "category": np.ones((8, 1), np.int32)}
    assert np.asarray(other(without)) == pytest.approx(np.asarray(models[0](without)))
