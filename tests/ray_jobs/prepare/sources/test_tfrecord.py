import numpy as np
import pytest
import tensorflow as tf

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.sources.tfrecord import open_source
from tests.ray_jobs.prepare.sources.samples import (
    example,
    jpeg,
    read_all,
    spec,
    write_csv,
    write_tfrecord,
)


def opened(**options: object):
    return open_source(spec(**options))


def test_features_with_one_value_per_record_are_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr("ray_jobs.prepare.table_files.record_table.CHUNK_RECORDS", 3)
    numbers = [0, 1, -1, 2**63 - 1, -(2**63), 300, 7]
    floats = [0.0, -1.5, float(np.float32(0.1)), 3.4e38, 1e-30, 2.0, float("inf")]
    records = [
        example(
            **{"image/encoded": jpeg(i)},
            key=f"k{i} ä".encode(),
            number=numbers[i],
            fraction=floats[i],
            bits=[1, 2, 3],
            curve=[0.5] * (1 + i % 2),
            maybe_two=[1] * (1 + (i == 5)),
            blob=b"\xff\xfe",
            long=b"a" * 5000,
            **({"rare": i} if i in (2, 6) else {}),
            **({"mixed": i if i > 4 else b"word"}),
        )
        for i in range(7)
    ]
    write_tfrecord(tmp_path / "a.tfrecord", records[:5])
    write_tfrecord(tmp_path / "b.tfrecord", records[5:])
    source = opened(images=str(tmp_path))
    found = source.table.to_pydict()
    assert found.pop("fraction") == [float(np.float32(value)) for value in floats]
    assert found == {
        "key": [f"k{i} ä" for i in range(7)],
        "number": numbers,
        "rare": [None, None, 2, None, None, None, 6],
        "mixed": ["word"] * 5 + ["5", "6"],
    }
    assert read_all(source) == [jpeg(i) for i in range(7)]
    assert source.images[""].in_containers


def test_unusual_encodings_are_read_as_tensorflow_reads_them(tmp_path):
    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    def entry(name: bytes, kind: int, content: bytes) -> bytes:
        return field(1, field(1, name) + field(2, field(kind, content)))

    unpacked = entry(b"n", 3, b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
    fraction = entry(b"f", 2, b"\x0d\x00\x00\xc0\x3f")
    key = entry(b"key", 1, field(1, b"a")) + entry(b"key", 1, field(1, b"b"))
    image = entry(b"image", 1, field(1, b"pixels") + b"\x50\x07")
    record = field(1, unpacked + fraction) + field(1, key + image)
    reference = tf.train.Example.FromString(record).features.feature
    write_tfrecord(tmp_path / "a.tfrecords", [record])
    source = opened(images=str(tmp_path))
    assert source.table.to_pydict() == {
        "n": list(reference["n"].int64_list.value),
        "f": list(reference["f"].float_list.value),
        "key": [reference["key"].bytes_list.value[0].decode()],
    }
    assert source.table.to_pydict() == {"n": [-1], "f": [1.5], "key": ["b"]}
    assert read_all(source) == [b"pixels"]


def test_a_table_is_joined_by_key(tmp_path):
    def records(keys):
        return [example(key=i, image=jpeg(i)) for i in keys]

    write_tfrecord(tmp_path / "x.tfrecord-00000-of-00002", records([1, 2]))
    write_tfrecord(tmp_path / "x.tfrecord-00001-of-00002", [*records([3, 2]), example(key=4)])
    table = write_csv(tmp_path / "t.csv", {"key": [3, 4, 2, 9], "x": [1, 2, 3, 4]})
    source = opened(images=str(tmp_path), table=table)
    assert read_all(source) == [jpeg(3), "missing_image", jpeg(2), "missing_image"]
    assert [unmatched[:2] for unmatched in source.unmatched] == [
        ("1", "no_record"),
        ("2", "duplicate_image"),
    ]


def test_several_images_per_record_are_named_by_feature(tmp_path):
    write_tfrecord(
        tmp_path / "a.tfrecord",
        [example(front=jpeg(0), back=jpeg(1), key=1), example(front=jpeg(2), back=b"", key=2)],
    )
    source = opened(images=str(tmp_path), image_columns=["front", "back"])
    assert read_all(source, "front") == [jpeg(0), jpeg(2)]
    assert read_all(source, "back") == [jpeg(1), "missing_image"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_column": "photoo"},
            r"'photoo' \(the records have: key, photo\).*; did you mean 'photo'\?",
        ),
        ({}, "the feature 'image/encoded' or 'image'"),
        ({"image_column": "key"}, "holds numbers, not the bytes of an image file"),
        ({"image_column": "photo", "table": "t.csv", "key_column": "id"}, "has no column 'id'"),
    ],
)
def test_missing_features_raise_an_error_with_the_existing_ones(tmp_path, options, message):
    write_tfrecord(tmp_path / "a.tfrecord", [example(photo=b"x", key=1)])
    write_csv(tmp_path / "t.csv", {"id": [1]})
    if "table" in options:
        options = {**options, "table": str(tmp_path / "t.csv")}
    with pytest.raises(JobError, match=message):
        opened(images=str(tmp_path), **options)


def test_a_damaged_or_compressed_file_raises_an_error_with_the_byte(tmp_path):
    path = tmp_path / "a.tfrecord"
    write_tfrecord(path, [example(image=jpeg(i), key=i) for i in range(3)])
    content = path.read_bytes()
    second = 12 + int.from_bytes(content[:8], "little") + 4
    flipped = content[:second] + bytes([content[second] ^ 1]) + content[second + 1 :]
    for damaged, problem in (
        (flipped, r"at byte \d+"),
        (content[: second + 5], f"truncated record header at byte {second}"),
        (content[: second + 50], rf"truncated record of \d+ bytes at byte {second}"),
        (content[:12] + b"\xff" * (second - 12) + content[second:], "at byte 12"),
        (b"no record, but text", r"truncated record of \d+ bytes at byte 0"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(JobError, match=f"a.tfrecord is damaged, .* a TFRecord.*{problem}"):
            opened(images=str(tmp_path))
    for compression in ("GZIP", "ZLIB"):
        write_tfrecord(path, [example(image=jpeg(0), key=1)], compression)
        with pytest.raises(JobError, match=r"damaged, compressed or .* without compression"):
            opened(images=str(tmp_path))


def test_a_wrong_bit_in_a_length_raises_an_error(tmp_path):
    path = tmp_path / "a.tfrecord"
    write_tfrecord(path, [example(image=jpeg(i), key=i) for i in range(3)])
    content, start = path.read_bytes(), 0
    while start < len(content):
        for bit in range(64):
            damaged = bytearray(content)
            damaged[start + bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(JobError, match=r"a\.tfrecord is damaged"):
                opened(images=str(path))
        start += 16 + int.from_bytes(content[start : start + 8], "little")


def test_mutated_records_are_read_or_raise_an_error(tmp_path):
    path = tmp_path / "a.tfrecord"
    record = example(image=jpeg(0), key=b"a", x=[1, 2], y=0.5)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        mutated = bytearray(record)
        for _ in range(rng.integers(1, 4)):
            mutated[rng.integers(len(record))] = rng.integers(256)
        write_tfrecord(path, [bytes(mutated)])
        try:
            outcomes.add(opened(images=str(path)).table.num_rows)
        except JobError:
            outcomes.add("error")
    assert outcomes == {1, "error"}
