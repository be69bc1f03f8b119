"""Equal cells, labels, given splits, groups and weights.

Each input comes from the public thread in its parameter id.
"""

import io
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ray_jobs.config.command_line import parse
from ray_jobs.config.spec import RunSpec
from tests.ray_jobs.inputs.user_data import UserData, plain_rows, roles, values

Cell = Callable[[int], Any]


def wrong(reason: str) -> Any:
    return pytest.mark.xfail(strict=True, reason=reason)


EQUAL: list[Any] = [
    pytest.param(["7", "7.0"], id="pandas#8596-keys-become-floats"),
    pytest.param(["P 1", "P 1 ", "P\u00a01"], id="frictionless#1172-blanks"),
    pytest.param(["Jos\u00e9", "Jose\u0301"], id="renpy#2327-unicode-forms"),
    pytest.param(
        ["7", "7.0", "07"],
        id="rsmtool#88-zeros",
        marks=wrong("docs/data.md: 7, 7.0 and 07 are the same group or word"),
    ),
]


@pytest.mark.parametrize("spellings", EQUAL)
def test_equal_cells_are_one_group_and_one_word(user: UserData, spellings: list[str]) -> None:
    """Half of the rows are in one group, and each other row has a group of its own."""

    def rows(words: list[str]) -> list[Any]:
        return plain_rows(site=lambda i: words[i % len(words)] if i < 18 else f"{i}")

    for setting in ({"group_column": "site"}, {"categorical": ["site"]}):
        expected = values(user.look(rows(spellings[:1]), **setting))
        assert values(user.look(rows(spellings), **setting)) == expected


@pytest.mark.parametrize(
    "truth",
    [
        pytest.param([True, False], id="autogluon#957-booleans"),
        pytest.param(
            ["True", "yes", "1", "False", "no", "0"],
            id="cpython#119123-mixed",
            marks=wrong("docs/data.md: True, yes and 1 are the same word"),
        ),
    ],
)
def test_booleans_are_the_same_words_in_every_format(user: UserData, truth: list[Any]) -> None:
    half = len(truth) // 2
    rows = plain_rows(x=lambda i: truth[i // 5 % len(truth)])
    stream = io.BytesIO()
    frame = pd.DataFrame(rows)
    frame["x"] = [truth.index(x) < half for x in frame["x"]]
    frame.to_parquet(stream)
    expected = user.look(stream.getvalue(), "table.parquet", categorical=["x"]).vocabularies
    assert user.look(rows, categorical=["x"]).vocabularies == expected


def test_null_marks_are_no_words(user: UserData) -> None:
    """country-codes#38: Namibia is lost, but the same way in each format and in predictions."""
    rows = plain_rows(country=lambda i: ["NA", "US", "null", "", "NaN", "DE"][i * 5 % 36 // 6])
    (vocabulary,) = user.look(rows, categorical=["country"]).vocabularies
    assert set(vocabulary.words) == {"US", "DE"}


def labelled(label: Cell) -> list[Any]:
    return [row | {"label": label(i)} for i, row in enumerate(plain_rows())]


def third(mark: str, positive: str = "mild", negative: str = "none found") -> list[Any]:
    return labelled(lambda i: mark if i % 6 == 1 else positive if i % 3 == 0 else negative)


@pytest.mark.parametrize(
    ("mark", "labels"),
    [
        pytest.param("NONE", ("mild", "none found"), id="flair#2068"),
        pytest.param("-1", ("1", "0"), id="mxnet#3710"),
        pytest.param("-1.0", ("1.0", "0.0"), id="ISIC-Melanoma-test-set-as-floats"),
        pytest.param("", ("1", "0"), id="ml5#1471-blanks"),
        pytest.param(" Unknown ", ("yes", "no"), id="isic-2017-unknown"),
    ],
)
def test_unlabelled_rows_are_skipped(user: UserData, mark: str, labels: tuple[str, str]) -> None:
    name = mark.strip().lower().removesuffix(".0")
    manifest = user.look(third(mark, *labels), unlabelled=[name], positive_label=labels[:1])
    counts = [split.class_counts for split in manifest.splits.values()]
    assert [sum(column) for column in zip(*counts, strict=True)] == [18, 12]
    if labels != ("mild", "none found"):
        assert "--prepare.unlabelled" in user.refusal(third(mark, *labels))


HINTS: list[Any] = [
    pytest.param(labelled(lambda i: ["malignant", "benign", "benign"][i % 3]), "malignant"),
    pytest.param(labelled(lambda i: ["ok", "defect", "defect"][i % 3]), "ok"),
    pytest.param(
        labelled(lambda i: ["palsy, progressive", "control", "control"][i % 3]),
        "palsy, progressive",
    ),
    pytest.param(labelled(lambda i: ["no", "on", "on"][i % 3]), "no"),
    pytest.param(third("NONE"), "mild", marks=wrong("proposes the mark as the positive class")),
    pytest.param(third("unknown"), "mild", marks=wrong("proposes the mark as the positive class")),
]
HINT_IDS = [
    "isic-challenge-majority-negative",
    "mikropml#244-majority-first",
    "mikropml#244-blank-and-comma",
    "AuthMe#292-words-of-yaml",
    "flair#2068-no-class",
    "isic-2019-unknown-class",
]


@pytest.mark.parametrize(("rows", "positive"), HINTS, ids=HINT_IDS)
def test_the_hint_names_a_rare_class_and_works_when_copied(
    user: UserData, rows: list[Any], positive: str
) -> None:
    hint = user.refusal(rows).split("such as ")[1]
    spec = parse(RunSpec, shlex.split(hint))
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
    rows = labelled(lambda i: names[i % 4])

    def total(**options: Any) -> tuple[int, int]:
        counts = [s.class_counts for s in user.look(rows, **options).splits.values()]
        return sum(c[0] for c in counts), sum(c[1] for c in counts)

    assert total(positive_label=["melanoma", "seborrheic keratosis"]) == (18, 18)
    assert total(positive_label=["melanoma"]) == (27, 9)
    aside = {"other_labels": "quarantine", "max_bad_fraction": 0.3}
    assert total(positive_label=["melanoma"], **aside) == (18, 9)
    assert "did you mean 'melanoma'" in user.refusal(rows, positive_label=["Melanom"])


SPLITS: list[Any] = [
    pytest.param(["train", "train", "val", "test"], "", id="datasets#4839-val"),
    pytest.param([" TRAIN", "Training", "Valid", "Test "], "", id="roboflow#153-valid-and-case"),
    pytest.param(["train", "train", "train", "test"], "validation cut", id="FER#128-only-test"),
    pytest.param(["train", "train", "train", "dev"], "test cut", id="cvpr_4234#14-only-valid"),
]


@pytest.mark.parametrize(("words", "note"), SPLITS)
def test_given_splits_are_used_and_missing_ones_cut(
    user: UserData, words: list[str], note: str
) -> None:
    manifest = user.look(
        plain_rows(part=lambda i: words[i * 5 % 36 // 3 % 4]), split_column="part"
    )
    assert note in user.text
    assert all(min(split.class_counts) > 0 for split in manifest.splits.values())
    given = 36 - manifest.splits["train"].num_rows
    assert given == 18 if not note else given > 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["Training", "PublicTest", "PrivateTest"], "PublicTest", id="fer2013#2"),
        pytest.param(["train", "custom", "test"], "custom", id="datasets#7529-custom"),
        pytest.param(["test", "", ""], "empty; write train", id="nprint#40-only-test-marked"),
        pytest.param([0, 1, 2], "meaning of numbers is not guessed", id="dmlc-core#679-numbers"),
    ],
)
def test_unknown_split_words_are_named(user: UserData, words: list[Any], message: str) -> None:
    text = user.refusal(plain_rows(part=lambda i: words[i % 3]), split_column="part")
    assert message in text
    assert "max_bad_fraction" not in text


def test_keys_in_files_and_folds(user: UserData) -> None:
    """COVID-CT#11: lists of the authors, here as Windows writes them; a fold is no feature."""
    keys = [f"k{i:02}" for i in range(9)]
    file = user.folder / "testCT.txt"
    file.write_bytes(("\ufeff" + " \r\n".join(keys) + "\r\n\r\n").encode())
    rows = plain_rows(fold=lambda i: i % 5)
    manifest = user.look(rows, split_keys={"test": str(file)}, fold_column="fold")
    assert manifest.splits["test"].num_rows == 9
    assert roles(manifest)["fold"] == "fold"
    file.write_text("\n".join(f"{key}.png" for key in keys))
    text = user.refusal(rows, split_keys={"test": str(file)})
    assert "none of its 9 keys, such as 'k00.png'" in text
    assert "'k00'" in text


GROUPS: list[Any] = [
    pytest.param(lambda i: (f"g{i // 4}", i < 12), 24, id="autogluon#5924-pure-groups"),
    pytest.param(lambda i: (f"g{i // 8}", i % 2), 24, id="rsample#317-three-mixed"),
    pytest.param(lambda i: ("abbccd"[i % 6], "110010"[i % 6] == "1"), 36, id="sklearn#28218"),
    pytest.param(
        lambda i: ("big" if i < 10 else f"g{i}", i < 12), 36, id="autogluon#5806-rare-value"
    ),
]


@pytest.mark.parametrize(("row", "num_rows"), GROUPS)
def test_every_split_gets_both_classes_for_any_seed(
    user: UserData, row: Callable[[int], tuple[str, bool]], num_rows: int
) -> None:
    rows = [
        plain | {"group": row(i)[0], "label": "yes" if row(i)[1] else "no"}
        for i, plain in enumerate(plain_rows(num_rows))
    ]
    for seed in range(4):
        manifest = user.look(rows, group_column="group", seed=seed)
        assert all(min(split.class_counts) > 0 for split in manifest.splits.values())


def test_too_few_groups_of_a_class_are_named(user: UserData) -> None:
    """prostatex#34: lesions of two patients cannot fill three splits."""
    rows = plain_rows(patient=lambda i: f"p{i % 2}" if i % 3 == 0 else f"q{i}")
    text = user.refusal(rows, group_column="patient")
    assert "class 1 occurs in only 2 usable patient groups" in text
    assert "train, validation, test" in text


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        pytest.param(lambda i: -1 if i == 3 else 1, "'-1'", id="autogluon#942-negative"),
        pytest.param(lambda i: "" if i == 3 else 1, "empty", id="autogluon#942-nan"),
        pytest.param(lambda i: 0 if i == 3 else 1, "'0'", id="h2o-3#5604-zero"),
        pytest.param(lambda i: "high", "'high'", id="autogluon#942-text"),
        pytest.param(lambda i: f"{i % 3 + 1},5", "", id="pandas#59299-decimal-comma"),
    ],
)
def test_weights_are_positive_numbers(user: UserData, cell: Cell, message: str) -> None:
    rows = [{k: v for k, v in row.items() if k != "weight"} for row in plain_rows(w=cell)]
    if message:
        text = user.refusal(rows, weight_column="w")
        assert "bad_weight" in text
        assert message in text
    else:
        weights = user.look(rows, weight_column="w").splits["train"].class_weights
        assert weights == (53.5, 12.0)
