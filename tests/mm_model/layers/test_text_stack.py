import numpy as np
import pytest

from mm_model.layers.text_stack import FoldTexts, TokenEmbedding, UnfoldTexts

ROWS, COLUMNS, LENGTH, WIDTH = 4, 2, 3, 5


def tokens_and_mask() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(ROWS * COLUMNS, LENGTH, WIDTH)).astype(np.float32)
    mask = np.ones((ROWS, COLUMNS, LENGTH), np.float32)
    mask[0, 0, 1:] = 0
    mask[1, 1] = 0
    return tokens, mask


def unfold(**options) -> UnfoldTexts:
    layer = UnfoldTexts(seed=1, **options)
    layer.build([(None, LENGTH, WIDTH), (None, COLUMNS, LENGTH)])
    rng = np.random.default_rng(1)
    for weight in layer.trainable_weights:
        weight.assign(rng.normal(size=weight.shape))
    return layer


def test_pooled_texts_are_the_mean_of_their_tokens_and_a_missing_text_is_one_learned_token():
    (tokens, mask), layer = tokens_and_mask(), unfold()
    pooled, rows, present = (np.asarray(x) for x in layer([tokens, mask]))
    own = tokens.reshape(ROWS, COLUMNS, LENGTH, WIDTH) + np.asarray(layer.column)
    missing = np.asarray(layer.missing)[0, :, 0]
    pooled = pooled.reshape(ROWS, COLUMNS, WIDTH)
    np.testing.assert_allclose(pooled[0, 0], own[0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(pooled[2], own[2].mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(pooled[1, 1], missing[1], atol=1e-6)
    expected = mask.copy()
    expected[1, 1, 0] = 1
    np.testing.assert_array_equal(present, expected.reshape(ROWS, -1))
    rows = rows.reshape(ROWS, COLUMNS, LENGTH, WIDTH)
    np.testing.assert_allclose(rows[2], own[2], atol=1e-6)
    np.testing.assert_allclose(rows[1, 1, 0], missing[1], atol=1e-6)


def test_dropout_makes_texts_missing_at_its_rate_in_training_only():
    layer = unfold(dropout=0.3)
    tokens = np.ones((20_000, 1, WIDTH), np.float32)
    mask = np.ones((10_000, COLUMNS, 1), np.float32)
    pooled = np.asarray(layer([tokens, mask], training=True)[0]).reshape(-1, COLUMNS, WIDTH)
    is_missing = np.isclose(pooled, np.asarray(layer.missing)[:, :, 0]).all(axis=2)
    assert is_missing.mean(axis=0) == pytest.approx(0.3, abs=0.02)
    pooled = np.asarray(layer([tokens, mask])[0]).reshape(-1, COLUMNS, WIDTH)
    assert not np.isclose(pooled, np.asarray(layer.missing)[:, :, 0]).all(axis=2).any()


def test_folding_keeps_the_order_of_texts_and_large_ids_in_half_precision():
    ids = np.arange(24).reshape(4, 2, 3) + 30_000
    layer = FoldTexts(dtype="mixed_bfloat16")
    folded, mask = layer([ids, np.ones(ids.shape, np.float32)])
    np.testing.assert_array_equal(folded, ids.reshape(8, 3))
    assert mask.shape == (8, 3)


def test_an_embedding_looks_up_the_vectors_of_ids():
    layer = TokenEmbedding(10, 4)
    ids = np.asarray([[1, 9], [0, 1]])
    vectors = np.asarray(layer(ids))
    np.testing.assert_array_equal(vectors, np.asarray(layer.vectors)[ids])
    assert np.asarray(TokenEmbedding(5000, 4)(ids)).shape == (2, 2, 4)
    assert np.asarray(layer.vectors).std() == pytest.approx(1, abs=0.2)
