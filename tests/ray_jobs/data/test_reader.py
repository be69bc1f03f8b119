import io
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mm_model.statistics import Vocabulary
from ray_jobs.data import reader as reader_module
from ray_jobs.data.batch import CATEGORY, FEATURES, IMAGE, IMAGE_MASK, LABEL, NUMERIC, WEIGHT
from ray_jobs.data.decoder import RowDecoder, bytes_column
from ray_jobs.data.images import decode_stored
from ray_jobs.data.manifest import ImageInfo, Manifest
from ray_jobs.data.reader import ShardReader, StoredRows
from ray_jobs.data.sampler import RowRange
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.tiny import COLUMNS, with_image, write_prepared

SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared data")


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return write_prepared(folder, {"train": 53, "validation": 22, "test": 3}, size=SIZE)


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


def test_texts_are_combined_with_64_bit_offsets():
    tables = [
        pa.table({"colour": ["red", None], "area": [1.0, 2.0]}),
        pa.table({"colour": ["blue"], "area": [3.0]}),
    ]
    rows = StoredRows(tables).take(["colour", "area"], np.array([2, 1, 0]))
    # A `string` column would end at 2 GiB.
    assert rows.schema.types == [pa.large_string(), pa.float64()]
    assert rows["colour"].to_pylist() == ["blue", None, "red"]


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


def test_a_decoded_batch_equals_the_stored_rows_with_nan_for_missing_numbers(folder, manifest):
    decoder = RowDecoder(manifest, with_image=True)
    (table,) = reader_of(folder, manifest, decoder.columns).read_groups(0, [0])
    rows = pq.read_table(folder / "train/part-00000.parquet").slice(0, 5).to_pylist()
    batch = decoder.decode(table)
    assert {name: (v.shape, v.dtype) for name, v in batch.items()} == {
        IMAGE: ((5, SIZE, SIZE, 3), np.uint8),
        NUMERIC: ((5, 3), np.float32),
        LABEL: ((5, 1), np.float32),
        WEIGHT: ((5, 1), np.float32),
    }
    for i, row in enumerate(rows):
        numbers = [np.nan if row[name] is None else row[name] for name in COLUMNS]
        np.testing.assert_array_equal(batch[NUMERIC][i], np.array(numbers, np.float32))
        assert batch[LABEL][i, 0] == row["label"]
        np.testing.assert_array_equal(batch[IMAGE][i], decode_stored(row["image"]))
    assert (batch[WEIGHT] == 1).all()


def test_images_are_not_read_for_a_model_without_images(folder, manifest):
    decoder = RowDecoder(manifest, with_image=False)
    assert "image" not in decoder.columns
    (table,) = reader_of(folder, manifest, decoder.columns).read_groups(0, [0])
    assert IMAGE not in decoder.decode(table)
    assert decoder.row_bytes == 0


def test_data_without_numbers_results_in_an_array_without_columns(folder, manifest):
    bare = manifest.model_copy(update={"numeric_columns": ()})
    decoder = RowDecoder(bare, with_image=True)
    (table,) = reader_of(folder, bare, decoder.columns).read_groups(0, [0])
    batch = decoder.decode(table)
    assert (batch[NUMERIC].shape, batch[NUMERIC].dtype) == ((5, 0), np.float32)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "0 bytes"), (b"no image", "8 bytes"), (b"\xff\xd8\xff", "3 b")]
)
def test_the_error_for_a_damaged_image_names_its_row_and_the_remedy(
    folder, manifest, content, reason
):
    table = with_image(pq.read_table(folder / "test/part-00000.parquet"), 1, content)
    decoder = RowDecoder(manifest, with_image=True)
    message = (
        rf"the stored image of row 'test-1' is damaged: its {reason}.*; prepare the data again"
    )
    for decode in (decoder.decode, decoder.decode_images):
        with pytest.raises(ValueError, match=message):
            decode(table)


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


def test_the_error_for_an_image_of_another_size_names_its_row_and_both_sizes(folder, manifest):
    image = manifest.image.model_copy(update={"width": 12})
    decoder = RowDecoder(manifest.model_copy(update={"image": image}), with_image=True)
    message = (
        r"row 'test-0' is damaged: its shape is \(16, 16, 3\), but the manifest says \(16, 12, 3\)"
    )
    with pytest.raises(ValueError, match=message):
        decoder.decode(pq.read_table(folder / "test/part-00000.parquet"))


def smooth(size: int) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size] / size
    return np.stack([255 * columns, 255 * rows, 128 + 0 * rows], axis=2).astype(np.uint8)


def jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=98)
    return stream.getvalue()


@pytest.mark.parametrize("size", [64, 48, 32, 20, 16, 8, 100])
def test_jpegs_and_pixels_are_decoded_at_the_size_of_the_model(size):
    pixels, expected = smooth(64), smooth(size).astype(int)
    image = ImageInfo(height=64, width=64)
    manifest = tiny_manifest(image)
    stored = {"jpeg": pa.array([jpeg(pixels)]), "raw": bytes_column(pixels[None])}
    for cells in stored.values():
        table = pa.table({"key": ["a"], "image": cells, "label": pa.array([1], pa.int8())})
        decoder = RowDecoder(manifest, with_image=True, size=size)
        batch = decoder.decode(table)
        assert batch[IMAGE].shape == (1, size, size, 3)
        # A resampled gradient differs by at most half a pixel's step plus JPEG noise.
        assert np.abs(batch[IMAGE][0].astype(int) - expected).max() <= 256 / size / 2 + 6
        # A cached table is decoded to the same pixels.
        cached = decoder.decode(decoder.decode_images(table))
        np.testing.assert_array_equal(cached[IMAGE], batch[IMAGE])


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


def test_raw_pixels_of_another_size_raise_an_error():
    cells = bytes_column(smooth(32)[None])
    table = pa.table({"key": ["a"], "image": cells, "label": pa.array([1], pa.int8())})
    decoder = RowDecoder(tiny_manifest(ImageInfo(height=64, width=64)), with_image=True)
    with pytest.raises(ValueError, match=r"row 'a' is damaged: it has 3072 bytes, .*64, 64, 3"):
        decoder.decode(table)


def tiny_manifest(image: ImageInfo, **changes: object) -> Manifest:
    base = Manifest.model_construct(image=image, numeric_columns=(), vocabularies=())
    return base.model_copy(update=changes)


def test_a_batch_can_mix_encoded_and_decoded_row_groups(folder, manifest):
    decoder = RowDecoder(manifest, with_image=True)
    first, second = reader_of(folder, manifest, decoder.columns).read_groups(0, [0, 1])
    mixed = StoredRows([decoder.decode_images(first), second.slice(1, 3)])
    rows = np.array([7, 0, 5, 4, 4])
    batch = decoder.make_batch(mixed, rows)
    decoder.fill_images(batch, mixed, rows)
    expected = decoder.decode(pa.concat_tables([first, second.slice(1, 3)]).take(pa.array(rows)))
    for name, values in expected.items():
        np.testing.assert_array_equal(batch[name], values)


def test_several_images_per_row_are_stacked_and_missing_ones_masked():
    image = ImageInfo(height=32, width=32, names=("front", "back"))
    front, back = smooth(32), smooth(32)[::-1]
    for stored in (lambda p: jpeg(p), lambda p: p.tobytes()):
        kind = pa.binary() if stored(front)[:2] == b"\xff\xd8" else pa.binary(32 * 32 * 3)
        table = pa.table(
            {
                "key": ["a", "b"],
                "image_front": pa.array([stored(front), None], kind),
                "image_back": pa.array([stored(back), stored(front)], kind),
                "label": pa.array([1, 0], pa.int8()),
            }
        )
        decoder = RowDecoder(tiny_manifest(image), with_image=True, size=16)
        assert decoder.columns == ["key", "image_front", "image_back", "label"]
        assert (decoder.row_shape, decoder.row_bytes) == ((2, 16, 16, 3), 2 * 16 * 16 * 3)
        for batch in (decoder.decode(table), decoder.decode(decoder.decode_images(table))):
            assert batch[IMAGE].shape == (2, 2, 16, 16, 3)
            assert batch[IMAGE_MASK].tolist() == [[1, 1], [0, 1]]
            assert not batch[IMAGE][1, 0].any()
            np.testing.assert_array_equal(batch[IMAGE][0, 0], batch[IMAGE][1, 1])
            assert (batch[IMAGE][0, 0] != batch[IMAGE][0, 1]).any()


def test_categories_become_vocabulary_codes():
    vocabularies = (
        Vocabulary(column="colour", words=("blue", "red")),
        Vocabulary(column="make", words=("x",)),
    )
    table = pa.table(
        {
            "key": ["a", "b", "c"],
            "colour": ["red", None, "green"],
            "make": ["x", "x", None],
            "label": pa.array([1, 0, 1], pa.int8()),
        }
    )
    manifest = tiny_manifest(ImageInfo(height=8, width=8), vocabularies=vocabularies)
    batch = RowDecoder(manifest, with_image=False).decode(table)
    assert batch[CATEGORY].dtype == np.int32
    assert batch[CATEGORY].tolist() == [[3, 2], [0, 2], [1, 0]]


def test_features_replace_images():
    features = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    image = ImageInfo(encoding="raw", height=32, width=32, features=(2, 5))
    decoder = RowDecoder(tiny_manifest(image), with_image=True, size=16)
    label = pa.array([1, 0, 1], pa.int8())
    table = pa.table({"key": ["a", "b", "c"], "image": bytes_column(features), "label": label})
    batch = decoder.decode(table)
    assert IMAGE not in batch
    assert batch[FEATURES].dtype == np.float32
    np.testing.assert_array_equal(batch[FEATURES], features)
    assert (decoder.row_shape, decoder.row_bytes) == ((2, 5), 40)
    assert decoder.decode_images(table) is table
    assert FEATURES not in RowDecoder(tiny_manifest(image), with_image=False).decode(table)


def test_features_of_several_images_are_stacked_and_zero_where_missing():
    features = np.random.default_rng(0).normal(size=(2, 1, 5)).astype(np.float32)
    image = ImageInfo(encoding="raw", height=32, width=32, names=("front", "back"), features=(1, 5))
    decoder = RowDecoder(tiny_manifest(image), with_image=True)
    table = pa.table(
        {
            "key": ["a", "b"],
            "image_front": bytes_column(features, pa.chunked_array([[False, True]])),
            "image_back": bytes_column(features[::-1]),
            "label": pa.array([1, 0], pa.int8()),
        }
    )
    batch = decoder.decode(table)
    assert batch[IMAGE_MASK].tolist() == [[1, 1], [0, 1]]
    np.testing.assert_array_equal(batch[FEATURES][0], features)
    np.testing.assert_array_equal(batch[FEATURES][1], [np.zeros((1, 5)), features[0]])
    assert (decoder.row_shape, decoder.row_bytes) == ((2, 1, 5), 40)


def test_the_error_for_a_wrong_number_of_features_names_its_row():
    cells = bytes_column(np.zeros((1, 2, 4), np.float32))
    table = pa.table({"key": ["a"], "image": cells, "label": pa.array([1], pa.int8())})
    image = ImageInfo(encoding="raw", height=32, width=32, features=(2, 5))
    decoder = RowDecoder(tiny_manifest(image), with_image=True)
    with pytest.raises(ValueError, match=r"row 'a' is damaged: it has 8 features, .*\(2, 5\)"):
        decoder.decode(table)
