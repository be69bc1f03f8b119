"""Tables as people have them; the ids of the parameters are the public threads they come from."""

import gzip
import io
import json
import zipfile
from typing import Any

import pandas as pd
import pytest

from tests.ray_jobs.inputs.user_data import UserData, cases, csv_text, plain_rows, values

PLAIN = csv_text(plain_rows())
HEAD, *LINES = PLAIN.splitlines(keepends=True)
TRAILING = HEAD + "".join(line.replace("\n", ",\n") for line in LINES)


def with_text(text: str, delimiter: str = ",") -> str:
    return csv_text(plain_rows(note=lambda i: "fine" if i % 5 else text), delimiter=delimiter)


def zipped(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x.csv", content)
        archive.writestr("__MACOSX/._x.csv", b"\0\5\x16\7")
    return stream.getvalue()


def written(method: str, **options: Any) -> bytes:
    """Return what a method of a shuffled data frame writes."""
    frame = pd.DataFrame(plain_rows()).astype({"size": float, "weight": int})
    stream = io.BytesIO()
    getattr(frame.sample(frac=1, random_state=0), method)(stream, **options)
    return stream.getvalue()


SAME = {
    "pandas#4623-comments-before-the-header": ("t.csv", ("# a,b,c,d\n# notes\n" + PLAIN).encode()),
    "csvtk#13-sep-line-crlf": ("t.csv", ("sep=,\n" + PLAIN).replace("\n", "\r\n").encode()),
    "rainbow_csv#108-sep-pipe": ("t.csv", ("sep=|\n" + PLAIN).replace(",", "|").encode()),
    "pandas#4793-bom-and-quotes": ("t.csv", csv_text(plain_rows(), quoting=1).encode("utf-8-sig")),
    "pandas#26446-utf-16-tabs": ("t.csv", PLAIN.replace(",", "\t").encode("utf-16")),
    "openclean-core#67-utf-16-without-bom": ("t.csv", PLAIN.encode("utf-16-le")),
    "csvdedupe#94-windows-quotes": ("t.csv", with_text("patient\u2019s").encode("cp1252")),
    "unicodecsv#31-one-odd-line": ("t.csv", (PLAIN[:-1] + "\xa0\n").encode("latin-1")),
    "pycytominer#95-gzip-named-csv": ("t.csv", gzip.compress(PLAIN.encode())),
    "duckdb-zipfs#50-zip-with-other-suffix": ("t.wpp", zipped(PLAIN.encode())),
    "pyexcel-io#74-utf-32-in-zip": ("t.zip", zipped(PLAIN.encode("utf-32"))),
    "pandas#8200-xlsx-named-csv": ("t.csv", written("to_excel")),
    "turicreate#907-newline-in-quotes": ("t.csv", with_text("this is\nnot fine!").encode()),
    "agent-os#1218-unicode-line-ends": ("t.csv", with_text("a\u2028b\x85c\x0bd\x1ce").encode()),
    "cpython#119123-lists": ("t.csv", with_text("['112', '112']", ";").encode()),
    "cpython#88843-blanks": ("t.csv", with_text("to be or not to be", "|").encode()),
    "tabview#150-long-cell": ("t.csv", with_text("x" * 200_000).encode()),
    "pandas#14124-delimiter-after-rows": ("t.csv", TRAILING.encode()),
    "milvus#33197-pandas-index": ("t.parquet", written("to_parquet")),
    "spectrochempy#1263-blank-lines": ("t.csv", ("\n\n" + PLAIN).encode()),
    "datasets#4895-json-lines": ("t.json", "\n".join(map(json.dumps, plain_rows())).encode()),
}


@pytest.mark.parametrize(("name", "content"), cases(SAME))
def test_a_table_reads_like_the_plain_one(user: UserData, name: str, content: bytes) -> None:
    expected = values(user.look(PLAIN))
    assert values(user.look(content, name)) == expected


def test_dots_between_thousands_are_proposed_as_a_rule(user: UserData) -> None:
    """pandas#59299 and polars#18797: `1.234,56` beside `900,00`."""
    rows = plain_rows(size=lambda i: f"{i * 0.75 + 0.25}".replace(".", ","))
    for row in rows:
        row["weight"] = f"{int(row['weight']):,}".replace(",", ".") + ",00"
    german = csv_text(rows, delimiter=";")
    user.look(german)
    assert "--prepare.number_rules '{weight: decimal_comma}'" in user.text
    assert values(user.look(german, columns="auto")) == values(user.look(PLAIN))


PARTS = {"datasette-parquet#15": ("-c0.csv",), "spark-csv#63-no-suffix": ("",)}


@pytest.mark.parametrize("suffix", cases(PARTS))
def test_the_folder_that_spark_writes_is_a_table(user: UserData, suffix: str) -> None:
    """spark-csv#348: one part has only the header."""
    folder = user.folder / "cars.csv"
    folder.mkdir()
    for part, lines in enumerate([LINES[:20], [], LINES[20:]]):
        (folder / f"part-0000{part}{suffix}").write_text(HEAD + "".join(lines))
    for marker in ("_SUCCESS", "._SUCCESS.crc"):
        (folder / marker).write_bytes(b"")
    for table in (f"{folder}/part-*", str(folder)):
        assert values(user.look(PLAIN, table=table)) == values(user.look(PLAIN))


QUOTED = PLAIN.replace(",yes", ', "yes, sure"').encode()
COMMENT = (HEAD + "# more, notes\n" + PLAIN).encode()
REFUSED = {
    "pandas#8200-html": ("t.xls", b"<html><body><table><tr><th>key</th></tr></table>", "web page"),
    "pandas#53035-one-column": ("t.csv", b"name\nanna\nmary\n", "it has: name"),
    "pandas#4623-comment-between-rows": ("t.csv", COMMENT, "'# more, notes'"),
    "pandas#38830-some-delimiters": ("t.csv", (PLAIN + TRAILING).encode(), "line 39 has 5 cells"),
    "COW#59-quote-after-blank": ("t.csv", QUOTED, "blank"),
}


@pytest.mark.parametrize(("name", "content", "message"), cases(REFUSED))
def test_an_unreadable_table_is_refused_with_its_trouble(
    user: UserData, name: str, content: bytes, message: str
) -> None:
    assert message in user.refusal(content, name)
