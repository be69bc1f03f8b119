"""Damaged images and tables never crash: each row is stored, or quarantined with a reason."""

import io
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.data.images import BadImage, prepare_image
from ray_jobs.prepare.cell_text import column_text
from ray_jobs.prepare.table_files import open_table
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.raw import SIZE, Raw, shard_rows

RAW_PIXELS = PrepareSpec(image_size=SIZE, jpeg_quality=90, max_image_pixels=1_000_000, store="raw")
IMAGE_REASONS = {"unreadable_image", "animated_image", "too_large_image"}
KINDS: tuple[tuple[str, dict], ...] = (
    ("JPEG", {"quality": 90}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("GIF", {}),
    ("WEBP", {"lossless": True}),
    ("WEBP", {"quality": 80}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("BMP", {}),
    ("JPEG2000", {}),
)
CELLS = (
    *("", " ", "NaN", "null", "0", "1", "-1e308", "1e400", "inf", "-Infinity", "0x1F", "1_000"),
    *("50+", "91-92", "1.234,5", "2024-02-30", "ja", "½", "\u202e", "\x00", "a\nb", '"', "''"),
    *("../../etc/passwd", "/", ".", "{key}", "k1.jpg", "k1", "%00", "a" * 5000, "١٢٣", "1" * 400),
)


def original(rng: np.random.Generator) -> bytes:
    rough = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(rough).resize((56, 40), Image.Resampling.BICUBIC)
    kind, options = KINDS[rng.integers(len(KINDS))]
    modes = ("RGB", "L", "RGBA", "P", "1") if kind in ("PNG", "TIFF") else ("RGB", "L")
    stream = io.BytesIO()
    image.convert(str(rng.choice(modes))).save(stream, kind, **options)
    return stream.getvalue()


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Damage a file in a way that is common by accident or on purpose."""
    data = bytearray(content)
    place, other = sorted(rng.integers(0, len(data), 2).tolist())
    match rng.integers(8):
        case 0:  # A few bytes anywhere.
            for at in rng.integers(0, len(data), rng.integers(1, 20)).tolist():
                data[at] = rng.integers(256)
        case 1:  # The header, where sizes and modes are.
            data[rng.integers(0, min(64, len(data)))] = rng.integers(256)
        case 2:
            del data[place:]
        case 3:
            del data[place:other]
        case 4:
            data[place:place] = data[place:other]
        case 5:
            data[place:other] = bytes(other - place)
        case 6:
            data[place : place + 4] = b"\xff\xff\xff\xff"
        case 7:
            data += rng.bytes(64)
    return bytes(data)


def check_image(seed: int) -> str:
    """Return the outcome of one mutated image."""
    rng = np.random.default_rng(seed)
    content = mutated(original(rng), rng)
    try:
        stored = prepare_image(content, RAW_PIXELS)
    except BadImage as error:
        return error.reason if error.detail else "no detail"
    assert len(stored.content) == SIZE * SIZE * 3
    return "stored"


def check_prepare(folder: Path, seed: int) -> tuple[int, int]:
    """Prepare mutated data; return the number of stored and of quarantined rows."""
    rng = np.random.default_rng(seed)
    raw = Raw(folder)
    for i in range(120):
        content = original(rng)
        if rng.random() < 0.3:
            content = mutated(content, rng)
        if rng.random() < 0.95:
            raw.image(f"k{i}", content)
        row = {"key": f"k{i}", "area": i * 1.5, "town": "abc"[i % 3], "rooms": i % 4}
        row |= {"label": i % 2, "photo": f"k{i}.jpg"}
        if rng.random() < 0.4:
            row[str(rng.choice(list(row)))] = CELLS[rng.integers(len(CELLS))]
        raw.rows.append(row)
    manifest = raw.prepare(
        seed=seed,
        categorical=["town"],
        image_column="photo",
        numeric_columns=["area", "rooms"],
        positive_label="1",
        max_bad_fraction=1.0,
        validation_fraction=0.25,
        test_fraction=0.25,
        max_image_pixels=1_000_000,
    )
    tables = shard_rows(raw.out(), manifest).values()
    rows = [row for table in tables for row in table.to_pylist()]
    stored = [row["key"] for row in rows]
    quarantined = pq.read_table(raw.out() / "quarantine").to_pylist()
    assert len(set(stored)) == len(stored)
    assert all(row["reason"] and row["detail"] for row in quarantined)
    # Read the keys like the table, since a mutated cell may start a new line.
    keys = column_text(open_table(str(folder / "table.csv")).table["key"]).to_pylist()
    found = [*stored, *(row["key"] for row in quarantined)]
    assert sorted(map(str, found)) == sorted(map(str, keys))
    for row in rows:
        assert row["label"] in (0, 1)
        assert all(v is None or np.isfinite(v) for v in (row["area"], row["rooms"]))
        assert Image.open(io.BytesIO(row["image"])).size == (SIZE, SIZE)
    assert not [name for name in Folder(raw.out()).names() if name.endswith(".partial")]
    return len(stored), len(quarantined)


def check_table(path: Path, seed: int) -> bool:
    """Return whether a table with mutated bytes could be read."""
    rng = np.random.default_rng(seed)
    lines = ["key,area,label", *(f"k{i},{i * 1.5},{i % 2}" for i in range(20))]
    path.write_bytes(mutated("\n".join(lines).encode(), rng))
    try:
        table = open_table(str(path)).table
    except JobError:
        return False
    assert table.num_columns > 0
    return True


@pytest.mark.parametrize("num_cases", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_mutated_images_and_tables_are_stored_or_quarantined(tmp_path, ray_local, num_cases):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [check_image(seed) for seed in range(num_cases)]
        tables = [check_table(tmp_path / "t.csv", seed) for seed in range(num_cases)]
        counts = [check_prepare(tmp_path / str(seed), seed) for seed in range(num_cases // 40)]
    assert [str(w.message) for w in caught if "PIL" in w.filename] == []
    # Both outcomes must occur, or the test shows nothing.
    assert {"stored", "unreadable_image"} <= set(found) <= {"stored", *IMAGE_REASONS}
    assert set(tables) == {True, False}
    assert all(stored and quarantined for stored, quarantined in counts)
