"""What `prepare` and `predict` understand of a table does not depend on its file format."""

import csv
import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.prepare.columns import find_columns
from ray_jobs.prepare.labels import find_classes
from ray_jobs.prepare.row_validation import read_rows
from ray_jobs.prepare.sources.source import Source
from ray_jobs.prepare.table_files import open_table

NUM_ROWS = 24
FORMATS = ("comma.csv", "semicolon.csv", "table.parquet", "table.xlsx", "table.jsonl")

Columns = dict[str, list[Any]]


def cells(*values: Any) -> st.SearchStrategy[list[Any]]:
    """A column of these values."""
    return st.lists(st.sampled_from(values), min_size=NUM_ROWS, max_size=NUM_ROWS)


def numbers(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """A column of numbers, some of which are missing."""
    return st.lists(st.one_of(st.none(), values), min_size=NUM_ROWS, max_size=NUM_ROWS)


FEATURES = st.one_of(
    numbers(st.integers(-(10**9), 10**9)),
    numbers(st.floats(-1e6, 1e6, width=32).map(float)),
    numbers(st.integers(-50, 50).map(float)),
    cells(True, False),
    cells(True, False, None),
    cells("yes", "No", "YES", None),
    cells("red", "blue", " red", "dark\u00a0green", "Gr\u00fcn", "Gru\u0308n", "NA", "null", None),
    cells("01234", "00501", "90210"),
    cells("1", "2", "A"),
    cells("$1,234", "$99", "($5)", None),
    cells("1,850 sqft", "920 sqft"),
    cells("3%", "4.5%", None),
    cells("20-30", "30-40", "50+"),
    cells(*(datetime(2020, 1, 31) + timedelta(days=40 * i) for i in range(5)), None),
    cells("seen once", "a; b", 'say "hi"', "two, three", None),
)
KEYS = st.sampled_from(
    [
        [*range(100, 100 + NUM_ROWS)],
        [f"{i:04d}" for i in range(NUM_ROWS)],
        [f"k{i}" for i in range(NUM_ROWS)],
    ]
)
LABELS = st.sampled_from([(0, 1), (False, True), ("no", "yes"), (0.0, 1.0)])


@st.composite
def tables(draw: st.DrawFn) -> Columns:
    features = draw(st.lists(FEATURES, min_size=1, max_size=6))
    words = draw(LABELS)
    columns = {"key": draw(KEYS), "label": [words[i % 2] for i in range(NUM_ROWS)]}
    return columns | {f"feature {i}": column for i, column in enumerate(features)}


def write(path: Path, columns: Columns) -> None:
    """Write a table as pandas or Excel would."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        pq.write_table(
            pa.table({n: pa.array(c, from_pandas=True) for n, c in columns.items()}), path
        )
    elif path.suffix == ".xlsx":
        book = openpyxl.Workbook()
        assert book.active is not None
        book.active.append(list(columns))
        for row in rows:
            book.active.append(list(row.values()))
        book.save(path)
    elif path.suffix == ".jsonl":
        lines = [{n: str(v) if isinstance(v, datetime) else v for n, v in r.items()} for r in rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        is_german = path.name == "semicolon.csv"

        def text(value: Any) -> str:
            written = "" if value is None else str(value)
            return written.replace(".", ",") if is_german and isinstance(value, float) else written

        with path.open("w", newline="", encoding="utf-16" if is_german else "utf-8-sig") as file:
            writer = csv.writer(file, delimiter=";" if is_german else ",")
            writer.writerow(columns)
            writer.writerows([text(value) for value in row.values()] for row in rows)


def understood(path: Path, spec: PrepareSpec) -> tuple[Any, ...]:
    """Return the columns' roles and rules, and the model's inputs, keys and labels."""
    table = open_table(str(path)).table
    label = table.column("label")
    classes = find_classes(label, spec)
    try:
        columns = find_columns(table, spec, (), classes.codes_of(label))
    except JobError as error:
        # No column is left to learn from.
        return (str(error),)
    numeric = [c.name for c in columns if c.role == "number"]
    words = [c.name for c in columns if c.role == "category"]
    rules = {c.name: c.rule for c in columns if c.role == "number" and c.rule}
    spec = spec.model_copy(update={"number_rules": rules})
    rows = read_rows(Source(table, {}, {}), spec, numeric, classes, words)
    return (
        [(c.name, c.role, c.rule, c.proposed) for c in columns],
        rows.numeric_RF.tobytes(),
        {name: texts.to_pylist() for name, texts in rows.categories.items()},
        rows.keys.to_pylist(),
        rows.labels.tolist(),
        sorted((row, reason) for row, (reason, _) in rows.quarantined.items()),
    )


def check(folder: Path, columns: Columns) -> None:
    found = []
    for name in FORMATS:
        write(folder / name, columns)
        found.append(understood(folder / name, PrepareSpec(columns="auto")))
    for name, other in zip(FORMATS, found, strict=True):
        assert other == found[0], name


@pytest.mark.parametrize("num_tables", [30, pytest.param(500, marks=pytest.mark.slow)])
def test_a_table_gives_the_same_roles_and_inputs_in_every_format(tmp_path, num_tables):
    suppressed = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=num_tables, deadline=None, suppress_health_check=suppressed)
    @given(tables())
    def check_table(columns: Columns) -> None:
        check(tmp_path, columns)

    check_table()
