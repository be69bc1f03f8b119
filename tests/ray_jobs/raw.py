"""Raw data of a few rows for `prepare`, and helpers to read the prepared data."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ray_jobs.config.prepare_spec import SPLITS
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.images import decode_stored
from ray_jobs.data.manifest import Manifest
from ray_jobs.prepare.job import prepare
from tests.ray_jobs.trained import stored_rows

SIZE = 24
ROWS_PER_SHARD = 10

Row = dict[str, Any]


def jpeg(seed: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    colour = np.random.default_rng(seed).integers(30, 220, 3)
    image = Image.fromarray(np.full((20, 30, 3), colour, np.uint8)).convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


class Raw:
    """A folder with a table and one image per row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "images").mkdir(parents=True)
        self.rows: list[Row] = []

    def add(self, numbers: Iterable[int]) -> "Raw":
        for i in numbers:
            area = "" if i % 7 == 0 else str(i * 1.5)
            self.rows.append(
                {"key": f"k{i}", "area": area, "rooms": i % 5, "label": int(i % 3 == 0)}
            )
            (self.folder / "images" / f"k{i}.jpg").write_bytes(jpeg(i))
        return self

    def image(self, key: str, content: bytes) -> None:
        path = self.folder / "images" / f"{key}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)

    def spec(
        self, name: str = "out", seed: int = 0, categorical: Iterable[str] = (), **options: Any
    ) -> RunSpec:
        """Write the table and return the spec."""
        with open(self.folder / "table.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        paths = {
            "images": str(self.folder / "images"),
            "table": str(self.folder / "table.csv"),
            "output": str(self.out(name)),
        }
        sizes = {"image_size": SIZE, "rows_per_shard": ROWS_PER_SHARD, "rows_per_group": 4}
        section = paths | sizes | options
        tree = {"prepare": section, "run": {"seed": seed}, "data": {"categorical": categorical}}
        return RunSpec.model_validate(tree)

    def prepare(self, name: str = "out", **options: Any) -> Manifest:
        return prepare(self.spec(name, **options))

    def out(self, name: str = "out") -> Path:
        return self.folder / name


def shard_rows(folder: Path, manifest: Manifest) -> dict[str, pa.Table]:
    return {split: stored_rows(folder, manifest, split) for split in SPLITS}


def rows_by_key(folder: Path, manifest: Manifest) -> dict[str, Row]:
    tables = shard_rows(folder, manifest).values()
    return {row["key"]: row for table in tables for row in table.to_pylist()}


def split_of(folder: Path, manifest: Manifest) -> dict[str, str]:
    return {
        key: split
        for split, table in shard_rows(folder, manifest).items()
        for key in table.column("key").to_pylist()
    }


def quarantine(folder: Path) -> dict[str | None, tuple[str, str]]:
    rows = pq.read_table(folder / "quarantine").to_pylist()
    return {row["key"]: (row["reason"], row["detail"]) for row in rows}


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def assert_has_colour(stored: bytes, file: Path) -> None:
    """Check that a stored image has the colour of an image file."""
    pixels = decode_stored(stored)
    assert pixels.shape == (SIZE, SIZE, 3)
    colour = np.asarray(Image.open(file).convert("RGB"))[5, 5].astype(int)
    np.testing.assert_allclose(pixels[12, 12].astype(int), colour, atol=4)
