"""Tables as people have them: CSV dialects, encodings, wrong suffixes, many files.

Each input comes from the public thread in its parameter id.
"""

import gzip
import io
import json
import re
import zipfile
from typing import Any

import openpyxl
import pandas as pd
import pytest

from tests.ray_jobs.inputs.user_data import UserData, csv_text, plain_rows, roles, values

Named = tuple[str, bytes]


def german() -> bytes:
    """Decimal commas, and dots between thousands in some rows only."""
    rows = plain_rows()
    for row in rows:
        row["size"] = row["size"].replace(".", ",")
        row["weight"] = f"{int(row['weight']):,}".replace(",", ".") + ",00"
    return csv_text(rows, delimiter=";").encode()


def with_text(text: str, **dialect: Any) -> str:
    return csv_text(plain_rows(note=lambda i: text if i % 5 == 0 else "fine"), **dialect)


def trailing_commas() -> str:
    head, *lines = csv_text(plain_rows()).splitlines()
    return "\n".join([head, *(line + "," for line in lines)]) + "\n"


def zipped(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, content)
        archive.writestr("__MACOSX/._" + name, b"\0\5\x16\7")
    return stream.getvalue()


def sheet(title: str | None = None) -> bytes:
    book = openpyxl.Workbook()
    page = book.active
    assert page is not None
    if title:
        page.append([title])
        page.merge_cells("A1:D1")
    page.append(["key", "size", "weight", "label"])
    for row in plain_rows():
        page.append([row["key"], float(row["size"]), int(row["weight"]), row["label"]])
    stream = io.BytesIO()
    book.save(stream)
    return stream.getvalue()


def parquet(index: bool) -> bytes:
    frame = pd.DataFrame(plain_rows()).astype({"size": float, "weight": int})
    if index:
        frame = frame.sample(frac=1, random_state=0)
    stream = io.BytesIO()
    frame.to_parquet(stream)
    return stream.getvalue()


PLAIN = csv_text(plain_rows())
SPACED = PLAIN.replace("key,", "key, ").replace(",yes", ', "yes, sure"').replace(",no", ', "no"')

SAME: dict[str, Named] = {
    "pandas#4623-comments-before-the-header": ("table.csv", ("# a,b,c,d\n# notes\n" + PLAIN).encode()),
    "csvtk#13-sep-line": ("table.csv", ("sep=,\n" + PLAIN).encode()),
    "vscode_rainbow_csv#108-sep-pipe": (
        "table.csv",
        ("sep=|\r\n" + PLAIN.replace(",", "|").replace("\n", "\r\n")).encode(),
    ),
    "pandas#4793-bom-and-quoted-header": (
        "table.csv",
        csv_text(plain_rows(), quoting=1).encode("utf-8-sig"),
    ),
    "pandas#26446-utf-16-tabs": ("table.csv", PLAIN.replace(",", "\t").encode("utf-16")),
    "openclean-core#67-utf-16-no-bom": ("table.csv", PLAIN.encode("utf-16-le")),
    "csvdedupe#94-windows-quotes": (
        "table.csv",
        with_text("the patient\u2019s \u2013 left").encode("cp1252"),
    ),
    "python-unicodecsv#31-one-bad-line": (
        "table.csv",
        csv_text(plain_rows(note=lambda i: "K\xf6ln" if i == 30 else "")).encode("latin-1"),
    ),
    "pycytominer#95-gzip-named-csv": ("table.csv", gzip.compress(PLAIN.encode())),
    "duckdb-zipfs#50-zip-with-other-suffix": ("table.wpp", zipped("x.csv", PLAIN.encode())),
    "pyexcel-io#74-utf-32-in-zip": ("table.zip", zipped("x.csv", PLAIN.encode("utf-32"))),
    "pandas#8200-xlsx-named-csv": ("table.csv", sheet()),
    "turicreate#907-newline-in-quotes": ("table.csv", with_text("this is\nnot fine!").encode()),
    "agent-os#1218-unicode-line-separators": (
        "table.csv",
        with_text("a\u2028b\x85c\x0bd\x1ce").encode(),
    ),
    "cpython#119123-lists-in-cells": (
        "table.csv",
        with_text("['112', '112']", delimiter=";").encode(),
    ),
    "cpython#88843-words-with-spaces": (
        "table.csv",
        with_text("to be or not to be", delimiter="|").encode(),
    ),
    "tabview#150-long-cell": ("table.csv", with_text("x" * 200_000).encode()),
    "pandas#14124-delimiter-after-each-row": ("table.csv", trailing_commas().encode()),
    "milvus#33197-parquet-with-pandas-index": ("table.parquet", parquet(index=True)),
    "pandas#51664-parquet-named-csv": ("table.csv", parquet(index=False)),
    "spectrochempy#1263-blank-lines-before-header": ("table.csv", ("\n\n" + PLAIN).encode()),
    "json-lines-named-json": (
        "table.json",
        "\n".join(json.dumps(row) for row in plain_rows()).encode(),
    ),
}


@pytest.mark.parametrize(("name", "content"), SAME.values(), ids=SAME)
def test_a_table_reads_like_the_plain_one(user: UserData, name: str, content: bytes) -> None:
    expected = values(user.look(PLAIN, positive_label=["yes"]))
    manifest = user.look(content, name, positive_label=["yes"])
    assert values(manifest) == expected
    assert {"size": "number", "weight": "number"}.items() <= roles(manifest).items()


def test_dots_between_thousands_are_proposed_as_a_rule(user: UserData) -> None:
    """pandas#59299 and polars#18797: `1.234,56` beside `900,00`."""
    expected = values(user.look(PLAIN))
    user.look(german())
    assert "weight (text such as '900,00'; decimal_comma reads 36 of 36 cells)" in user.text
    assert "--prepare.number_rules '{weight: decimal_comma}'" in user.text
    assert values(user.look(german(), number_rules={"weight": "decimal_comma"})) == expected


@pytest.mark.xfail(strict=True, reason="advises quotes for cells that are in quotes")
def test_a_blank_before_a_quote_is_named_if_it_splits_a_cell(user: UserData) -> None:
    """CLARIAH/COW#59: `0, "a, b"`."""
    text = user.refusal(PLAIN.replace(",yes", ', "yes, sure"'))
    assert "put cells with delimiters in quotes" not in text


@pytest.mark.parametrize("marker", ["_SUCCESS", "._SUCCESS.crc", ".DS_Store"])
@pytest.mark.parametrize(
    "suffix",
    [
        "-c000.csv",
        pytest.param("", marks=pytest.mark.xfail(strict=True, reason="files need a suffix")),
    ],
)
def test_the_folder_that_spark_writes_is_one_table(
    user: UserData, marker: str, suffix: str
) -> None:
    """spark-csv#63, without suffix; datasette-parquet#15; spark-csv#348: a part without rows."""
    head, *lines = PLAIN.splitlines(keepends=True)
    folder = user.folder / "cars.csv"
    folder.mkdir()
    for part, some in enumerate([lines[:20], [], lines[20:]]):
        (folder / f"part-0000{part}{suffix}").write_text(head + "".join(some))
    (folder / marker).write_bytes(b"")
    expected = values(user.look(PLAIN))
    assert values(user.look(PLAIN, table=f"{folder}/part-*")) == expected
    assert values(user.look(PLAIN, table=str(folder))) == expected


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "pandas#8200-html-named-xls": (
        "table.xls",
        b"<html><body><table><tr><th>key</th></tr></table></body></html>",
        r"(?i)web page",
    ),
    "pandas#53035-one-column": ("table.csv", b"name\nanna\nmary\n", r"it has: name"),
    "pandas#4623-comment-between-rows": (
        "table.csv",
        PLAIN.replace("\n", "\n# more, notes\n", 1).encode(),
        r"line 2 .*'# more, notes'",
    ),
    "pandas#38830-delimiter-after-some-rows": (
        "table.csv",
        trailing_commas().replace(",\n", "\n", 9).encode(),
        r"line 11 has 5 cells",
    ),
    "readxl#383-title-in-merged-cells": ("table.xlsx", sheet("Survey"), "rows above the header"),
    "ragflow#16881-open-quote": ("table.csv", (PLAIN + 'k99,"1,2,no\n').encode(), "line 38|quote"),
    "no-rows": ("table.csv", b"key,size,label\n", r"(?i)no rows|0 rows|empty"),
}


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_an_unreadable_table_is_named_with_its_trouble(
    user: UserData, name: str, content: bytes, message: str
) -> None:
    text = user.refusal(content, name)
    assert re.search(message, text), text
    assert "max_bad_fraction" not in text
