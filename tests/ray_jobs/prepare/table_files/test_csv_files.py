"""Inputs of public threads, each shortened to a few rows."""

import pyarrow as pa
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.table_files import TableFile, open_table


def notes_of(opened: TableFile) -> tuple[str, ...]:
    assert all(note.startswith("table: ") for note in opened.notes)
    return tuple(note.removeprefix("table: ") for note in opened.notes)


def read(tmp_path, content, encoding="utf-8", name="table.csv"):
    content = content if isinstance(content, bytes) else content.encode(encoding)
    (tmp_path / name).write_bytes(content)
    return open_table(str(tmp_path / name))


def cells(table: pa.Table) -> dict[str, list]:
    return {name: table.column(name).to_pylist() for name in table.column_names}


DIALECTS = {
    "SheetJS/sheetjs#2239": (
        "A;B;C;D\n1,1;2,2;3,3;4,1\n1,1;2,2;3,3;4,1\n",
        {"A": ["1.1"] * 2, "B": ["2.2"] * 2, "C": ["3.3"] * 2, "D": ["4.1"] * 2},
        ("';' between cells", "decimal commas in A, B, C, D"),
    ),
    "python/cpython#119123": (
        "id;a;b;cost;group\n1;;;62.25;['345']\n4;;;46.50;['112', '112']\n",
        {"id": ["1", "4"], "a": ["", ""], "b": ["", ""], "cost": ["62.25", "46.50"],
         "group": ["['345']", "['112', '112']"]},
        ("';' between cells",),
    ),
    "bis-med-it/pysdmx#460": (
        "STRUCTURE,freq,value\nESTAT:A|B|C,M: Monthly|x,1\nESTAT:A|B|C,Q: Quarterly|x,2\n",
        {"STRUCTURE": ["ESTAT:A|B|C"] * 2, "freq": ["M: Monthly|x", "Q: Quarterly|x"],
         "value": ["1", "2"]},
        (),
    ),
    "lifelike/countersheetsextension#3": (
        "key,note\n1,a; b\n2,c; d\n", {"key": ["1", "2"], "note": ["a; b", "c; d"]}, (),
    ),
    "pandas-dev/pandas#14124": (
        "A,B,C\n1,4,7,\n2,5,8,\n", {"A": ["1", "2"], "B": ["4", "5"], "C": ["7", "8"]},
        ("dropped 1 empty column without a name",),
    ),
    "pandas-dev/pandas#41304": (
        '"Время";"T"\r\n"04.05.2021 09:00";"9.8";\r\n',
        {"Время": ["04.05.2021 09:00"], "T": ["9.8"]},
        ("';' between cells", "dropped 1 empty column without a name"),
    ),
    "apache/arrow#26743": (
        "a|b|\n1|2|\n", {"a": ["1"], "b": ["2"]},
        ("'|' between cells", "dropped 1 empty column without a name"),
    ),
    "R write.table": (
        '"a","label"\n"1",5,"x"\n"2",6,"y"\n',
        {"": ["1", "2"], "a": ["5", "6"], "label": ["x", "y"]},
        ("the first column has no name, but row numbers",),
    ),
    "Excel": (
        "\ufeffsep=;\r\n;;\r\nkey;size (w, h)\r\n1;2,5\r\n2;\r\n;\r\n;\r\n",
        {"key": ["1", "2"], "size (w, h)": ["2.5", ""]},
        ("';' between cells", "skipped 2 empty rows", "decimal commas in size (w, h)"),
    ),
    "comments": (
        "# made on Monday, by me\n#\n\nkey,a\n1,2\n", {"key": ["1"], "a": ["2"]},
        ("skipped comments before the header",),
    ),
    "#CHROM": ("#CHROM\tPOS\n1\t2\n", {"#CHROM": ["1"], "POS": ["2"]}, ("tabs between cells",)),
    "#": ("#,key\n1,a\n", {"#": ["1"], "key": ["a"]}, ()),
    "zero byte": ("key,a\n1,x\0y\n", {"key": ["1"], "a": ["x\0y"]}, ()),
    "CR": ('key,a\r1,"x\ry"\r', {"key": ["1"], "a": ["x\ry"]}, ()),
    "quotes": (
        'key,a\n1,"say ""a,b;c"""\n2,5" pipe\n3,""\n', {"key": ["1", "2", "3"],
        "a": ['say "a,b;c"', '5" pipe', ""]}, (),
    ),
    "blank lines": ("\n\nkey,a\n1,2\n\n   \n3,4\n", {"key": ["1", "3"], "a": ["2", "4"]}, ()),
}  # fmt: skip


@pytest.mark.parametrize("thread", DIALECTS)
def test_a_csv_in_a_common_dialect_is_read_with_notes(tmp_path, thread):
    content, expected, notes = DIALECTS[thread]
    opened = read(tmp_path, content)
    assert cells(opened.table) == expected
    assert notes_of(opened) == notes


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (["1,5", "2", "", "NA", "−0,25", "1,234"], ["1.5", "2", "", "NA", "−0.25", "1.234"]),
        (["0,125", "1,250"], ["0.125", "1.250"]),
        (["1,5", "unknown", "2"], ["1.5", "unknown", "2"]),
        (["1,5e3", ",5"], ["1.5e3", ".5"]),
        # Thousands, lists, mixed marks and words stay as they are.
        (["1,234", "20,500", "7"], None),
        (["1,234", "20,500,000"], None),
        (["1,234.50", "1,5"], None),
        (["1,5", "2.5"], None),
        (["1,2", "1,2,3"], None),
        (["1,5", "a", "b"], None),
        ([*["1,234"] * 99, "1,23"], None),
        (["a,b", "1,5"], None),
    ],
)
def test_decimal_commas_become_points_only_where_they_are_clear(tmp_path, column, expected):
    lines = [f'{i},"{cell}"' for i, cell in enumerate(column)]
    opened = read(tmp_path, "\n".join(["key,size", *lines]))
    assert cells(opened.table)["size"] == (expected or column)
    assert notes_of(opened) == (("decimal commas in size",) if expected else ())


ENCODINGS = [
    ("vividvilla/csvtotable#35", "utf-16", "Zürich", "read as UTF-16"),
    ("without mark", "utf-16-le", "Zürich", "read as UTF-16-LE"),
    ("without mark", "utf-16-be", "Zürich", "read as UTF-16-BE"),
    ("llSourcell/tensorflow_chatbot#17", "cp1252", "12–14 m² “Köln”", "cp1252, such as 'Köln'"),
    ("codeforbirmingham/Open-Disclosure#7", "cp1252", "O’Neill – Größe", "such as 'Größe'"),
    ("Latin-1", "latin-1", "Málaga, señor, 20 µm", "read as cp1252, such as 'Málaga'"),
    ("Spanish", "cp1252", "¿Dónde? ¡Aquí! 3º", "read as cp1252, such as 'Dónde'"),
    ("signs", "cp1252", "2×3 m • © Foo", "read as cp1252"),
    ("Cyrillic", "cp1251", "Новосибирск", "read as cp1251, such as 'Новосибирск'"),
    ("Japanese", "cp932", "東京都 大阪", "read as cp932"),
    ("Russian", "koi8_r", "Москва Казань", "read as koi8_r"),
    ("Greek", "cp1253", "Αθήνα Θεσσαλονίκη", "read as cp1253, such as 'Αθήνα'"),
    ("Polish", "cp1250", "Łódź Kraków gęślą jaźń", "read as cp1250, such as 'Łódź'"),
    ("Turkish", "cp1254", "İstanbul Şişli ağrı", "read as cp1254"),
    ("DOS", "cp850", "Zürich Málaga Café", "read as cp850"),
    ("Chinese", "big5", "台北 高雄 台灣", "read as big5"),
    ("Chinese", "gb18030", "广州市 中国人", "read as gb18030"),
    ("Korean", "cp949", "서울 부산", "read as cp949"),
]  # fmt: skip


@pytest.mark.parametrize(("thread", "encoding", "word", "note"), ENCODINGS)
@pytest.mark.parametrize("num_ascii", [0, 200_000])
def test_an_encoding_is_recognised_also_after_a_long_beginning(
    tmp_path, thread, encoding, word, note, num_ascii
):
    lines = ["key,town", *["1,Rome"] * num_ascii, f'2,"{word}"']
    opened = read(tmp_path, "\r\n".join(lines), encoding)
    assert cells(opened.table)["town"][-1] == word
    assert opened.table.num_rows == num_ascii + 1
    assert note in notes_of(opened)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"key,town\n1,K\xc3\xb6ln\n2,R\xf6mer\n", "line 3, character 4: invalid in utf-8"),
        (b"key,town\n1,R\xf6mer\n2,K\xc3\xb6ln\n3,D\xc3\xbcren\n", "line 2, character 4: invalid"),
        (b"\xef\xbb\xbfkey,town\n1,\xff\n", "line 2, character 3: invalid in utf-8"),
        ("key,a\n1,ä\n".encode("utf-16")[:-1], "invalid in utf-16"),
    ],
)
def test_invalid_bytes_raise_an_error_with_their_place(tmp_path, content, message):
    with pytest.raises(JobError, match=message) as error:
        read(tmp_path, content)
    assert str(error.value).isascii()
    assert "\\x" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n\n\"x\ny\",2\n1,2,3\n", "line 6 has 3 cells, but the header has 2 names"),
        ("a,b\n" + "1,2\n" * 300_000 + "1\n", "line 300,002 has 1 cell, "),
        ("a,b\n1,2,3\n", "line 2 has 3 cells"),
        ("a,b\nx,2,3\ny,3,4\n", "line 2 has 3 cells"),
        ("DecisionM,freq\n0, 5, \n0, 6\n", "line 2 has 3 cells"),
        ("Report of 2024\nkey,a,label\n1,2,3\n", "delete lines above the header"),
        ("a,b\n1," + "x" * 99 + ",3,4\n", "x…'"),
        ('a,b\n1,"2\n3,4\n5,6\n', "a quote is not closed"),
        ("a,b\n1,2\n,,\n1\n", "line 4 has 1 cell"),
        ("a,b\n1," + "x" * 200_000 + "\n2\n", "line 3 has 1 cell"),
        ('a,"b\n1,2\n3,4\n', "a quote is not closed"),
    ],
)  # fmt: skip
def test_a_ragged_row_raises_an_error_with_its_line(tmp_path, content, message):
    """`DecisionM` is of pandas-dev/pandas#9295."""
    with pytest.raises(JobError, match=message) as error:
        read(tmp_path, content)
    assert len(str(error.value)) < 500


def test_a_closed_quote_may_end_the_file(tmp_path):
    table = read(tmp_path, 'a,b\n1,"two\nlines, at least"').table
    assert cells(table) == {"a": ["1"], "b": ["two\nlines, at least"]}
    table = read(tmp_path, "\ufeffa,b\n" + '1,"two\nlines"\n' * 99, "utf-16-be").table
    assert cells(table)["b"] == ["two\nlines"] * 99
    assert read(tmp_path, 'a,"b\nc"\n').table.column_names == ["a", "b\nc"]


def test_a_cell_may_be_longer_than_a_block_and_columns_may_be_thousands(tmp_path):
    """As in huggingface/datasets#2181 and apache/arrow#34578."""
    long = "x" * 3_000_000
    assert cells(read(tmp_path, f"a,b\n1,{long}\n2,y\n").table)["b"] == [long, "y"]
    names = [f"c{i}" for i in range(5000)]
    table = read(tmp_path, "\n".join(",".join(row) for row in (names, ["1"] * 5000))).table
    assert table.column_names == names


@pytest.mark.parametrize("content", ["key,label\n", "key,label", "key;label\r\n\r\n"])
def test_a_file_of_only_a_header_is_a_table_without_rows(tmp_path, content):
    table = read(tmp_path, content).table
    assert table.num_rows == 0
    assert table.column_names == ["key", "label"]
