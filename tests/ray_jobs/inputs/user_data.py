"""A user's images and table, and what `prepare` makes of them in a dry run."""

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Column, Manifest
from ray_jobs.prepare.job import prepare
from tests.ray_jobs.raw import SIZE, Row, jpeg

FILES = [f"k{i:02}.jpg" for i in range(36)]
Content = list[Row] | str | bytes


def cases(table: Mapping[str, tuple[Any, ...]]) -> list[Any]:
    """Return parameters, by the source of the input."""
    return [pytest.param(*case, id=name) for name, case in table.items()]


def plain_rows(num_rows: int = 36, without: str | None = None, **columns: Any) -> list[Row]:
    """Rows with a key, two numbers and a label; `columns` are functions of the row number."""
    rows: list[Row] = []
    for i in range(num_rows):
        row: Row = {"key": f"k{i:02}", "size": f"{i * 0.75 + 0.25}"}
        row |= {"weight": str(900 + 37 * (i * 7 % num_rows)), "label": "no" if i % 3 else "yes"}
        row |= {name: column(i) for name, column in columns.items()}
        rows.append({name: cell for name, cell in row.items() if name != without})
    return rows


def csv_text(rows: list[Row], **options: Any) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n", **options)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


class UserData:
    """A folder with images, which `prepare` reads with any table."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys
        self.text = ""
        """What the last dry run printed, on one line."""

    def add_images(self, names: Iterable[str | bytes] = FILES, content: Any = jpeg) -> None:
        for i, name in enumerate(names):
            path = os.path.join(os.fsencode(self.folder / "images"), os.fsencode(name))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(os.fsdecode(path)).write_bytes(content(i))

    def spec(self, content: Content, file: str = "table.csv", **options: Any) -> RunSpec:
        text = csv_text(content) if isinstance(content, list) else content
        (self.folder / file).write_bytes(text.encode() if isinstance(text, str) else text)
        paths = {"images": "images", "table": file, "output": "prepared"}
        section = {name: str(self.folder / path) for name, path in paths.items()}
        data = {"categorical": options.pop("categorical", ())}
        run = {"seed": options.pop("seed", 0)}
        section |= {"image_size": SIZE} | options
        return RunSpec.model_validate({"prepare": section, "data": data, "run": run})

    def look(self, content: Content, file: str = "table.csv", **options: Any) -> Manifest:
        """Return the manifest of a dry run."""
        self._capsys.readouterr()
        try:
            return prepare(self.spec(content, file, dry_run=True, **options))
        finally:
            self.text = " ".join(self._capsys.readouterr().out.split())

    def refusal(self, content: Content, file: str = "table.csv", **options: Any) -> str:
        """Return the message with which a dry run fails, on one line."""
        with pytest.raises(JobError) as error:
            self.look(content, file, **options)
        assert "max_bad_fraction" not in str(error.value)
        return " ".join(str(error.value).split())


def values(manifest: Manifest) -> dict[str, Any]:
    """Return what the model would see of the table: class counts, numbers and words."""
    found = manifest.statistics
    assert found is not None
    columns = zip(found.columns, found.mean, found.std, found.missing, strict=True)
    numbers = {name: (f"{mean:.6g}", f"{std:.6g}", gaps) for name, mean, std, gaps in columns}
    counts = {name: split.class_counts for name, split in manifest.splits.items()}
    return {"numbers": numbers, "counts": counts, "words": manifest.vocabularies}


def totals(manifest: Manifest) -> list[int]:
    """Return the numbers of negative and positive rows in all splits."""
    counts = [split.class_counts for split in manifest.splits.values()]
    return [sum(column) for column in zip(*counts, strict=True)]


def column_of(manifest: Manifest, name: str) -> Column:
    return next(column for column in manifest.columns if column.name == name)
