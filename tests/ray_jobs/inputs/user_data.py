"""A user's images and table, as bytes, and what `prepare` makes of them in a dry run."""

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Manifest
from ray_jobs.prepare.job import prepare
from tests.ray_jobs.raw import SIZE, Row, jpeg

NUM_ROWS = 36


def plain_rows(num_rows: int = NUM_ROWS, **columns: Any) -> list[Row]:
    """Rows with a key, two numbers and a label; each of `columns` is a function of the row number."""
    return [
        {
            "key": f"k{i:02}",
            "size": f"{i * 0.75 + 0.25}",
            "weight": str(900 + 37 * (i * 7 % num_rows)),
            "label": "yes" if i % 3 == 0 else "no",
        }
        | {name: column(i) for name, column in columns.items()}
        for i in range(num_rows)
    ]


def csv_text(rows: list[Row], **options: Any) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n", **options)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


class UserData:
    """A folder with images; `prepare` reads it with any table."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys
        self.text = ""
        """What the last `prepare` printed."""

    def add_images(self, names: Iterable[str | bytes] | None = None, content: Any = jpeg) -> None:
        """Write an image for each name, by default one for each of the plain rows."""
        for i, name in enumerate(names or [f"k{i:02}.jpg" for i in range(NUM_ROWS)]):
            path = os.path.join(os.fsencode(self.folder / "images"), os.fsencode(name))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(content(i))

    def spec(self, content: list[Row] | str | bytes, name: str = "table.csv", **options: Any) -> RunSpec:
        path = self.folder / name
        if isinstance(content, list):
            content = csv_text(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        section = {
            "images": str(self.folder / "images"),
            "table": str(path),
            "output": str(self.folder / "prepared"),
            "image_size": SIZE,
        }
        data = {"categorical": options.pop("categorical", ())}
        run = {"seed": options.pop("seed", 0)}
        return RunSpec.model_validate({"prepare": section | options, "data": data, "run": run})

    def look(self, content: list[Row] | str | bytes, name: str = "table.csv", **options: Any) -> Manifest:
        """Return the manifest of a dry run; `text` is then what it printed, on one line."""
        self._capsys.readouterr()
        try:
            return prepare(self.spec(content, name, dry_run=True, **options))
        finally:
            self.text = " ".join(self._capsys.readouterr().out.split())

    def refusal(self, content: list[Row] | str | bytes, name: str = "table.csv", **options: Any) -> str:
        """Return the message with which a dry run fails, on one line."""
        with pytest.raises(JobError) as error:
            self.look(content, name, **options)
        return " ".join(str(error.value).split())


def values(manifest: Manifest) -> dict[str, Any]:
    """Return what the model would see of the table: class counts, numbers and words."""
    statistics = manifest.statistics
    assert statistics is not None
    numbers = {
        name: (f"{mean:.6g}", f"{std:.6g}", missing)
        for name, mean, std, missing in zip(
            statistics.columns, statistics.mean, statistics.std, statistics.missing, strict=True
        )
    }
    counts = {name: split.class_counts for name, split in manifest.splits.items()}
    return {"numbers": numbers, "counts": counts, "words": manifest.vocabularies}


def roles(manifest: Manifest) -> dict[str, str]:
    return {column.name: column.role for column in manifest.columns}


def column_of(manifest: Manifest, name: str) -> Any:
    return next(column for column in manifest.columns if column.name == name)
