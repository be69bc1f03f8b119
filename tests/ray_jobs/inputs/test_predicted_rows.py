"""Stored pixels, rows that stay in their splits, and new rows as people have them."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import PredictSpec
from ray_jobs.predict import predict
from ray_jobs.prepare.job import prepare
from tests.ray_jobs.inputs.user_data import FILES, UserData, csv_text, plain_rows
from tests.ray_jobs.raw import rows_by_key, split_of
from tests.ray_jobs.trained import write_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]

CLEAR = Image.new("RGBA", (20, 20), (200, 30, 30, 0))
PALETTE = Image.new("P", (20, 20), 1)
PALETTE.putpalette([0, 0, 0, 10, 200, 30])
GREY = Image.fromarray(np.full((20, 20), 200, np.uint8))
STORED: dict[str, tuple[Image.Image, str, dict[str, Any], tuple[int, ...]]] = {
    "DIGITS#85": (CLEAR, "PNG", {}, (255, 255, 255)),
    "University1652#17": (PALETTE, "PNG", {"transparency": 1}, (255, 255, 255)),
    "MMMU#17": (PALETTE, "PNG", {}, (10, 200, 30)),
    "Pillow#5655": (GREY, "TIFF", {"tiffinfo": {262: 0}}, (200, 200, 200)),
    "image-tiff#297": (Image.new("1", (20, 20), 1), "TIFF", {}, (255, 255, 255)),
    "EAST#61": (Image.new("LA", (20, 20), (0, 0)), "PNG", {}, (255, 255, 255)),
}


def test_pixels_are_stored_in_their_colours(user: UserData) -> None:
    def content(i: int) -> bytes:
        image, kind, options, _ = list(STORED.values())[i % len(STORED)]
        image.save(stream := io.BytesIO(), kind, **options)
        return stream.getvalue()

    user.add_images(FILES, content)
    manifest = prepare(user.spec(plain_rows(), store="raw"))
    rows = rows_by_key(user.folder / "prepared", manifest)
    for i, (source, case) in enumerate(STORED.items()):
        assert (source, tuple(rows[f"k{i:02}"]["image"][:3])) == (source, case[-1])


def test_new_rows_and_another_order_move_no_row(user: UserData) -> None:
    """autogluon#5806 and coderdata#213: splits that stay when rows are added."""
    few, all_rows, out = plain_rows()[:28], plain_rows(), user.folder / "prepared"
    before = split_of(out, prepare(user.spec(few)))
    for rows in (all_rows, all_rows[::-1]):
        assert before.items() <= split_of(out, prepare(user.spec(rows))).items()


PRICES = {"price": lambda i: f"${1000 + i * 5 % 36:,}", "site": lambda i: "ab"[i // 5 % 2]}


def run_of(user: UserData) -> Path:
    rows = plain_rows(**PRICES)
    rules = {"categorical": ["site"], "number_rules": {"price": "money"}}
    write_run(user.folder / "run", user.look(rows, **rules))
    return user.folder / "run"


def predicted(user: UserData, run: Path, content: bytes, name: str) -> tuple[list[Any], str]:
    (user.folder / name).write_bytes(content)
    images, output = str(user.folder / "images/{key}.jpg"), str(user.folder / f"out-{name}")
    spec = {"run": str(run), "data": str(user.folder / name), "images": images, "output": output}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        predict(PredictSpec.model_validate(spec))
    rows = pq.read_table(output).to_pylist()
    return [row["probability"] for row in rows], " ".join(printed.getvalue().split())


def test_new_rows_are_read_like_the_rows_of_training(user: UserData) -> None:
    """autogluon#2873, #463 and #3386: order, types, extra, missing and unknown; none at all."""
    run = run_of(user)
    rows = plain_rows(8, without="label", **PRICES)
    expected, _ = predicted(user, run, csv_text(rows).encode(), "a.csv")
    frame = pd.DataFrame(rows).iloc[:, ::-1].astype({"size": float, "weight": float})
    frame["price"] = [float(re.sub(r"[$,]", "", price)) for price in frame["price"]]
    frame["site"], frame["Unnamed: 0"] = frame["site"] + "\u00a0", range(8)
    frame.to_excel(stream := io.BytesIO(), index=False)
    assert predicted(user, run, stream.getvalue(), "b.xlsx")[0] == pytest.approx(expected)
    assert predicted(user, run, b"key,size,weight,price,site\n", "c.csv")[0] == []
    odd = [row | {"site": "west", "size": 1e6 if i else "big"} for i, row in enumerate(rows)]
    odd[1]["key"] = "k99"
    found, text = predicted(user, run, csv_text(odd).encode(), "d.csv")
    assert [value is None for value in found] == [True, True] + [False] * 6
    for note in ("unknown word, such as west", "outside the training range", "non_numeric_text"):
        assert note in text


def test_a_missing_column_is_named_with_the_nearest(user: UserData) -> None:
    """autogluon#3386 and asreview#467: the header has another letter case."""
    rows = [{k.replace("size", "Size"): v for k, v in row.items()} for row in plain_rows(**PRICES)]
    with pytest.raises(JobError, match="did you mean 'Size'"):
        predicted(user, run_of(user), csv_text(rows).encode(), "e.csv")
