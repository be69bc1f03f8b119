"""Equal cells, labels, splits, groups and weights; the ids are the threads they come from."""

import io
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ray_jobs.config.command_line import parse
from ray_jobs.config.spec import RunSpec
from tests.ray_jobs.inputs.user_data import UserData, cases, column_of, plain_rows, totals, values

Cell = Callable[[int], Any]

EQUAL = {
    "pandas#8596-keys-become-floats": (["7", "7.0"],),
    "frictionless#1172-blanks": (["P 1", "P 1 ", "P\u00a01"],),
    "renpy#2327-unicode-forms": (["Jos\u00e9", "Jose\u0301"],),
    "country-codes#38-nulls": (["", "NA", "null", "NaN"],),
    "rsmtool#88-zeros": (["7", "7.0", "07"],),
}


@pytest.mark.parametrize("spellings", cases(EQUAL))
def test_equal_cells_are_one_group_and_one_word(user: UserData, spellings: list[str]) -> None:
    """Half of the rows are in one group, and each other row has a group of its own."""

    def rows(words: list[str]) -> list[Any]:
        return plain_rows(site=lambda i: words[i % len(words)] if i < 18 else f"{i}")

    settings: list[Any] = [{"categorical": ["site"]}, {"group_column": "site"}]
    for setting in settings[: 1 if "" in spellings else 2]:  # a row needs a group
        expected = values(user.look(rows(spellings[:1]), **setting))
        assert values(user.look(rows(spellings), **setting)) == expected


TRUTHS = {
    "autogluon#957-booleans": (["True", "False"],),
    "cpython#119123-mixed": (["True", "yes", "1", "False", "no", "0"],),
}


@pytest.mark.parametrize("words", cases(TRUTHS))
def test_booleans_are_the_same_words_in_every_format(user: UserData, words: list[str]) -> None:
    number = [i // 5 % len(words) for i in range(36)]
    stream = io.BytesIO()
    frame = pd.DataFrame(plain_rows(x=lambda i: number[i] < len(words) // 2))
    frame.to_parquet(stream)
    expected = user.look(stream.getvalue(), "t.parquet", categorical=["x"]).vocabularies
    rows = plain_rows(x=lambda i: words[number[i]])
    assert user.look(rows, categorical=["x"]).vocabularies == expected


def third(mark: str, positive: str = "mild", negative: str = "none found") -> list[Any]:
    return plain_rows(label=lambda i: mark if i % 6 == 1 else negative if i % 3 else positive)


UNLABELLED = {
    "flair#2068": ("NONE", "none", ("mild", "none found"), "positive_label"),
    "mxnet#3710": ("-1", "-1", ("1", "0"), "--prepare.unlabelled"),
    "ISIC-Melanoma-as-floats": ("-1.0", "-1", ("1.0", "0.0"), "--prepare.unlabelled"),
    "ml5#1471-blanks": ("", "", ("1", "0"), "--prepare.unlabelled ''"),
    "isic-2017-unknown": (" Unknown ", "unknown", ("yes", "no"), "--prepare.unlabelled"),
}


@pytest.mark.parametrize(("mark", "name", "labels", "advice"), cases(UNLABELLED))
def test_unlabelled_rows_are_skipped(
    user: UserData, mark: str, name: str, labels: tuple[str, str], advice: str
) -> None:
    rows = third(mark, *labels)
    assert totals(user.look(rows, unlabelled=[name], positive_label=labels[:1])) == [18, 12]
    assert advice in user.refusal(rows)


def two(positive: str, negative: str) -> list[Any]:
    return plain_rows(label=lambda i: negative if i % 3 else positive)


HINTS = {
    "isic-challenge-benign": (two("malignant", "benign"), "malignant"),
    "mikropml#244-blank-and-comma": (two("palsy, progressive", "control"), "palsy, progressive"),
    "AuthMeReloaded#292-yaml": (two("no", "on"), "no"),
    "carmen#4-majority-named-like-yes": (two("NO", "y_es"), "NO"),
    "flair#2068-no-class": (third("NONE"), "mild"),
    "isic-2019-unknown-class": (third("unknown"), "mild"),
}


@pytest.mark.parametrize(("rows", "positive"), cases(HINTS))
def test_the_hint_names_a_rare_class_and_works_when_copied(
    user: UserData, rows: list[Any], positive: str
) -> None:
    spec = parse(RunSpec, shlex.split(user.refusal(rows).split("such as ")[1]))
    assert spec.prepare.positive_label == (positive,)
    assert user.look(rows, positive_label=spec.prepare.positive_label).positive_label == positive


@pytest.mark.parametrize("word", ["no", "NO", "yes", "on", "off", "1", "01", "1_000", "12:30"])
def test_words_of_yaml_stay_words(word: str, tmp_path: Path) -> None:
    """nft-blackhole#4, carmen#4 and AuthMeReloaded#292: `no` is Norway."""
    for text in (word, f"[{word}]"):
        (tmp_path / "spec.yaml").write_text(f"prepare:\n  positive_label: {text}\n")
        spec = parse(RunSpec, [str(tmp_path / "spec.yaml")])
        assert spec.prepare.positive_label == (word,)


def test_several_positive_and_other_labels(user: UserData) -> None:
    """The ISIC 2017 tasks: melanoma against two others, or two against nevus."""
    names = ["melanoma", "nevus", "seborrheic keratosis", "nevus"]
    rows = plain_rows(label=lambda i: names[i % 4])
    both = ["melanoma", "seborrheic keratosis"]
    assert totals(user.look(rows, positive_label=both)) == [18, 18]
    assert totals(user.look(rows, positive_label=["melanoma"])) == [27, 9]
    aside = {"other_labels": "quarantine", "max_bad_fraction": 0.3}
    assert totals(user.look(rows, positive_label=["melanoma"], **aside)) == [18, 9]
    assert "did you mean 'melanoma'" in user.refusal(rows, positive_label=["Melanom"])


SPLITS = {
    "datasets#4839-val": (["train", "train", "val", "test"], "", 18),
    "roboflow#153-valid-and-case": ([" TRAIN", "Training", "Valid", "Test "], "", 18),
    "FER.Pytorch#128-only-test": (["train", "train", "train", "test"], "validation cut", 13),
    "cvpr_4234#14-only-dev": (["train", "train", "train", "dev"], "test cut", 13),
}


@pytest.mark.parametrize(("words", "note", "num_held_out"), cases(SPLITS))
def test_given_splits_are_used_and_missing_ones_cut(
    user: UserData, words: list[str], note: str, num_held_out: int
) -> None:
    rows = plain_rows(part=lambda i: words[i * 5 % 36 // 3 % 4])
    manifest = user.look(rows, split_column="part")
    assert ("cut from train" in user.text) == bool(note)
    assert note in user.text
    assert all(min(split.class_counts) > 0 for split in manifest.splits.values())
    assert 36 - manifest.splits["train"].num_rows == pytest.approx(num_held_out, abs=1)


def test_a_column_of_splits_is_pointed_out(user: UserData) -> None:
    """fer2013#2: the authors' splits were overlooked."""
    user.look(plain_rows(split=lambda i: "train" if i % 4 else "test"))
    assert "--prepare.split_column split" in user.text


def test_keys_in_files_and_folds(user: UserData) -> None:
    """COVID-CT#11: lists of the authors, here as Windows writes them; a fold is no feature."""
    file = user.folder / "testCT.txt"
    file.write_bytes(("\ufeff" + " \r\n".join(f"k{i:02}" for i in range(9)) + "\r\n\r\n").encode())
    rows = plain_rows(fold=lambda i: i % 5)
    options: dict[str, Any] = {"split_keys": {"test": str(file)}}
    manifest = user.look(rows, fold_column="fold", **options)
    assert manifest.splits["test"].num_rows == 9
    assert column_of(manifest, "fold").role == "fold"
    file.write_text("k00.png\nk01.png")
    assert "none of its 2 keys, such as 'k00.png'" in user.refusal(rows, **options)


GROUPS = {
    "autogluon#5924-pure-groups": (24, lambda i: f"g{i // 4}", lambda i: i < 12),
    "rsample#317-three-mixed": (24, lambda i: f"g{i // 8}", lambda i: i % 2),
    "sklearn#28218": (36, lambda i: "abbccd"[i % 6], lambda i: i % 6 in (0, 1, 4)),
    "autogluon#5806-rare": (36, lambda i: "big" if i < 10 else f"g{i}", lambda i: i < 12),
}


@pytest.mark.parametrize(("num_rows", "group", "positive"), cases(GROUPS))
def test_every_split_gets_both_classes_for_any_seed(
    user: UserData, num_rows: int, group: Cell, positive: Cell
) -> None:
    rows = plain_rows(num_rows, group=group, label=lambda i: "yes" if positive(i) else "no")
    for seed in range(4):
        manifest = user.look(rows, group_column="group", seed=seed)
        assert all(min(split.class_counts) > 0 for split in manifest.splits.values())


def one_of(*cells: Any) -> Cell:
    return lambda i: cells[i % len(cells)]


SPLIT, WEIGHT = {"split_column": "x"}, {"weight_column": "x", "exclude_columns": ["weight"]}
REFUSED: dict[str, tuple[Cell, dict[str, Any], str]] = {
    "fer2013#2": (one_of("Training", "PublicTest", "PrivateTest"), SPLIT, "x is 'PublicTest'"),
    "datasets#7529": (one_of("train", "custom", "test"), SPLIT, "x is 'custom'"),
    "nprint#40": (one_of("test", ""), SPLIT, "x is empty, not one of train"),
    "dmlc-core#679": (one_of(0, 1, 2), SPLIT, "x is '0', not one of train"),
    "autogluon#942-negative": (one_of(1, -1), WEIGHT, "x is '-1', but a weight is a positive"),
    "autogluon#942-nan": (one_of(1, ""), WEIGHT, "x is empty, but a weight is a positive"),
    "h2o-3#5604-zero": (one_of(1, 0), WEIGHT, "x is '0', but a weight is a positive"),
    "prostatex#34-two-patients-with-lesions": (
        lambda i: f"q{i}" if i % 3 else f"p{i % 2}",
        {"group_column": "x"},
        "class 1 occurs in only 2 usable x groups, but each of train, validation, test needs",
    ),
}


@pytest.mark.parametrize(("cell", "options", "message"), cases(REFUSED))
def test_an_error_says_what_is_wrong_with_a_column(
    user: UserData, cell: Cell, options: dict[str, Any], message: str
) -> None:
    assert message in user.refusal(plain_rows(x=cell), **options)
