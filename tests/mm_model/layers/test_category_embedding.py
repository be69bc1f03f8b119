import numpy as np
import pytest

from mm_model.layers.category_embedding import CategoryEmbedding, embedding_width
from mm_model.statistics import Vocabulary

COLOUR = Vocabulary(column="colour", words=("blue", "green", "red"))
SHAPE = Vocabulary(column="shape / a name that is invalid for variables", words=("round",))


def test_a_category_is_mapped_to_the_embedding_of_its_code():
    layer = CategoryEmbedding([COLOUR, SHAPE])
    codes = np.array([[4, 2], [0, 1], [1, 0], [3, 2]], np.int32)
    got = np.asarray(layer(codes))
    colour, shape = (np.asarray(entries) for entries in layer.entries)
    assert (len(colour), len(shape)) == (5, 3)
    expected = [[*colour[c], *shape[s]] for c, s in codes]
    np.testing.assert_array_equal(got, np.asarray(expected))


def test_an_invalid_code_counts_as_unknown():
    layer = CategoryEmbedding([COLOUR, SHAPE])
    unknown = np.asarray(layer(np.array([[1, 1]])))
    odd = np.array([[5, 3], [-1, -1], [2**31 - 1, -(2**31)]], np.int32)
    np.testing.assert_array_equal(np.asarray(layer(odd)), np.repeat(unknown, 3, axis=0))


def test_a_share_of_the_known_words_is_hidden_in_training_only():
    layer = CategoryEmbedding([COLOUR], dropout=0.4, seed=1)
    codes = np.repeat([[0], [1], [2], [4]], 10_000, axis=0).astype(np.int32)
    names = {tuple(np.asarray(layer(np.array([[c]])))[0].tolist()): c for c in range(5)}
    assert len(names) == 5

    def seen(training: bool) -> np.ndarray:
        features = np.asarray(layer(codes, training=training)).tolist()
        return np.array([names[tuple(row)] for row in features]).reshape(4, -1)

    missing, unknown, blue, red = seen(training=True)
    # Missing and unknown words keep their code.
    assert set(missing) == {0}
    assert set(unknown) == {1}
    for code, words in ((2, blue), (4, red)):
        shares = np.bincount(words, minlength=5) / len(words)
        expected = np.zeros(5)
        expected[[0, 1, code]] = 0.2, 0.2, 0.6
        np.testing.assert_allclose(shares, expected, atol=0.02)
    np.testing.assert_array_equal(seen(training=False).ravel(), codes[:, 0])


def test_embeddings_have_the_penalty_of_a_kernel():
    layer = CategoryEmbedding([COLOUR, SHAPE], l2=0.1)
    layer.build((None, 2))
    expected = 0.1 * sum(float((np.asarray(e) ** 2).sum()) for e in layer.entries)
    assert float(sum(layer.losses)) == pytest.approx(expected, rel=1e-5)


def test_the_config_of_an_embedding_contains_its_words():
    layer = CategoryEmbedding([COLOUR, SHAPE], dropout=0.1, l2=0.2, name="category_embedding")
    again = CategoryEmbedding.from_config(layer.get_config())
    assert again.vocabularies == (COLOUR, SHAPE)
    assert (again.dropout, again.l2, again.name) == (0.1, 0.2, "category_embedding")


def test_the_width_of_an_embedding_equals_that_of_fastai():
    # The columns of the Adult data in fastai's tabular tutorial: Embedding(10, 6), …
    published = {10: 6, 17: 8, 8: 5, 16: 8, 7: 5, 6: 4, 3: 3}
    assert {n: embedding_width(n) for n in published} == published
    assert embedding_width(2) == 2
    assert embedding_width(10**6) == 600
