"""Stored pixels, rows that stay in their splits, and new rows as people have them."""

import contextlib
import io
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import PredictSpec
from ray_jobs.predict import predict
from ray_jobs.prepare.job import prepare
from tests.ray_jobs.inputs.user_data import FILES, UserData, csv_text, plain_rows
from tests.ray_jobs.raw import Row, rows_by_key, split_of
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


def numbers_of(rows: list[Row]) -> pd.DataFrame:
    """The rows with numbers instead of text, and pandas' own types."""
    frame = pd.DataFrame(rows).replace("", None)
    prices = [float(re.sub(r"[$,]", "", price)) for price in frame["price"]]
    return frame.assign(price=prices, size=frame["size"].astype(float)).astype({"weight": int})


def parquet(frame: pd.DataFrame, **types: str) -> bytes:
    frame.astype(types).to_parquet(stream := io.BytesIO(), index=False)
    return stream.getvalue()


def excel(frame: pd.DataFrame) -> bytes:
    frame.to_excel(stream := io.BytesIO(), index=False)
    return stream.getvalue()


def json_text(frame: pd.DataFrame) -> str:
    return str(frame.to_json(orient="records"))


def csv(rows: list[Row]) -> bytes:
    return csv_text(rows).encode()


NARROW = {"size": "float32", "weight": "int16", "price": "float32", "site": "category"}
NULLABLE = {"size": "Float64", "weight": "Int64", "site": "string", "key": "category"}
# The rows, and the ones of them that remain.
Same = tuple[str, Callable[[list[Row]], bytes], slice]
ALL, FOURTH, FIFTH = slice(None), slice(4, 5), slice(5, 6)
SAME: dict[str, Same] = {
    "LightGBM#5627": ("csv", lambda rows: csv([dict([*r.items()][-1:]) | r for r in rows]), ALL),
    "pytorch_tabular#152": ("csv", lambda rows: csv([r | {"label": 0} for r in rows]), ALL),
    "pycaret#1060-more": ("csv", lambda rows: csv([{"E": "?"} | r | {"F": 1} for r in rows]), ALL),
    "mlflow#12516": ("parquet", lambda rows: parquet(numbers_of(rows), **NARROW), ALL),
    "mlflow#5207": ("parquet", lambda rows: parquet(numbers_of(rows), **NULLABLE), ALL),
    "mlflow#4827": ("json", lambda rows: json_text(numbers_of(rows)).encode(), ALL),
    "evalml#3194-no-value": ("csv", csv, FOURTH),
    "evalml#3194-nulls": ("parquet", lambda rows: parquet(numbers_of(rows)), FOURTH),
    "miceforest#60": ("xlsx", lambda rows: excel(numbers_of(rows)), FIFTH),
}


def test_other_tables_of_the_same_rows_give_the_same_probabilities(
    user: UserData, predict_here: None
) -> None:
    run, rows = run_of(user), plain_rows(8, without="label", **PRICES)
    rows[4]["size"] = rows[5]["site"] = ""
    expected, _ = predicted(user, run, csv(rows), "all.csv")
    assert len(set(expected)) == 8
    for source, (kind, content, kept) in SAME.items():
        name = f"{source}.{kind}".replace("#", "-")
        found, _ = predicted(user, run, content(rows[kept]), name)
        assert (source, found) == (source, pytest.approx(expected[kept], abs=1e-6))


NO_ROWS = numbers_of(plain_rows(8, without="label", **PRICES)).head(0)
EMPTY = {
    "autogluon#1434.csv": csv_text(plain_rows(1, **PRICES)).splitlines()[0].encode(),
    "lightwood#810.xlsx": excel(NO_ROWS),
    "autogluon#1472.parquet": parquet(NO_ROWS),
    "clickhouse-connect#118.json": b"[]",
    "bigquery-pandas#285.parquet": parquet(NO_ROWS, **dict.fromkeys(NO_ROWS, "float64")),
}


def exit_status(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    """Return the exit status of the command."""
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["predict", *flags])
    try:
        runpy.run_module("ray_jobs.predict", run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def test_a_table_without_rows_gives_an_empty_result(
    user: UserData, predict_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(user)
    predicted(user, run, csv(plain_rows(2, **PRICES)), "full.csv")
    images, schema = (
        user.folder / "images/{key}.jpg",
        pq.read_table(user.folder / "out-full.csv").schema,
    )
    for source, content in EMPTY.items():
        data = user.folder / source.replace("#", "-")
        data.write_bytes(content)
        output = user.folder / f"out-{data.name}"
        status = exit_status(monkeypatch, run=run, data=data, images=images, output=output)
        assert (source, status) == (source, 0)
        table = pq.read_table(output)
        assert (table.num_rows, table.schema) == (0, schema)


def test_unknown_words_and_numbers_out_of_range_are_counted(
    user: UserData, predict_here: None
) -> None:
    """healthcareai-r#878: `notInTraining`. GeFs#6: a thousand warnings. pycaret#1060: wrong values
    were predicted without a word."""
    rows = plain_rows(8, without="label", **PRICES)
    odd = [row | ({"site": "notInTraining"} if i < 5 else {}) for i, row in enumerate(rows)]
    odd[0] |= {"site": "north", "weight": "-900"}
    odd[5:] = [row | {"size": "1e6", "price": "$1"} for row in odd[5:]]
    found, text = predicted(user, run_of(user), csv(odd), "odd.csv")
    assert None not in found
    for note in ("site: 5 rows with an unknown word", "weight: 1 row outside the training range"):
        assert text.count(note) == 1
    for name in ("size", "price"):
        assert f"{name}: 3 rows outside the training range" in text


ABSENT: dict[str, tuple[dict[str, str], list[str], str]] = {
    "turicreate#933-unrelated": (
        {"size": "a", "weight": "b", "price": "c", "site": "d"},
        ["size'", "weight'", "price'", "site'"],
        "(it has: key, a, b, c, d)",
    ),
    "LightGBM#2396-one": ({"weight": ""}, ["weight'"], "(it has: key, size, price, site)"),
    "machinelearning#4848-digit": ({"size": "size1"}, ["size'; did you mean 'size1'"], ""),
    "orange3#6005-near-another-input": ({"size": "Sise"}, ["size'; did you mean 'Sise'"], ""),
    "orange3#6005-other-names": (
        {"size": "SIZE", "price": "unit price"},
        ["size'; did you mean 'SIZE'", "price'"],
        "unit price",
    ),
}


def test_all_missing_columns_are_named_with_their_nearest(user: UserData) -> None:
    run, rows = run_of(user), plain_rows(8, without="label", **PRICES)
    for source, (renamed, absent, has) in ABSENT.items():
        other = [
            {renamed.get(k, k): v for k, v in row.items() if renamed.get(k, k)} for row in rows
        ]
        with pytest.raises(JobError) as error:
            predicted(user, run, csv(other), "absent.csv")
        for note in (*(f"the table has no column '{name}" for name in absent), has):
            assert note in str(error.value), source
