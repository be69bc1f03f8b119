"""Tests how the key and the pattern of images are found by the names of the images."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.prepare.cell_text import TEXT
from ray_jobs.prepare.sources import open_source
from ray_jobs.prepare.sources.find_key import find_key, find_pattern

IDS = [f"ISIC_{n:04}" for n in range(20)]
AGES = list(range(40, 60))


def found(table: dict[str, Sequence[Any]], names: Sequence[str], **options: Any) -> dict[str, Any]:
    spec = PrepareSpec(label_column="label", **options)
    return find_key(
        pa.table({name: list(cells) for name, cells in table.items()}),
        spec,
        lambda: pa.array(names, TEXT),
    )


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        ([f"{i}.jpg" for i in IDS], None),
        ([f"part_{n % 2}/{i}.jpg" for n, i in enumerate(IDS)], None),
        ([f"{i}.png" for i in IDS], "{image_id}.png"),
        ([f"{i}.{('jpg', 'JPG')[n % 2]}" for n, i in enumerate(IDS)], "{image_id}.*"),
        ([f"{i}_front.jpg" for i in IDS], "{image_id}_front.jpg"),
        ([f"img-{i}.jpg" for i in IDS], "img-{image_id}.jpg"),
        ([f"{i}/front.jpg" for i in IDS], "{image_id}/front.jpg"),
        ([f"{i}.jpg" for i in IDS] + ["logo.png"], None),
    ],
)
def test_the_key_is_the_unique_column_that_names_the_images(names, pattern):
    table = {"row": range(20), "lesion": [f"HAM_{n}" for n in range(20)], "image_id": IDS}
    expected = {"key_column": "image_id"} | ({"image_pattern": pattern} if pattern else {})
    assert found(table, names) == expected


@pytest.mark.parametrize("ids", [range(1, 21), [float(n) for n in range(1, 21)]])
def test_numbers_match_names_with_leading_zeros(ids):
    table = {"n": [str(int(i)) for i in ids], "age": [float(a) for a in AGES]}
    names = [f"img_{n:05}.jpg" for n in range(1, 21)]
    assert found(table, names) == {"key_column": "n", "image_pattern": "img_{n}.jpg"}


def test_several_images_per_row_are_an_error_with_the_flags_that_use_them():
    views = ("bathroom", "bedroom", "frontal")
    names = [f"{n}_{view}.jpg" for n in range(1, 21) for view in views]
    with pytest.raises(JobError) as error:
        found({"house_id": range(1, 21), "rooms": [3] * 20}, names)
    assert str(error.value) == (
        "each house_id has several images ({house_id}_bathroom.jpg, {house_id}_bedroom.jpg, "
        "{house_id}_frontal.jpg); add --prepare.key_column house_id and --prepare.image_pattern "
        "'{house_id}_{image}.jpg' --prepare.image_columns bathroom,bedroom,frontal to use all of "
        "them, or --prepare.image_pattern '{house_id}_bathroom.jpg' to use one"
    )


def test_without_a_column_that_names_the_images_the_first_unique_id_is_the_key():
    table = {"file": ["a.jpg", "a.jpg"] * 10, "label": IDS, "age": AGES, "id": IDS}
    assert found(table, [], image_column="file") == {"key_column": "id"}
    assert found(table, [], image_pattern="{id}/{file}") == {"key_column": "id"}
    assert found({"age": AGES, "file": IDS}, [], image_column="file") == {"key_column": "file"}
    with pytest.raises(JobError, match="to a column that is different in each row"):
        found({"file": ["a.jpg", "a.jpg"] * 10}, [], image_column="file")


def test_images_named_after_a_column_with_equal_cells_need_another_key():
    table = {"id": AGES, "patient": [f"p{n // 2}" for n in range(20)], "row": [1.5] * 20}
    with pytest.raises(JobError) as error:
        found(table, [f"p{n}.png" for n in range(10)])
    assert str(error.value).endswith(
        "named after 'patient', which repeats cells; set prepare.key_column to a column that is "
        "different in each row, such as id, and add --prepare.image_pattern '{patient}.png'"
    )


def test_cells_may_be_words_of_a_dictionary():
    table = pa.table({"kind": ["a", "b"] * 10, "id": IDS})
    table = pa.table([column.dictionary_encode() for column in table.columns], table.column_names)
    names = pa.array([f"{i}.jpg" for i in IDS], TEXT)
    assert find_key(table, PrepareSpec(), lambda: names) == {"key_column": "id"}


def test_other_images_may_lie_beside_those_of_the_table():
    table = {"image_id": IDS, "age": [float(a) for a in AGES]}
    names = [f"ISIC_{n:04}.jpg" for n in range(60)]
    assert found(table, names) == {"key_column": "image_id"}


def test_cells_may_be_paths_with_other_folders():
    table = {"path": [f"train/{i}.jpg" for i in IDS], "age": [float(a) for a in AGES]}
    expected = {"key_column": "path", "image_pattern": "{path}"}
    assert found(table, [f"{i}.jpg" for i in IDS]) == expected


def test_a_pattern_is_found_for_a_key_column_that_is_set_and_for_no_other():
    table, names = pa.table({"id": IDS, "other": AGES}), pa.array([f"x_{i}.jpg" for i in IDS], TEXT)
    spec = PrepareSpec(key_column="id")
    assert find_pattern(table, spec, lambda: names)["image_pattern"] == "x_{id}.jpg"
    assert find_pattern(table, PrepareSpec(key_column="other"), lambda: names) == {}


def test_predict_finds_no_settings(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in IDS:
        (tmp_path / "photos" / f"x_{i}.jpg").touch()
    (tmp_path / "table.csv").write_text("\n".join(["id", *IDS]))
    spec = PrepareSpec(images=f"{tmp_path}/photos", table=f"{tmp_path}/table.csv")
    with pytest.raises(JobError, match="the table has no column 'key'"):
        open_source(spec, labelled=False)
    source = open_source(spec.model_copy(update={"key_column": "id"}), labelled=False)
    assert not source.settings
    assert len(source.quarantined) == len(IDS)
