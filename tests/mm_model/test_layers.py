from itertools import pairwise

import keras
import numpy as np
import pytest

from mm_model.layers import AffineLogit, ModalityDropout, NumericEncoding, bin_edges
from mm_model.statistics import fit_numeric_statistics


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


def test_modality_dropout_hides_one_branch_of_its_share_of_rows_and_never_both():
    first, second = np.ones((20_000, 2), np.float32), np.full((20_000, 3), 2, np.float32)
    layer = ModalityDropout(0.4, seed=1)
    a, b = (np.asarray(x) for x in layer([first, second], training=True))
    hidden_a, hidden_b = (a == 0).all(axis=1), (b == 0).all(axis=1)
    assert hidden_a.mean() == pytest.approx(0.2, abs=0.02)
    assert hidden_b.mean() == pytest.approx(0.2, abs=0.02)
    assert not (hidden_a & hidden_b).any()
    a, b = (np.asarray(x) for x in layer([first, second], training=False))
    np.testing.assert_array_equal(a, first)
    np.testing.assert_array_equal(b, second)


def test_an_affine_logit_is_not_trained_and_keeps_what_it_was_set_to():
    layer = AffineLogit([0.5, 0.5])
    logits = np.array([[1.0, 3.0], [2.0, -2.0]], np.float32)
    np.testing.assert_allclose(np.asarray(layer(logits)), [[2.0], [0.0]])
    assert layer.trainable_variables == []
    layer.set([1.0, 0.0], bias=-1.0)
    np.testing.assert_allclose(np.asarray(layer(logits)), [[0.0], [1.0]])
    again = AffineLogit.from_config(layer.get_config())
    assert isinstance(again, keras.layers.Layer)
    np.testing.assert_allclose(np.asarray(again(logits)), [[2.0], [0.0]])
