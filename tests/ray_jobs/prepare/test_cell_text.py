import pyarrow as pa
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.cell_text import TEXT, column_text
from tests.ray_jobs.prepare.sources.samples import column


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ((1.0, None, 2.5, float("nan")), ["1", None, "2.5", None]),
        (("1.0", "2.0", None), ["1", "2", None]),
        (("1.0", "v2.0"), ["1.0", "v2.0"]),
        ((" a ", "", "007", "NA"), ["a", None, "007", "NA"]),
        ((10**17, None), ["100000000000000000", None]),
        ((True, None), ["true", None]),
    ],
)
def test_whole_numbers_have_no_point_and_empty_cells_are_null(cells, expected):
    assert column_text(column(*cells)).to_pylist() == expected


def test_columns_in_many_chunks_dictionaries_and_empty_columns_become_one_array():
    cells = column("x", "y", "x")
    for chunked in (cells, cells.dictionary_encode(), pa.chunked_array([*cells.chunks, ["z"]])):
        text = column_text(chunked)
        assert text.type == TEXT
        assert text.to_pylist() == chunked.to_pylist()
    assert column_text(column(1.5, 2.0).dictionary_encode()).to_pylist() == ["1.5", "2"]
    assert column_text(pa.chunked_array([], pa.string())).equals(pa.array([], TEXT))


@pytest.mark.slow
@pytest.mark.parametrize("encode", [False, True])
def test_a_column_of_more_than_2_gib_becomes_one_array(encode):
    words = pa.array(["x" * 2**20] * 300)
    chunks = [words.dictionary_encode() if encode else words] * 7
    text = column_text(pa.chunked_array(chunks))
    assert (text.type, len(text)) == (TEXT, 2100)
    assert text.nbytes > 2**31
    assert text[2099] == text[0]


def test_a_column_of_lists_cannot_be_text():
    with pytest.raises(JobError, match=r"a column of type list<.*cannot be read as text"):
        column_text(column([1], [2]))
