"""`prepare.missing_image=keep`: rows without an image are stored with a null image.

Reported for other libraries as autogluon#1207, autogluon#4311, autogluon#4892, mosaiks#109 and
FAI-RL#89.
"""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.data.manifest import Manifest
from tests.ray_jobs.prepare.sources.samples import write_tar
from tests.ray_jobs.raw import Raw, files, jpeg, quarantine, rows_by_key

pytestmark = pytest.mark.usefixtures("ray_local")

WITHOUT = {"k3", "k8", "k20"}


def without_image(raw: Raw, manifest: Manifest, name: str = "out") -> set[str]:
    rows = rows_by_key(raw.out(name), manifest)
    images = manifest.image.columns
    found = {key for key, row in rows.items() if all(row[n] is None for n in images)}
    assert sum(info.num_without_image for info in manifest.splits.values()) == len(found)
    return found


def remove_files(raw: Raw) -> dict[str, Any]:
    for key in WITHOUT:
        (raw.folder / "images" / f"{key}.jpg").unlink()
    return {}


def cells(text: str) -> Any:
    def change(raw: Raw) -> dict[str, Any]:
        for row in raw.rows:
            row["photo"] = text if row["key"] in WITHOUT else f"{row['key']}.jpg"
        return {"image_column": "photo"}

    return change


def unmatched_glob(raw: Raw) -> dict[str, Any]:
    remove_files(raw)
    return {"images": str(raw.folder / "images" / "*.jpg")}


def null_bytes(raw: Raw) -> dict[str, Any]:
    images = [None if row["key"] in WITHOUT else jpeg(i) for i, row in enumerate(raw.rows)]
    table = pa.table({"key": [row["key"] for row in raw.rows], "image": images})
    pq.write_table(table, raw.folder / "images.parquet")
    return {"images": str(raw.folder / "images.parquet")}


def no_sample(raw: Raw) -> dict[str, Any]:
    keys = [row["key"] for row in raw.rows]
    images = {f"{key}.jpg": jpeg(i) for i, key in enumerate(keys) if key not in WITHOUT}
    write_tar(raw.folder / "images.tar", images)
    return {"images": str(raw.folder / "images.tar")}


def several(raw: Raw) -> dict[str, Any]:
    for row in raw.rows:
        for side in ("front", "back"):
            if row["key"] not in WITHOUT:
                raw.image(f"{row['key']}_{side}", jpeg(1))
    return {"image_columns": ["front", "back"], "image_pattern": "{key}_{image}.jpg"}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(remove_files, id="autogluon#4311: no such file"),
        pytest.param(cells(""), id="FAI-RL#89: empty cell"),
        pytest.param(cells("NaN"), id="autogluon#1207, autogluon#4892: NaN"),
        pytest.param(cells("gone/x.jpg"), id="a path to nothing"),
        pytest.param(unmatched_glob, id="a glob without the file"),
        pytest.param(null_bytes, id="null in Parquet"),
        pytest.param(no_sample, id="a row of the table without a sample"),
        pytest.param(several, id="none of several images"),
    ],
)
def test_rows_without_an_image_are_kept_and_counted(raw, change, capsys):
    options = change(raw)
    with pytest.raises(JobError, match="missing_image 3"):
        raw.prepare("strict", **options)
    manifest = raw.prepare(missing_image="keep", **options)
    assert without_image(raw, manifest) == WITHOUT
    assert sum(info.num_rows for info in manifest.splits.values()) == 48
    assert manifest.quarantine == {}
    assert "rows without an image, kept: " in capsys.readouterr().out


def test_damaged_images_stay_in_quarantine_and_found_images_are_added(raw):
    remove_files(raw)
    raw.image("k5", b"no image")
    options: dict[str, Any] = {"missing_image": "keep", "max_bad_fraction": 0.1}
    manifest = raw.prepare(**options)
    assert quarantine(raw.out())["k5"][0] == "unreadable_image"
    before = files(raw.out())
    assert raw.prepare(**options) == manifest
    assert files(raw.out()) == before
    raw.image("k8", jpeg(8))
    assert without_image(raw, raw.prepare(**options)) == WITHOUT - {"k8"}


def test_complete_data_is_stored_with_the_same_rows_as_by_default(raw):
    plain, kept = raw.prepare("plain"), raw.prepare("kept", missing_image="keep")
    assert rows_by_key(raw.out("plain"), plain) == rows_by_key(raw.out("kept"), kept)
    assert not without_image(raw, kept, "kept")
    shard = pq.read_schema(raw.out("plain") / plain.splits["test"].shards[0].path)
    assert not shard.field("image").nullable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_pattern": "none_{key}.jpg"},
            "no row has an image in prepare.images=.*image_pattern",
        ),
        ({"numeric_columns": []}, "keep predicts rows without an image from other columns"),
    ],
)
def test_settings_that_leave_nothing_to_learn_from_raise_an_error(raw, options, message):
    with pytest.raises(JobError, match=message):
        raw.prepare(missing_image="keep", **options)
