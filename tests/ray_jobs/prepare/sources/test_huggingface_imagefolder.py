import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.sources.huggingface_imagefolder import open_source
from tests.ray_jobs.prepare.sources.samples import jpeg, read_all, spec


def opened(folder: Path, **options: object):
    return open_source(spec(images=str(folder), **options))


def write_images(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(seed))


def write_metadata(folder: Path, kind: str, rows: dict[str, list]) -> None:
    if kind == "parquet":
        pq.write_table(pa.table(rows), folder / "metadata.parquet")
    else:
        cells = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        lines = {
            "jsonl": [json.dumps(row) for row in cells],
            "csv": [",".join(rows), *(",".join(map(str, row.values())) for row in cells)],
        }[kind]
        (folder / f"metadata.{kind}").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_names_the_images_and_other_images_are_reported(tmp_path, kind):
    write_images(tmp_path, "a.jpg", "in/b.jpg", "c.png")
    rows = {"file_name": ["./in/b.jpg", "a.jpg", "gone.jpg"], "x": [1, 2, 3], "label": [0, 1, 0]}
    write_metadata(tmp_path, kind, rows)
    source = opened(tmp_path)
    found = source.table.to_pydict()
    assert found["key"] == ["in/b.jpg", "a.jpg", "gone.jpg"]
    assert [int(x) for x in found["x"]] == [1, 2, 3]
    assert list(found) == ["file_name", "x", "label", "key"]
    assert read_all(source) == [jpeg(1), jpeg(0), "missing_image"]
    assert source.unmatched == (("c.png", "no_record", "the metadata does not name it"),)
    assert not source.images[""].in_containers


@pytest.mark.parametrize(
    "path", ["/data/train/a.jpg", r"D:\data\train\a.jpg", "s3://b/train/a.jpg"]
)
def test_absolute_paths_in_the_metadata_of_a_subfolder_are_not_below_it(tmp_path, path):
    write_images(tmp_path / "train", "a.jpg", "b.jpg")
    write_metadata(tmp_path / "train", "csv", {"file_name": [path, "b.jpg"], "label": [1, 0]})
    source = opened(tmp_path)
    assert source.images[""].path.to_pylist() == ["train/a.jpg", "train/b.jpg"]
    assert not source.quarantined


def test_split_folders_become_a_column_and_part_of_the_key(tmp_path):
    for folder in ("train", "val", "test"):
        write_images(tmp_path / folder, "a.jpg")
        write_metadata(tmp_path / folder, "csv", {"file_name": ["a.jpg"], "label": ["1"]})
    found = opened(tmp_path).table.to_pydict()
    assert found["key"] == ["test/a.jpg", "train/a.jpg", "val/a.jpg"]
    assert found["split"] == ["test", "train", "validation"]
    assert opened(tmp_path, split_column="fold").table.to_pydict()["fold"] == found["split"]


@pytest.mark.parametrize(
    ("names", "labels", "splits"),
    [
        (["cat/0.jpg", "dog/0.jpg", "dog/old/1.jpg"], ["cat", "dog", "dog"], None),
        (["dev/cat/0.jpg", "train/dog/0.jpg"], ["cat", "dog"], ["validation", "train"]),
        (["Testing/cat/0.jpg", "Training/dog/0.jpg"], ["cat", "dog"], ["test", "train"]),
        (["test/cat/0.jpg", "train/dog/0.jpg"], ["cat", "dog"], ["test", "train"]),
        (
            ["VAL/cat/0.jpg", "extra/cat/0.jpg", "stray.jpg", "train/dog/0.jpg"],
            ["cat", "cat", None, "dog"],
            ["validation", "extra", "", "train"],
        ),
        (["train/0.jpg", "wild/0.jpg"], ["train", "wild"], None),
        (["test/0.jpg", "wild/0.jpg"], ["test", "wild"], None),
        (["cat/0.jpg", "stray.jpg"], ["cat", None], None),
    ],
)
def test_without_metadata_the_folders_are_classes(tmp_path, names, labels, splits):
    write_images(tmp_path, *names)
    (tmp_path / "README.md").write_text("not an image")
    source = opened(tmp_path, label_column="kind")
    expected = {"key": names, "kind": labels, **({"split": splits} if splits else {})}
    assert source.table.to_pydict() == expected
    assert source.settings == ({"split_column": "split"} if splits else {})
    assert read_all(source) == [jpeg(i) for i in range(len(names))]
    assert source.unmatched == ()


def test_several_images_per_row_are_columns_of_file_names(tmp_path):
    write_images(tmp_path, "a.jpg", "b.jpg")
    rows = {"front_file_name": ["a.jpg", "b.jpg"], "back": ["b.jpg", None], "x": [1, 2]}
    write_metadata(tmp_path, "jsonl", rows)
    source = opened(tmp_path, image_columns=["front", "back"])
    assert read_all(source, "front") == [jpeg(0), jpeg(1)]
    assert read_all(source, "back") == [jpeg(1), "missing_image"]
    assert source.table.to_pydict()["key"] == ["a.jpg", "b.jpg"]
    source = opened(tmp_path, image_columns=["front", "back"], key_column="x")
    assert list(source.table.to_pydict()) == ["front_file_name", "back", "x"]


def test_metadata_that_names_no_image_quarantines_its_rows_with_the_nearest_image(tmp_path):
    write_images(tmp_path, "a.jpg")
    write_metadata(tmp_path, "csv", {"file_name": ["x/b.jpg"], "label": [1]})
    reason, detail = opened(tmp_path).quarantined[0]
    assert reason == "missing_image"
    assert detail == f"x/b.jpg: no such file in {tmp_path}; the nearest is a.jpg"


def test_a_path_outside_the_folder_names_no_image(tmp_path):
    write_images(tmp_path, "secret.jpg", "in/a.jpg")
    write_metadata(tmp_path / "in", "csv", {"file_name": ["../secret.jpg", "a.jpg"]})
    assert read_all(opened(tmp_path / "in")) == ["missing_image", jpeg(1)]


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"a.txt": ""}, {}, "there are no images"),
        ({"a.jpg": ""}, {}, r"neither metadata \(metadata.csv, .*\) nor a folder per class"),
        ({"a.jpg": "", "metadata.csv": "file\na.jpg\n"}, {}, "no column 'file_name'"),
        ({"a.jpg": "", "metadata.jsonl": "{}\n["}, {}, "metadata.jsonl could not be read: line 2"),
        (
            {"a.jpg": "", "metadata.jsonl": "\n"},
            {},
            "metadata.jsonl could not be read: it is",
        ),
        ({"c/a.jpg": ""}, {"table": "t.csv"}, "leave prepare.table out"),
        ({"c/a.jpg": ""}, {"image_columns": ["a"]}, "needs an ImageFolder with metadata"),
    ],
)
def test_missing_files_and_columns_raise_an_error(tmp_path, files, options, message):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(JobError, match=message):
        opened(tmp_path, **options)
