from itertools import pairwise

import numpy as np
import pytest

from mm_model.layers.encodings import CategoryEmbedding, NumericEncoding, bin_edges, embedding_width
from mm_model.statistics import Vocabulary, fit_numeric_statistics

COLOUR = Vocabulary(column="colour", words=("blue", "green", "red"))
SHAPE = Vocabulary(column="shape / a name that no variable may have", words=("round",))


def piecewise_linear(value: float, edges: np.ndarray) -> list[float]:
    """Equation 1 of Gorishniy et al. 2022, cut at the ends of the training range."""
    components = []
    for low, high in pairwise(edges):
        components.append(
            0.0 if value < low else 1.0 if value >= high else (value - low) / (high - low)
        )
    return components


def test_the_encoding_agrees_with_the_paper_written_as_a_loop():
    rng = np.random.default_rng(0)
    values = np.stack([rng.normal(size=200), rng.exponential(50, 200)], axis=1)
    values[::7, 1] = np.nan
    statistics = fit_numeric_statistics(values)
    layer = NumericEncoding(statistics, bins=8)
    probe = np.concatenate([values, [[-99, -99], [99, 9999], [np.nan, np.nan]]]).astype(np.float32)
    got = np.asarray(layer(probe))
    edges = [bin_edges(statistics.quantiles[i], 8) for i in (0, 1)]
    for row, encoded in zip(probe, got, strict=True):
        filled = [statistics.median(i) if np.isnan(v) else float(v) for i, v in enumerate(row)]
        standard = [
            np.clip((v - statistics.mean[i]) / statistics.std[i], -10, 10)
            for i, v in enumerate(filled)
        ]
        ple = [c for i in (0, 1) for c in piecewise_linear(filled[i], edges[i])]
        expected = [*standard, *ple, float(np.isnan(row[1]))]
        np.testing.assert_allclose(encoded, expected, atol=2e-5)
    assert got.shape == layer.compute_output_shape((203, 2))


def test_bins_hold_the_same_share_of_the_training_rows():
    values = np.random.default_rng(0).exponential(size=4000)
    statistics = fit_numeric_statistics(values[:, None])
    counts, _ = np.histogram(values, bin_edges(statistics.quantiles[0], 10))
    assert counts.min() > 380
    assert counts.max() < 420


def test_few_distinct_values_make_few_bins_and_a_constant_makes_none():
    values = np.stack([np.tile([0.0, 1.0, 2.0], 10), np.full(30, 7.0), np.full(30, np.nan)], axis=1)
    statistics = fit_numeric_statistics(values)
    # Quantiles between two values that were seen lie on the way from one to the other.
    assert {0.0, 1.0, 2.0} <= set(bin_edges(statistics.quantiles[0], 32).tolist())
    assert len(bin_edges(statistics.quantiles[1], 32)) == 0
    encoded = np.asarray(NumericEncoding(statistics, 32)(values.astype(np.float32)))
    assert np.isfinite(encoded).all()
    assert encoded[0, 1] == encoded[0, 2] == 0.0


def test_statistics_agree_with_numpy_and_refuse_infinities():
    values = np.random.default_rng(0).normal(3, 2, (101, 2))
    values[:5, 0] = np.nan
    statistics = fit_numeric_statistics(values, ("a", "b"))
    assert statistics.missing == (5, 0)
    assert statistics.mean == pytest.approx(np.nanmean(values, axis=0), rel=1e-12)
    assert statistics.std == pytest.approx(np.nanstd(values, axis=0), rel=1e-12)
    assert statistics.median(1) == pytest.approx(np.median(values[:, 1]), abs=1e-2)
    values[0, 0] = np.inf
    with pytest.raises(ValueError, match="infinities"):
        fit_numeric_statistics(values)


def test_a_category_gives_the_entries_of_its_code():
    layer = CategoryEmbedding([COLOUR, SHAPE])
    codes = np.array([[4, 2], [0, 1], [1, 0], [3, 2]], np.int32)
    got = np.asarray(layer(codes))
    colour, shape = (np.asarray(entries) for entries in layer.entries)
    assert (len(colour), len(shape)) == (5, 3)
    expected = [[*colour[c], *shape[s]] for c, s in codes]
    np.testing.assert_array_equal(got, np.asarray(expected))
    assert got.shape == layer.compute_output_shape((4, 2))


def test_a_number_that_is_no_code_counts_as_unknown():
    layer = CategoryEmbedding([COLOUR, SHAPE])
    unknown = np.asarray(layer(np.array([[1, 1]])))
    odd = np.array([[5, 3], [-1, -1], [2**31 - 1, -(2**31)]], np.int32)
    np.testing.assert_array_equal(np.asarray(layer(odd)), np.repeat(unknown, 3, axis=0))


def test_a_share_of_the_known_words_is_hidden_in_training_alone():
    layer = CategoryEmbedding([COLOUR], dropout=0.4, seed=1)
    codes = np.repeat([[0], [1], [2], [4]], 10_000, axis=0).astype(np.int32)
    names = {tuple(np.asarray(layer(np.array([[c]])))[0].tolist()): c for c in range(5)}
    assert len(names) == 5

    def seen(training: bool) -> np.ndarray:
        features = np.asarray(layer(codes, training=training)).tolist()
        return np.array([names[tuple(row)] for row in features]).reshape(4, -1)

    missing, unknown, blue, red = seen(training=True)
    # What is missing or unknown in truth stays what it is.
    assert set(missing) == {0}
    assert set(unknown) == {1}
    for code, words in ((2, blue), (4, red)):
        shares = np.bincount(words, minlength=5) / len(words)
        expected = np.zeros(5)
        expected[[0, 1, code]] = 0.2, 0.2, 0.6
        np.testing.assert_allclose(shares, expected, atol=0.02)
    np.testing.assert_array_equal(seen(training=False).ravel(), codes[:, 0])


def test_the_penalty_of_categories_is_that_of_a_kernel():
    layer = CategoryEmbedding([COLOUR, SHAPE], l2=0.1)
    layer.build((None, 2))
    expected = 0.1 * sum(float((np.asarray(e) ** 2).sum()) for e in layer.entries)
    assert float(sum(layer.losses)) == pytest.approx(expected, rel=1e-5)


def test_categories_keep_their_words_in_their_config():
    layer = CategoryEmbedding([COLOUR, SHAPE], dropout=0.1, l2=0.2, name="category_embedding")
    again = CategoryEmbedding.from_config(layer.get_config())
    assert again.vocabularies == (COLOUR, SHAPE)
    assert (again.dropout, again.l2, again.name) == (0.1, 0.2, "category_embedding")


def test_the_width_of_a_category_is_what_fastai_gives_it():
    # The columns of the Adult data in fastai's tabular tutorial: Embedding(10, 6), …
    published = {10: 6, 17: 8, 8: 5, 16: 8, 7: 5, 6: 4, 3: 3}
    assert {n: embedding_width(n) for n in published} == published
    assert embedding_width(2) == 2
    assert embedding_width(10**6) == 600
