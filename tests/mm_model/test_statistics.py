import numpy as np
import pytest

from mm_model.statistics import Vocabulary, fit_numeric_statistics, fit_vocabulary

NAN = float("nan")
TEXTS = ["red", "blue", None, "red", "green", "blue", "red", NAN, np.float32("nan")]


def test_words_have_codes_from_2_after_missing_and_unknown():
    vocabulary = fit_vocabulary(TEXTS, "colour")
    assert vocabulary == Vocabulary(column="colour", words=("blue", "red"))
    # The order of the rows does not change the codes.
    assert vocabulary == fit_vocabulary(reversed(TEXTS), "colour")
    assert vocabulary.num_codes == 4
    codes = vocabulary.codes([None, NAN, "green", "blue", "red", "never seen", ""])
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, [0, 0, 1, 2, 3, 1, 1])


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        (TEXTS, {"min_count": 3}, ("red",)),
        (TEXTS, {"min_count": 1}, ("blue", "green", "red")),
        # A full vocabulary keeps the most frequent words, of equally frequent ones the first.
        ("abbcccdddd", {"max_words": 2}, ("c", "d")),
        ("ccbbaa", {"max_words": 2}, ("a", "b")),
        ([None, NAN], {}, ()),
    ],
)
def test_a_vocabulary_has_the_frequent_words(texts, options, words):
    vocabulary = fit_vocabulary(texts, "x", **options)
    assert vocabulary.words == words
    np.testing.assert_array_equal(vocabulary.codes([None, "new"]), [0, 1])
    assert vocabulary.codes([]).shape == (0,)


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
