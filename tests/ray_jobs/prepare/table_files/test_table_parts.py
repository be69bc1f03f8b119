import bz2
import gzip
import io
import json
import lzma
import zipfile
from datetime import datetime
from decimal import Decimal

import openpyxl
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.cell_text import column_text
from ray_jobs.prepare.table_files import TableFile, open_table

CSV = b"key,label\n1,0\n2,1\n"
ROWS = {"key": ["1", "2"], "label": ["0", "1"]}


def zipped(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return stream.getvalue()


def compressed(codec: str) -> bytes:
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, codec) as writer:
        writer.write(CSV)
    return stream.getvalue().to_pybytes()


def parquet(table: pa.Table) -> bytes:
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream)
    return stream.getvalue().to_pybytes()


def xlsx(sheets: dict[str, list[list]]) -> bytes:
    book = openpyxl.Workbook()
    del book["Sheet"]
    for name, rows in sheets.items():
        sheet = book.create_sheet(name.strip("-"))
        sheet.sheet_state = "hidden" if name.startswith("-") else "visible"
        for row in rows:
            sheet.append(row)
    stream = io.BytesIO()
    book.save(stream)
    return stream.getvalue()


def notes_of(opened: TableFile) -> tuple[str, ...]:
    assert all(note.startswith("table: ") for note in opened.notes)
    return tuple(note.removeprefix("table: ") for note in opened.notes)


def read(tmp_path, content: bytes, name="table.csv"):
    (tmp_path / name).write_bytes(content)
    return open_table(str(tmp_path / name))


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(CSV), gzip.compress(CSV[:9]) + gzip.compress(CSV[9:]), bz2.compress(CSV),
        lzma.compress(CSV), compressed("zstd"), compressed("lz4"), zipped(a__csv=CSV),
        zipped(__MACOSX=b"x", a__csv=CSV, readme__md=b"x"), zipped(a__csv=gzip.compress(CSV)),
        parquet(pa.table(ROWS)), gzip.compress(parquet(pa.table(ROWS))),
        xlsx({"one": [["key", "label"], ["1", "0"], ["2", "1"]]}),
        b'{"key": "1", "label": "0"}\n{"key": "2", "label": "1"}\n',
        b'[{"key": "1", "label": "0"},\n {"key": "2", "label": "1"}]',
        '[{"key": "1", "label": "0"},{"key": "2", "label": "1"}]'.encode("utf-16"),
    ],
    ids=[
        "gzip", "gzip members", "bzip2", "xz", "zstd", "lz4", "zip", "zip with litter",
        "gzip in zip", "parquet", "parquet in gzip", "xlsx", "json lines", "json", "json in utf-16",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz", "table"])
def test_a_file_is_recognised_by_its_bytes_whatever_its_name(tmp_path, content, name):
    assert read(tmp_path, content, name).table.to_pydict() == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:c3\nsize 4\n",
            "Git LFS pointer.*git lfs pull", id="benedekrozemberczki/datasets#10",
        ),
        (b"\n<!DOCTYPE html><html>Log in</html>", "web page .*download the file itself"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "web page or XML"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), r"Excel workbook; save it as \.xlsx"),
        (b"x" * 257 + b"ustar\0", "an archive; unpack it"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "invalid in utf-8; .* or export the table as CSV"),
        (zipped(a__csv=CSV, b__csv=CSV), r"one table, but .* a\.csv, b\.csv"),
        (zipped(mimetype=b"x", content__xml=b"x"), r"document of mimetype, content\.xml"),
        pytest.param(gzip.compress(CSV)[:-9], "could not be read", id="truncated gzip"),
        pytest.param(zipped(a__csv=CSV)[:-9], "could not be read", id="truncated zip"),
        (b"PAR1 and no more", "could not be read"),
        (b'{"a": 1}\n[', "line 2: .*one JSON object per line"),
        (b'[{"a": 1}, 2]', "line 1: not an object"),
        (xlsx({"s": [["a"], [1, 2]]}), "row 2 of sheet 's' has 2 cells, but the header has 1"),
        (xlsx({"s": []}), "could not be read: it is empty"),
        (b"key,a,a\n1,2,3\n", "more than one column named 'a': columns 2 and 3"),
        (b"key,a,a \n1,2,3\n", "more than one column named 'a': columns 2 and 3"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table_raises_an_error_with_a_remedy(tmp_path, content, message):
    with pytest.raises(JobError, match=message):
        read(tmp_path, content)


@pytest.mark.parametrize("header", ["PARENT_ID", "FEA1", "x" * 256 + "mustard"])
def test_a_header_may_begin_or_continue_as_other_formats_do(tmp_path, header):
    assert read(tmp_path, f"{header},label\na,1\n".encode()).table.to_pydict() == {
        header: ["a"],
        "label": ["1"],
    }


def test_empty_names_become_an_empty_name_and_positions(tmp_path):
    opened = read(tmp_path, b",key,,\n0,a,1,\n1,b,2,\n")
    assert opened.table.column_names == ["", "key", "column 3"]
    assert notes_of(opened) == ("dropped 1 empty column without a name",)


def test_a_sheet_is_read_with_its_types_and_an_unlike_sheet_is_named(tmp_path):
    rows = [
        [None, None, None, None, None], ["key", "when", "size", "ok", "bmi"],
        [7, datetime(2024, 1, 2), 1.5, True, None], [], [8, datetime(2024, 1, 3), 2, False, None],
    ]  # fmt: skip
    opened = read(tmp_path, xlsx({"-notes": [["x"]], "empty": [], "data": rows}))
    assert opened.table.to_pylist() == [
        {"key": 7, "when": datetime(2024, 1, 2), "size": 1.5, "ok": True, "bmi": None},
        {"key": 8, "when": datetime(2024, 1, 3), "size": 2.0, "ok": False, "bmi": None},
    ]
    sheet, formulas = notes_of(opened)
    assert sheet == "sheet 'data' of 3"
    assert formulas.startswith("no values in bmi; if these are formulas")


def test_wrong_dimensions_of_a_sheet_hide_no_cells(tmp_path):
    """As in wireservice/agate-excel#22 and langgenius/dify#1039."""
    content = xlsx({"s": [["key", "label"], ["1", "0"], ["2", "1"]]})
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            if name.startswith("xl/worksheets/"):
                assert b'ref="A1:B3"' in part
                part = part.replace(b'ref="A1:B3"', b'ref="A1"')
            new.writestr(name, part)
    assert read(tmp_path, stream.getvalue()).table.to_pydict() == ROWS


def test_parquet_keeps_its_types_and_names_the_columns_that_it_leaves_out(tmp_path):
    frame = pd.DataFrame({"town": pd.Categorical(["a", "b"])}, index=["x", "y"])
    table = pa.Table.from_pandas(frame).append_column("exact", pa.array([Decimal("1.5"), None]))
    table = table.append_column("list", pa.array([[1], [2]])).append_column(
        "png", pa.array([b"", b""])
    )
    opened = read(tmp_path, parquet(table))
    assert opened.table.schema.names == ["town", "__index_level_0__", "exact"]
    assert opened.table.schema.types == pq.read_table(tmp_path / "table.csv").schema.types[:3]
    assert notes_of(opened) == ("left out lists, objects and bytes: list, png",)


def test_lists_of_words_are_one_text_in_json_and_parquet(tmp_path):
    rows = {"path": [["a.jpg", "b.jpg"], [], None], "label": [0, 1, 1]}
    records = [dict(zip(rows, cells, strict=True)) for cells in zip(*rows.values(), strict=True)]
    for content, name in ((json.dumps(records).encode(), "t.json"), (parquet(pa.table(rows)), "t")):
        table = read(tmp_path, content, name).table
        assert column_text(table.column("path")).to_pylist() == ["a.jpg;b.jpg", None, None]


def test_json_columns_of_lists_are_left_out_with_a_note(tmp_path):
    opened = read(tmp_path, json.dumps([{"a": 1, "b": [1]}, {"a": 2.5}]).encode(), "t.json")
    assert opened.table.to_pydict() == {"a": [1.0, 2.5]}
    assert notes_of(opened) == ("left out lists, objects and bytes: b",)
    assert read(tmp_path, b'{"a": 1}', "t.jsonl").table.num_rows == 1


@pytest.mark.parametrize("location", ["", "/", "/part-*.csv", "/part-{0..1}.csv"])
def test_the_files_of_a_folder_or_glob_are_one_table(tmp_path, location):
    (tmp_path / "part-0.csv").write_text("key;size\na;1,234\n")
    (tmp_path / "part-1.csv").write_text('size,key\n2,b\n"0,5",c\n')
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / ".part-0.csv.crc").touch()
    (tmp_path / "README.md").touch()
    opened = open_table(f"{tmp_path}{location}")
    assert opened.table.to_pydict() == {"key": ["a", "b", "c"], "size": ["1.234", "2", "0.5"]}
    assert notes_of(opened) == ("2 parts", "';' between cells", "decimal commas in size")


def test_a_table_that_does_not_exist_raises_an_error_with_a_name_beside_it(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "tables.csv").touch()
    with pytest.raises(JobError, match=r"table\.csv does not exist$"):
        open_table(f"{tmp_path}/table.csv")
    (tmp_path / "tabel.csv").touch()
    with pytest.raises(JobError, match=r"does not exist; did you mean 'tabel\.csv'\?"):
        open_table(f"{tmp_path}/table.csv")


def test_parts_with_other_columns_raise_an_error(tmp_path):
    (tmp_path / "test.csv").write_text("key,size\na,1\n")
    (tmp_path / "train.csv").write_text("key,size,label\na,1,1\n")
    with pytest.raises(JobError, match=r"test.csv and .*train.csv have .*: label only in one"):
        open_table(str(tmp_path))
    with pytest.raises(JobError, match="folder or glob without CSV, Parquet, JSON or Excel files"):
        open_table(f"{tmp_path}/*.txt")


def test_decimal_commas_of_a_column_with_a_rule_are_left_to_the_rule(tmp_path):
    (tmp_path / "t.csv").write_text("key;a;b\nx;1,25;1,25\ny;1,234;1,234\n")
    table, notes = open_table(str(tmp_path / "t.csv"), ruled=["b"])
    assert table.to_pydict() == {"key": ["x", "y"], "a": ["1.25", "1.234"], "b": ["1,25", "1,234"]}
    assert "table: decimal commas in a" in notes
