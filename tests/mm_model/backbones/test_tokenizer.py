import json
import pickle

import numpy as np
import pytest

from mm_model.backbones.tokenizer import (
    HashedNgrams,
    TextReader,
    fit_words,
    read_tokenizer,
    wordpiece_tokenizer,
)

TEXTS = ["No crack, no rust.", "no CRACK at été", None, "rust"]


def test_words_are_frequent_first_and_any_text_consists_of_words_and_characters():
    words = fit_words(TEXTS)
    assert words[-3:] == ("no", "crack", "rust")
    assert {"c", "##c", "é", "##é", ","} < set(words)
    tokenizer = wordpiece_tokenizer(words)
    ids, _ = tokenizer.encode("No tac, crack", 20)
    names = [json.loads(tokenizer.content)["model"]["vocab"].get(w) for w in ("no", "crack", "t")]
    assert ids[1] == names[0]
    assert ids[-2] == names[1]
    assert ids[2] == names[2]
    assert len(ids) == 1 + 1 + 3 + 1 + 1 + 1


@pytest.mark.parametrize(
    "tokenizer", [HashedNgrams(), wordpiece_tokenizer(fit_words(TEXTS))], ids=["hashed", "subwords"]
)
def test_a_reader_survives_its_file_and_pickling(tokenizer):
    reader = TextReader(("a", "b"), tokenizer, length=10)
    expected = tokenizer.encode("no crack in the weld", 10)
    for again in (TextReader.from_json(reader.to_json()), pickle.loads(pickle.dumps(reader))):
        assert (again.columns, again.length) == (reader.columns, reader.length)
        assert again.tokenizer.encode("no crack in the weld", 10) == expected
        assert again.tokenizer.num_tokens == tokenizer.num_tokens
    assert all(0 <= i < tokenizer.num_tokens for i in expected[0])


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_a_damaged_file_is_an_error(content):
    with pytest.raises(ValueError, match=r"\w"):
        TextReader.from_json(content)


def test_hashed_ngrams_are_words_each_followed_by_its_pair():
    words, pair = HashedNgrams().encode("No crack", 10)[0], HashedNgrams().encode("no", 10)[0]
    assert len(words) == 3
    assert words[0] == pair[0]
    assert HashedNgrams().encode("no crack", 2) == (words[:2], True)
    assert HashedNgrams().encode("crack no", 10)[0][1] != words[1]
    assert HashedNgrams().encode("", 10) == ([], False)


def test_cutting_keeps_the_special_tokens():
    tokenizer = wordpiece_tokenizer(fit_words(TEXTS))
    whole, is_cut = tokenizer.encode("no crack, no rust", 7)
    assert (len(whole), is_cut) == (7, False)
    short, is_cut = tokenizer.encode("no crack, no rust", 4)
    assert (short, is_cut) == ([*whole[:3], whole[-1]], True)


def test_a_reader_pads_marks_missing_texts_and_counts_cut_ones():
    reader = TextReader(("a", "b"), HashedNgrams(), length=3)
    ids, mask, cut = reader([["no crack", None], [float("nan"), "a b c d"]])
    assert (ids.shape, ids.dtype, mask.dtype) == ((2, 2, 3), np.int32, np.float32)
    np.testing.assert_array_equal(mask[:, :, 0], [[1, 0], [0, 1]])
    np.testing.assert_array_equal(mask[0, 0], [1, 1, 1])
    np.testing.assert_array_equal(cut, [[0], [1]])
    assert (ids[mask == 0] == 0).all()


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(OSError, match=r"has no tokenizer\.json, vocabulary or merges"):
        read_tokenizer(tmp_path)


def test_the_casing_of_hugging_face_and_keras_hub_folders_is_respected(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "Crack", "crack", "e"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    assert read_tokenizer(tmp_path).encode("Crack É", 9)[0] == [2, 5, 6, 3]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert read_tokenizer(tmp_path).encode("Crack É", 9)[0] == [2, 4, 1, 3]
