from itertools import pairwise

import numpy as np

from mm_model.layers.numeric_encoding import NumericEncoding, bin_edges
from mm_model.statistics import fit_numeric_statistics


def piecewise_linear(value: float, edges: np.ndarray) -> list[float]:
    """Equation 1 of Gorishniy et al. 2022, clipped to the training range."""
    components = []
    for low, high in pairwise(edges):
        components.append(
            0.0 if value < low else 1.0 if value >= high else (value - low) / (high - low)
        )
    return components


def test_the_encoding_agrees_with_the_formula_of_the_paper():
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


def test_bins_contain_equal_shares_of_the_training_rows():
    values = np.random.default_rng(0).exponential(size=4000)
    statistics = fit_numeric_statistics(values[:, None])
    counts, _ = np.histogram(values, bin_edges(statistics.quantiles[0], 10))
    assert counts.min() > 380
    assert counts.max() < 420


def test_few_distinct_values_have_few_bins_and_a_constant_has_none():
    values = np.stack([np.tile([0.0, 1.0, 2.0], 10), np.full(30, 7.0), np.full(30, np.nan)], axis=1)
    statistics = fit_numeric_statistics(values)
    # Quantiles between two values are interpolated.
    assert {0.0, 1.0, 2.0} <= set(bin_edges(statistics.quantiles[0], 32).tolist())
    assert len(bin_edges(statistics.quantiles[1], 32)) == 0
    encoded = np.asarray(NumericEncoding(statistics, 32)(values.astype(np.float32)))
    assert np.isfinite(encoded).all()
    assert encoded[0, 1] == encoded[0, 2] == 0.0
