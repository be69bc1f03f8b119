import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm_model.statistics import Vocabulary
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.data import reader as reader_module
from ray_jobs.data.batch import CATEGORY, FEATURES, IMAGE, IMAGE_MASK, NUMERIC
from ray_jobs.data.decoder import RowDecoder, bytes_column
from ray_jobs.data.images import decode_stored
from ray_jobs.data.manifest import ImageInfo, Manifest
from ray_jobs.data.reader import ShardReader, StoredRows, read_columns, sample_columns
from ray_jobs.data.sampler import RowRange
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.tiny import jpeg, with_image

SQUARE = ImageInfo(height=64, width=64)
FEATURES_OF = ImageInfo(encoding="raw", height=64, width=64, features=(2, 5))


def tiny_manifest(image: ImageInfo, **changes: object) -> Manifest:
    base = Manifest.model_construct(
        prepare=PrepareSpec(), image=image, numeric_columns=(), vocabularies=()
    )
    return base.model_copy(update=changes)


def labelled(**columns: pa.Array) -> pa.Table:
    """Return rows with keys `a`, `b`, …, these columns and labels."""
    count = len(next(iter(columns.values())))
    label = pa.array([i % 2 for i in range(count)], pa.int8())
    return pa.table({"key": list("abc")[:count], **columns, "label": label})


def reader_of(folder: Path, manifest: Manifest, columns: list[str]) -> ShardReader:
    return ShardReader(Folder(folder), manifest.splits["train"].shards, columns)


def test_ranges_are_read_in_order(folder, manifest):
    reader = reader_of(folder, manifest, ["key"])
    ranges = [RowRange(2, 1, 3, 5), RowRange(0, 0, 0, 2), RowRange(2, 1, 0, 1)]
    for _ in range(2):  # The second time with cached footers.
        stored = reader.read(ranges)
        assert stored.num_rows == 5
        assert stored.take(["key"], np.arange(5))["key"].to_pylist() == [
            "train-48", "train-49", "train-0", "train-1", "train-45",
        ]  # fmt: skip


def test_no_shards_have_empty_columns(folder):
    for table in (read_columns(folder, (), ["key"]), sample_columns(folder, (), ["key"], 5)):
        assert (table.column_names, table.num_rows) == (["key"], 0)


def test_the_number_of_cached_footers_is_bounded_with_many_threads(folder, manifest, monkeypatch):
    monkeypatch.setattr(reader_module, "_MAX_FOOTERS", 2)
    reader = reader_of(folder, manifest, ["key"])

    def remember(thread: int) -> None:
        for n in range(5000):
            reader._remember((7 * n + thread) % 50, None)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(remember, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert len(reader._footers) == 2
    (table,) = pickle.loads(pickle.dumps(reader)).read_groups(1, [0])
    assert table["key"][0].as_py() == "train-20"


def test_a_model_without_images_or_numbers_reads_none(folder, manifest):
    bare = manifest.model_copy(update={"numeric_columns": ()})
    decoder = RowDecoder(bare, with_image=False)
    assert decoder.columns == ["key", "label"]
    assert decoder.row_bytes == 0
    (table,) = reader_of(folder, bare, decoder.columns).read_groups(0, [0])
    batch = decoder.decode(table)
    assert IMAGE not in batch
    assert (batch[NUMERIC].shape, batch[NUMERIC].dtype) == ((5, 0), np.float32)


def test_damaged_images_are_reported_and_the_others_decoded(folder, manifest):
    table = with_image(pq.read_table(folder / "test/part-00000.parquet"), 1, b"no image")
    decoder, stored, rows = RowDecoder(manifest, with_image=True), StoredRows([table]), np.arange(3)
    batch, errors = decoder.make_batch(stored, rows), {}
    decoder.fill_images(
        batch, stored, rows, on_error=lambda row, error: errors.update({row: str(error)})
    )
    assert errors == {1: "its 8 bytes are not a JPEG"}
    assert not batch[IMAGE][1].any()
    expected = decode_stored(table["image"][2].as_py())
    np.testing.assert_array_equal(batch[IMAGE][2], expected)


def smooth(size: int) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size] / size
    return np.stack([255 * columns, 255 * rows, 128 + 0 * rows], axis=2).astype(np.uint8)


@pytest.mark.parametrize("size", [64, 48, 32, 20, 16, 8, 100])
def test_jpegs_and_pixels_are_decoded_at_the_size_of_the_model(size):
    pixels, expected = smooth(64), smooth(size).astype(int)
    decoder = RowDecoder(tiny_manifest(SQUARE), with_image=True, size=size)
    for cells in (pa.array([jpeg(pixels)]), bytes_column(pixels[None])):
        table = labelled(image=cells)
        batch = decoder.decode(table)
        assert batch[IMAGE].shape == (1, size, size, 3)
        # A resampled gradient differs by at most half a pixel's step plus JPEG noise.
        assert np.abs(batch[IMAGE][0].astype(int) - expected).max() <= 256 / size / 2 + 6
        # A cached table is decoded to the same pixels.
        cached = decoder.decode(decoder.decode_images(table))
        np.testing.assert_array_equal(cached[IMAGE], batch[IMAGE])


@pytest.mark.parametrize(
    ("image", "cells", "reason"),
    [
        (SQUARE, pa.array([b""]), "its 0 bytes are not a JPEG"),
        (SQUARE, pa.array([b"no image"]), "its 8 bytes are not a JPEG"),
        (SQUARE, pa.array([b"\xff\xd8\xff"]), "its 3 bytes are not a JPEG"),
        (SQUARE, pa.array([None], pa.binary()), "it is missing"),
        (
            SQUARE,
            pa.array([jpeg(smooth(16))]),
            r"its shape is \(16, 16, 3\), but the manifest says \(64, 64, 3\)",
        ),
        (
            SQUARE,
            bytes_column(smooth(32)[None]),
            r"it has 3072 bytes, but the manifest says \(64, 64, 3\)",
        ),
        (
            FEATURES_OF,
            bytes_column(np.zeros((1, 2, 4), np.float32)),
            r"it has 8 features, but the manifest says \(2, 5\)",
        ),
    ],
)
def test_the_error_for_a_damaged_image_names_its_row_and_the_remedy(image, cells, reason):
    decoder, table = RowDecoder(tiny_manifest(image), with_image=True), labelled(image=cells)
    message = f"the stored image of row 'a' is damaged: {reason}; prepare the data again"
    with pytest.raises(ValueError, match=message):
        decoder.decode(table)
    if not (cells.null_count or image.features):
        with pytest.raises(ValueError, match=message):
            decoder.decode_images(table)


def test_a_jpeg_is_decoded_at_a_reduced_size_where_that_suffices(monkeypatch):
    flags: list[int] = []
    imdecode = cv2.imdecode

    def record_and_decode(content: np.ndarray, flag: int) -> np.ndarray:
        flags.append(flag)
        return imdecode(content, flag)

    monkeypatch.setattr(cv2, "imdecode", record_and_decode)
    content = jpeg(smooth(64))
    for size in (64, 33, 32, 17, 16, 8, 3):
        decode_stored(content, (64, 64, 3), (size, size, 3))
    as_stored = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    full, half, quarter, eighth = (as_stored | bits for bits in (0, 16, 32, 64))
    assert flags == [full, full, half, half, quarter, eighth, eighth]


@pytest.mark.parametrize("encode", [jpeg, np.ndarray.tobytes])
def test_several_images_per_row_are_stacked_and_missing_ones_masked(encode):
    image = ImageInfo(height=32, width=32, names=("front", "back"))
    kind = pa.binary() if encode is jpeg else pa.binary(32 * 32 * 3)
    front, back = encode(smooth(32)), encode(smooth(32)[::-1])
    table = labelled(
        image_front=pa.array([front, None], kind), image_back=pa.array([back, front], kind)
    )
    decoder = RowDecoder(tiny_manifest(image), with_image=True, size=16)
    assert decoder.columns == table.column_names
    assert (decoder.row_shape, decoder.row_bytes) == ((2, 16, 16, 3), 2 * 16 * 16 * 3)
    for batch in (decoder.decode(table), decoder.decode(decoder.decode_images(table))):
        assert batch[IMAGE].shape == (2, 2, 16, 16, 3)
        assert batch[IMAGE_MASK].tolist() == [[1, 1], [0, 1]]
        assert not batch[IMAGE][1, 0].any()
        np.testing.assert_array_equal(batch[IMAGE][0, 0], batch[IMAGE][1, 1])
        assert (batch[IMAGE][0, 0] != batch[IMAGE][0, 1]).any()


def test_texts_become_vocabulary_codes_and_have_64_bit_offsets():
    vocabularies = (
        Vocabulary(column="colour", words=("blue", "red")),
        Vocabulary(column="make", words=("x",)),
    )
    table = labelled(colour=["red", None, "green"], make=["x", "x", None])
    manifest = tiny_manifest(SQUARE, vocabularies=vocabularies)
    batch = RowDecoder(manifest, with_image=False).decode(table)
    assert batch[CATEGORY].dtype == np.int32
    assert batch[CATEGORY].tolist() == [[3, 2], [0, 2], [1, 0]]
    rows = StoredRows([table, table]).take(["colour"], np.array([3, 1, 2]))
    assert rows.schema.types == [pa.large_string()]
    assert rows["colour"].to_pylist() == ["red", None, "green"]


def test_features_replace_images():
    features = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    decoder = RowDecoder(tiny_manifest(FEATURES_OF), with_image=True, size=16)
    table = labelled(image=bytes_column(features))
    batch = decoder.decode(table)
    assert IMAGE not in batch
    assert batch[FEATURES].dtype == np.float32
    np.testing.assert_array_equal(batch[FEATURES], features)
    assert (decoder.row_shape, decoder.row_bytes) == ((2, 5), 40)
    assert decoder.decode_images(table) is table
    assert FEATURES not in RowDecoder(tiny_manifest(FEATURES_OF), with_image=False).decode(table)
