import pickle
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.cell_text import TEXT
from ray_jobs.prepare.sources.parquet_files import ParquetReader, open_source
from ray_jobs.prepare.sources.source import ImageRefs
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.prepare.sources.samples import jpeg, read_all, spec, write_csv


def opened(**options: object):
    return open_source(spec(**options))


@pytest.fixture
def files(tmp_path):
    """Three files of 70 rows in row groups of 20, and files that are not read."""
    (tmp_path / "data").mkdir()
    for part in range(3):
        rows = range(70 * part, 70 * part + 70)
        table = pa.table(
            {
                "key": list(rows),
                "image": [jpeg(i) for i in rows],
                "x": [i / 2 for i in rows],
                "note": [f"n{i}" for i in rows],
                "embedding": [[1.0, 2.0]] * 70,
                "label": [i % 2 for i in rows],
            }
        )
        pq.write_table(table, tmp_path / f"data/part-{part}.parquet", row_group_size=20)
    for name in (".hidden.parquet", "_log.parquet", "notes.txt"):
        (tmp_path / "data" / name).write_text("not read")
    return tmp_path / "data"


@pytest.mark.parametrize("where", ["", "/part-?.parquet", "/part-{0..2}.parquet"])
def test_rows_give_both_the_table_and_the_images_in_any_order(files, where):
    source = opened(images=f"{files}{where}")
    assert source.table.column_names == ["key", "x", "note", "label"]
    assert source.table.to_pydict()["key"] == list(range(210))
    assert source.images[""].in_containers
    assert read_all(source) == [jpeg(i) for i in range(210)]
    assert source.unmatched == ()
    rows = np.random.default_rng(0).integers(0, 210, 60)
    assert read_all(source, rows=list(rows)) == [jpeg(i) for i in rows]
    ascending = sorted(rows)
    sent = pickle.loads(pickle.dumps(source.readers[""]))
    read = list(sent.read(source.images[""].take(ascending)))
    assert read == [jpeg(i) for i in ascending]


def test_a_table_in_the_image_folder_is_joined_by_key_and_unmatched_images_are_reported(files):
    keys = [209, 3, 1000, 3]
    pq.write_table(pa.table({"key": keys, "y": [1, 2, 3, 4]}), files / "table.parquet")
    source = opened(images=str(files), table=str(files / "table.parquet"))
    assert source.table.column_names == ["key", "y"]
    assert read_all(source) == [jpeg(209), jpeg(3), "missing_image", jpeg(3)]
    unmatched = [key for key, reason, _ in source.unmatched if reason == "no_record"]
    assert unmatched == [str(i) for i in range(210) if i not in keys]


def test_hugging_face_structs_and_several_images_per_row_are_read(tmp_path):
    front = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(5)]
    back = [jpeg(10), None, b"", jpeg(13), jpeg(14)]
    table = pa.table({"front": front, "back": back, "key": list("abcde")})
    pq.write_table(table, tmp_path / "a.parquet")
    source = opened(images=str(tmp_path), image_columns=["front", "back"])
    assert read_all(source, "front") == [jpeg(i) for i in range(5)]
    missing = "missing_image"
    assert read_all(source, "back") == [jpeg(10), missing, missing, jpeg(13), jpeg(14)]
    assert source.table.column_names == ["key"]
    csv = write_csv(tmp_path / "t.csv", {"key": ["c", "z"]})
    joined = opened(images=str(tmp_path), image_columns=["front", "back"], table=csv)
    assert read_all(joined, "front") == [jpeg(2), missing]
    assert [key for key, _, _ in joined.unmatched] == ["a", "b", "d", "e"]


def test_files_may_have_different_columns(tmp_path):
    a, b = {"x": [1], "s": ["t"], "mixed": [True]}, {"x": [0.5], "s": [2], "mixed": [0.5]}
    for name, extra in (("a", a), ("b", b | {"z": [True]})):
        table = pa.table({"key": [name], "image": [b"i"], **extra})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert opened(images=str(tmp_path)).table.to_pydict() == {
        "key": ["a", "b"],
        "x": [1.0, 0.5],
        "s": ["t", "2"],
        "mixed": ["true", "0.5"],
        "z": [None, True],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "imge"}, r"has no column 'imge'.*'image'.*\(columns of bytes: image\)"),
        ({"image_column": "x"}, "has values of type double in column 'x'"),
        ({"image_columns": ["image", "back"]}, "has no column 'back'"),
        ({"images": "/*.tar"}, "there are no Parquet files"),
        ({"images": "/none"}, "there is no such file or folder"),
        ({"images": "/{b}.parquet"}, "braces must contain a range such as"),
        ({"table": "t.csv", "key_column": "id"}, "part-0.parquet has no column 'id'"),
    ],
)
def test_missing_files_and_columns_raise_an_error_with_the_existing_ones(files, options, message):
    write_csv(files / "t.csv", {"id": [1]})
    options = {"images": "", **options}
    options["images"] = f"{files}{options['images']}"
    if "table" in options:
        options["table"] = str(files / options["table"])
    with pytest.raises(JobError, match=message):
        opened(**options)


def test_a_damaged_file_raises_an_error_when_opened_and_gives_bad_images_when_read(files):
    source = opened(images=str(files))
    path = files / "part-1.parquet"
    content = bytearray(path.read_bytes())
    with pq.ParquetFile(path) as file:
        chunk = file.metadata.row_group(1).column(1)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + 200] = bytes(200)
    path.write_bytes(content)
    read = read_all(source)
    assert read[:90] == [jpeg(i) for i in range(90)]
    assert set(read[90:110]) == {"unreadable_file"}
    assert read[110:] == [jpeg(i) for i in range(110, 210)]
    path.write_bytes(b"PAR1")
    with pytest.raises(JobError, match=r"part-1\.parquet cannot be read as Parquet"):
        opened(images=str(files))
    path.unlink()
    assert read_all(source)[70:140] == ["missing_image"] * 70


def test_a_row_group_is_not_held_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.bytes(100_000) for _ in range(1000)]
    table = pa.table({"key": list(range(1000)), "image": images})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000, write_batch_size=8)
    del table
    refs = ImageRefs(pa.array(["a.parquet"] * 1000, TEXT), np.arange(1000))
    before, most = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    read = ParquetReader(Folder(tmp_path), "image").read(refs)
    for image, expected in zip(read, images, strict=True):
        assert image == expected
        most = max(most, pa.total_allocated_bytes() - before)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most + python < 16e6
