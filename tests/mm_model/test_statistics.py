import numpy as np
import pytest

from mm_model.statistics import Vocabulary, fit_vocabulary

TEXTS = ["red", "blue", None, "red", "green", "blue", "red", None]


def test_words_have_codes_from_2_and_missing_and_unknown_words_have_their_own():
    vocabulary = fit_vocabulary(TEXTS, "colour")
    assert vocabulary == Vocabulary(column="colour", words=("blue", "red"))
    assert vocabulary.num_codes == 4
    codes = vocabulary.codes([None, "green", "blue", "red", "never seen", ""])
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, [0, 1, 2, 3, 1, 1])


def test_the_order_of_the_rows_does_not_change_the_codes():
    assert fit_vocabulary(reversed(TEXTS), "colour") == fit_vocabulary(TEXTS, "colour")


def test_of_too_many_words_the_most_frequent_are_kept():
    texts = [word for count, word in enumerate("abcdef", start=1) for _ in range(count)]
    assert fit_vocabulary(texts, "x", max_words=3).words == ("d", "e", "f")
    # As frequent as each other: the first of the alphabet, so that two fits agree.
    assert fit_vocabulary("ccbbaa", "x", max_words=2).words == ("a", "b")


def test_a_rare_word_is_unknown():
    assert fit_vocabulary(TEXTS, "colour", min_count=3).words == ("red",)
    assert fit_vocabulary(TEXTS, "colour", min_count=1).words == ("blue", "green", "red")


def test_a_column_without_words_still_has_codes_for_missing_and_unknown():
    vocabulary = fit_vocabulary([None, None], "empty")
    assert vocabulary.words == ()
    np.testing.assert_array_equal(vocabulary.codes([None, "new"]), [0, 1])
    assert vocabulary.codes([]).shape == (0,)


def test_nan_as_tables_hold_it_for_missing_is_missing():
    texts = [*TEXTS, float("nan"), np.float32("nan"), float("nan")]
    vocabulary = fit_vocabulary(texts, "colour")
    assert vocabulary == fit_vocabulary(TEXTS, "colour")
    np.testing.assert_array_equal(vocabulary.codes(["red", *texts[-3:]]), [3, 0, 0, 0])


def test_a_word_that_is_there_twice_is_refused():
    with pytest.raises(ValueError, match=r"'colour' holds a word twice: red"):
        Vocabulary(column="colour", words=("red", "blue", "red"))
