import numpy as np
import pytest

from mm_model.layers.category_embedding import CategoryEmbedding, embedding_width
from mm_model.statistics import Vocabulary
from tests.mm_model.examples import COLOUR

SHAPE = Vocabulary(column="shape / a name that is invalid for variables", words=("round",))


def test_a_category_is_mapped_to_the_embedding_of_its_code_and_an_invalid_code_to_unknown():
    layer = CategoryEmbedding([COLOUR, SHAPE], l2=0.1)
    odd = [[5, 3], [-1, -1], [2**31 - 1, -(2**31)]]
    got = np.asarray(layer(np.array([[4, 2], [0, 1], [1, 0], [3, 2], *odd], np.int32)))
    colour, shape = (np.asarray(entries) for entries in layer.entries)
    assert (len(colour), len(shape)) == (5, 3)
    codes = [(4, 2), (0, 1), (1, 0), (3, 2), *[(1, 1)] * 3]
    np.testing.assert_array_equal(got, [[*colour[c], *shape[s]] for c, s in codes])
    # Embeddings have the penalty of a kernel.
    expected = 0.1 * ((colour**2).sum() + (shape**2).sum())
    assert float(sum(layer.losses)) == pytest.approx(expected, rel=1e-5)


def test_a_share_of_the_known_words_is_hidden_in_training_only():
    layer = CategoryEmbedding([COLOUR], dropout=0.4, seed=1)
    codes = np.repeat([[0], [1], [2], [4]], 10_000, axis=0).astype(np.int32)
    embeddings = np.asarray(layer(np.arange(5)[:, None]))

    def seen(training: bool) -> np.ndarray:
        features = np.asarray(layer(codes, training=training))
        matches = (features[:, None] == embeddings).all(axis=2)
        assert (matches.sum(axis=1) == 1).all()
        return matches.argmax(axis=1).reshape(4, -1)

    shares = [np.bincount(words, minlength=5) / 10_000 for words in seen(training=True)]
    # Missing and unknown words keep their code.
    np.testing.assert_array_equal(shares[:2], np.eye(5)[:2])
    expected = [[0.2, 0.2, 0.6, 0, 0], [0.2, 0.2, 0, 0, 0.6]]
    np.testing.assert_allclose(shares[2:], expected, atol=0.02)
    np.testing.assert_array_equal(seen(training=False).ravel(), codes[:, 0])


def test_the_width_of_an_embedding_equals_that_of_fastai():
    # The columns of the Adult data in fastai's tabular tutorial: Embedding(10, 6), …
    published = {10: 6, 17: 8, 8: 5, 16: 8, 7: 5, 6: 4, 3: 3}
    assert {n: embedding_width(n) for n in published} == published
    assert (embedding_width(2), embedding_width(10**6)) == (2, 600)
