import numpy as np
import pytest

from mm_model.statistics import Vocabulary, fit_numeric_statistics, fit_vocabulary

TEXTS = ["red", "blue", None, "red", "green", "blue", "red", None]


def test_words_have_codes_from_2_after_missing_and_unknown():
    vocabulary = fit_vocabulary(TEXTS, "colour")
    assert vocabulary == Vocabulary(column="colour", words=("blue", "red"))
    assert vocabulary.num_codes == 4
    codes = vocabulary.codes([None, "green", "blue", "red", "never seen", ""])
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, [0, 1, 2, 3, 1, 1])


def test_the_order_of_the_rows_does_not_change_the_codes():
    assert fit_vocabulary(reversed(TEXTS), "colour") == fit_vocabulary(TEXTS, "colour")


def test_a_full_vocabulary_keeps_the_most_frequent_words():
    texts = [word for count, word in enumerate("abcdef", start=1) for _ in range(count)]
    assert fit_vocabulary(texts, "x", max_words=3).words == ("d", "e", "f")
    # Words of equal frequency are kept in alphabetical order, so results are reproducible.
    assert fit_vocabulary("ccbbaa", "x", max_words=2).words == ("a", "b")


def test_a_rare_word_is_unknown():
    assert fit_vocabulary(TEXTS, "colour", min_count=3).words == ("red",)
    assert fit_vocabulary(TEXTS, "colour", min_count=1).words == ("blue", "green", "red")


def test_a_column_without_words_has_codes_for_missing_and_unknown():
    vocabulary = fit_vocabulary([None, None], "empty")
    assert vocabulary.words == ()
    np.testing.assert_array_equal(vocabulary.codes([None, "new"]), [0, 1])
    assert vocabulary.codes([]).shape == (0,)


def test_nan_is_missing():
    texts = [*TEXTS, float("nan"), np.float32("nan"), float("nan")]
    vocabulary = fit_vocabulary(texts, "colour")
    assert vocabulary == fit_vocabulary(TEXTS, "colour")
    np.testing.assert_array_equal(vocabulary.codes(["red", *texts[-3:]]), [3, 0, 0, 0])


def test_a_duplicate_word_is_rejected():
    with pytest.raises(ValueError, match=r"'colour' contains 'red' 2 times"):
        Vocabulary(column="colour", words=("red", "blue", "red"))


def test_statistics_agree_with_numpy_and_reject_infinities():
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
