import gzip
import json
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.sources import byte_range_reader
from ray_jobs.prepare.sources.webdataset import open_source
from tests.ray_jobs.prepare.sources.samples import jpeg, read_all, spec, write_csv, write_tar


def opened(**options: object):
    return open_source(spec(**options))


@pytest.fixture
def shards(tmp_path):
    """Three tars of four samples; the keys are 000 to 011."""
    for shard in range(3):
        files = {}
        for i in range(4 * shard, 4 * shard + 4):
            files |= {f"{i:03d}.jpg": jpeg(i), f"{i:03d}.json": b"{}", f"{i:03d}.txt": b"a caption"}
        write_tar(tmp_path / f"tars/part-{shard:02d}.tar", files)
    return tmp_path / "tars"


@pytest.mark.parametrize("files", ["", "/*.tar", "/part-{00..02}.tar", "/part-0[0-2].tar"])
def test_records_are_joined_with_images_by_key_in_any_order(shards, files, tmp_path):
    order = np.random.default_rng(0).permutation(12)
    table = write_csv(tmp_path / "t.csv", {"key": [f"{i:03d}" for i in order], "x": list(order)})
    source = opened(images=f"{shards}{files}", table=table)
    assert source.table.to_pydict()["x"] == [str(i) for i in order]
    assert read_all(source) == [jpeg(i) for i in order]
    assert read_all(source, rows=[3, 3, 1, 11]) == [jpeg(order[i]) for i in (3, 3, 1, 11)]
    assert source.unmatched == ()
    assert source.images[""].in_containers


def test_a_range_selects_only_the_tars_it_names(shards):
    source = opened(images=f"{shards}/part-{{01..02}}.tar")
    assert source.table.to_pydict()["key"] == [f"{i:03d}" for i in range(4, 12)]
    with pytest.raises(JobError, match=r"2 of 5 files missing, the first is part-03\.tar"):
        opened(images=f"{shards}/part-{{00..04}}.tar")


def test_records_without_images_and_images_without_records_are_reported(shards, tmp_path):
    write_tar(shards / "part-03.tar", {"011.jpg": jpeg(99), "new.jpg": jpeg(100)})
    table = pa.table({"key": pa.array([*range(1, 12), 77, None], pa.int64())})
    keys = pa.array([None if k is None else f"{k:03d}" for k in table["key"].to_pylist()])
    pq.write_table(pa.table({"key": keys}), tmp_path / "t.parquet")
    source = opened(images=str(shards), table=str(tmp_path / "t.parquet"))
    assert source.images[""].path.is_null().to_pylist() == [False] * 11 + [True, True]
    assert read_all(source) == [*(jpeg(i) for i in range(1, 12)), "missing_image", "missing_image"]
    assert [(key, reason) for key, reason, _ in source.unmatched] == [
        ("000", "no_record"),
        ("011", "duplicate_image"),
        ("new", "no_record"),
    ]
    assert source.unmatched[0][2] == "no record has the key of part-00.tar:512"
    assert "part-03.tar:512 has the key of part-02.tar:" in source.unmatched[1][2]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_of_files_are_keys_with_their_folders_and_links_are_no_images(tmp_path, format):
    long = "d/" * 50 + "e" * 90
    names = {long: jpeg(1)}
    if format != tarfile.USTAR_FORMAT:
        names |= {"x" * 300: jpeg(2), "größe/ä b": jpeg(3)}
    files = {f"./{key}.JPG": content for key, content in names.items()}
    path = tmp_path / "a.tar"
    write_tar(path, {**files, "._hidden.jpg": b"", "noextension": b""}, format)
    with tarfile.open(path, "a", format=format) as tar:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    source = opened(images=str(tmp_path / "a.tar"))
    assert source.table.to_pydict() == {"key": list(names)}
    assert read_all(source) == list(names.values())


def test_without_a_table_the_files_of_each_sample_are_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr("ray_jobs.prepare.table_files.record_table.CHUNK_RECORDS", 3)
    cells = [{"x": 1, "s": "a"}, {"x": 1.5}, {"x": None, "s": "b", "big": 2**70}]
    cells += [{"s": 7, "n": [1]}, {"b": True}]
    for shard, rows in enumerate(([0, 1, 2, 3], [4])):
        files = {}
        for i in rows:
            files |= {
                f"s/{i}.png": jpeg(i),
                f"s/{i}.cls": f"{i % 2}\n".encode(),
                f"s/{i}.json": json.dumps({**cells[i], "key": "other"}).encode(),
            }
        write_tar(tmp_path / f"{shard}.tar", files)
    write_tar(tmp_path / "2.tar", {"t/0.json": b"{}"})
    source = opened(images=str(tmp_path), label_column="answer")
    assert source.table.to_pydict() == {
        "x": [1, 1.5, None, None, None, None],
        "big": [None, None, str(2**70), None, None, None],
        "s": ["a", None, "b", "7", None, None],
        "answer": ["0", "1", "0", "1", "0", None],
        "key": ["s/0", "s/1", "s/2", "s/3", "s/4", "t/0"],
        "b": [None, None, None, None, True, None],
    }
    assert read_all(source) == [*map(jpeg, range(5)), "missing_image"]


def test_the_image_is_the_only_one_or_the_one_with_the_configured_extension(tmp_path):
    files = {"a.photo.jpg": jpeg(0), "a.mask.png": jpeg(1), "b.photo.jpg": jpeg(2), "b.raw": b"xyz"}
    write_tar(tmp_path / "a.tar", files)
    assert read_all(opened(images=str(tmp_path), image_column="photo.jpg")) == [jpeg(0), jpeg(2)]
    assert read_all(opened(images=str(tmp_path), image_column="raw")) == [b"xyz"]
    several = opened(images=str(tmp_path), image_columns=["photo", "mask"])
    assert several.table.to_pydict()["key"] == ["a", "b"]
    assert read_all(several, "photo") == [jpeg(0), jpeg(2)]
    assert read_all(several, "mask") == [jpeg(1), "missing_image"]
    with pytest.raises(JobError, match=r"hold no images.*extensions seen: .mask.png, .photo.jpg"):
        opened(images=str(tmp_path))
    write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(0), "a.png": jpeg(1)})
    with pytest.raises(JobError, match=r"'a' has the images \.jpg and \.png; set prepare.image"):
        opened(images=str(tmp_path))


def test_a_damaged_or_compressed_tar_raises_an_error(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, {"a.jpg": jpeg(0), "b.jpg": jpeg(1), "c.jpg": jpeg(2)})
    content = path.read_bytes()
    # The second header follows the first header and its content.
    header = 512 + (len(jpeg(0)) + 511) // 512 * 512
    no_header = content[:header] + b"\xff" * 512 + content[header + 512 :]
    for damaged, message in (
        (gzip.compress(content), " is compressed, .* decompress it"),
        (content[: header + 600], " is damaged: b.jpg ends after the file"),
        (content[: header + 100], " is damaged"),
        (no_header, f" is damaged: no valid header at byte {header}"),
        (b"no tar at all" * 100, " is damaged"),
        (b"", " is damaged"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(JobError, match=f"a.tar{message}"):
            opened(images=str(tmp_path))
    write_tar(path, {"a.jpg": jpeg(0), "a.json": b"[1]"})
    with pytest.raises(JobError, match=r"a\.tar: a\.json cannot be read: not a JSON object"):
        opened(images=str(tmp_path))


def test_a_pickled_reader_reads_images_that_are_far_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(byte_range_reader, "GAP_BYTES", 0)
    monkeypatch.setattr(byte_range_reader, "READ_BYTES", 1 << 10)
    for shard in range(2):
        files = {f"{shard}-{i}.jpg": jpeg(100 * shard + i) for i in range(50)}
        write_tar(tmp_path / f"{shard}.tar", files)
    source = opened(images=str(tmp_path))
    expected = [jpeg(100 * shard + i) for shard in range(2) for i in range(50)]
    reader = pickle.loads(pickle.dumps(source.readers[""]))
    assert list(reader.read(source.images[""])) == expected
    order = np.random.default_rng(0).permutation(100)
    assert list(reader.read(source.images[""].take(order))) == [expected[i] for i in order]
    first = next(iter(reader.read(source.images[""])))
    assert first == expected[0]


def test_a_missing_or_truncated_tar_affects_only_its_own_images(tmp_path):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", {f"{name}{i}.jpg": jpeg(i, 64) for i in range(3)})
    source = opened(images=str(tmp_path))
    (tmp_path / "a.tar").unlink()
    content = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(content[: len(jpeg(0, 64)) + 1000])
    assert read_all(source) == [
        *["missing_image"] * 3,
        jpeg(0, 64),
        "unreadable_file",
        "unreadable_file",
    ]
