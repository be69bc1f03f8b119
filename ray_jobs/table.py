"""The table: CSV or Parquet → one row a thing, usable or with the reason why it is not.

Enters: a file by path or URI.  Leaves: `Rows`, column by column, in the table's order.

What concerns a whole column (it is missing, its classes are unclear) is an error; what concerns one
cell sets that row aside. Imports neither Ray nor TensorFlow.
"""

# pyarrow makes the functions of its compute module when it is imported, unseen by pyright.
# pyright: reportAttributeAccessIssue=false

import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv, fs

from mm_model.suggest import did_you_mean
from ray_jobs.batch import IMAGE, KEY, LABEL
from ray_jobs.cli import JobError
from ray_jobs.images import BadImage
from ray_jobs.sources.folder import ImageSource
from ray_jobs.spec import SPLITS, PrepareSpec, Split
from ray_jobs.storage import Folder

_MISSING_NUMBER = ("nan", "na", "n/a", "#n/a", "<na>", "null", "none", "-nan")
_MISSING_LABEL = ("nan", "na", "n/a", "<na>", "null")
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?$"
_INFINITY = r"^[+-]?inf(inity)?$"
_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Classes:
    """The two values of the label column, as text."""

    negative: str
    positive: str


@dataclass
class Rows:
    """The table's rows: lists of one length, and why a row is set aside."""

    keys: list[str | None]
    image_paths: list[str]
    numeric_RF: np.ndarray
    """float32, NaN where missing."""
    labels: list[int] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    splits: list[Split | None] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    """Why a row cannot be used, in one word; None for the rows that can be."""
    details: list[str] = field(default_factory=list)

    def set_aside(self, row: int, reason: str, detail: str) -> None:
        """Say why a row cannot be used; the first reason counts."""
        if self.reasons[row] is None:
            self.reasons[row], self.details[row] = reason, detail

    def find_images(self, source: ImageSource) -> None:
        """Replace each path by that of a file of the source; set aside the rows that have none."""
        for row, path in enumerate(self.image_paths):
            if self.reasons[row] is None:
                try:
                    self.image_paths[row] = source.find(path)
                except BadImage as error:
                    self.set_aside(row, error.reason, error.detail)


def read_table(location: str) -> pa.Table:
    """Return a CSV or Parquet file; the cells of a CSV stay text, since one may be no number.

    Raises:
        JobError: if there is no such file, it cannot be read, or it has no rows.
    """
    if not location:
        raise JobError("prepare.table is not set: give the path or URI of a CSV or Parquet file")
    parent, _, name = location.rpartition("/")
    folder = Folder(parent or ("/" if location.startswith("/") else "."))
    kind = folder.filesystem.get_file_info(folder.locate(name)).type
    if kind != fs.FileType.File:
        what = "is a folder" if kind == fs.FileType.Directory else "does not exist"
        near = [n.rpartition("/")[2] for n in folder.names()] if folder.is_local else []
        raise JobError(f"the table {location} {what}{did_you_mean(name, near)}")
    content = folder.read_bytes(name)
    try:
        table = _read_parquet(content) if content[:4] == b"PAR1" else _read_csv(content)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise JobError(f"the table {location} could not be read: {error}") from error
    table = table.rename_columns([column.strip() for column in table.column_names])
    doubled = [column for column, n in Counter(table.column_names).items() if n > 1]
    if doubled:
        raise JobError(f"the table {location} has more than one column named {doubled[0]!r}")
    if not table.num_rows:
        raise JobError(f"the table {location} has no rows")
    return table


def require_columns(table: pa.Table, spec: PrepareSpec, *, labelled: bool = True) -> None:
    """Check that every column that the spec names is there, and none has two roles.

    Raises:
        JobError: naming the setting, the column, the nearest match and the columns there are.
    """
    named: dict[str, Sequence[str | None]] = {
        "key_column": [spec.key_column],
        "image_column": [spec.image_column],
        "image_pattern": [] if spec.image_column else pattern_columns(spec),
        "numeric_columns": spec.numeric_columns or (),
    }
    if labelled:
        named |= {
            "label_column": [spec.label_column],
            "group_column": [spec.group_column],
            "split_column": [spec.split_column],
            "exclude_columns": spec.exclude_columns,
        }
    for setting, columns in named.items():
        for column in columns:
            if column is not None and column not in table.column_names:
                raise JobError(
                    f"prepare.{setting}: the table has no column {column!r}"
                    f"{did_you_mean(column, table.column_names)} "
                    f"(it has: {', '.join(table.column_names)})"
                )
    if spec.key_column == spec.label_column:
        raise JobError(f"{spec.key_column!r} cannot be both prepare.key_column and label_column")
    for column in spec.numeric_columns or ():
        for role in ("key_column", "label_column", "split_column"):
            if column == getattr(spec, role):
                raise JobError(
                    f"prepare.numeric_columns names {column!r}, the {role}; leave it out"
                )
        if column in spec.exclude_columns:
            raise JobError(f"prepare.numeric_columns and exclude_columns both name {column!r}")


def find_numeric_columns(table: pa.Table, spec: PrepareSpec) -> tuple[str, ...]:
    """Return the columns to learn from: those named, or all of numbers that have no other role.

    A column of a CSV is one of numbers if more than half of its filled cells are. So a few words
    among numbers set rows aside, and do not make the column disappear.

    Raises:
        JobError: if a name stands twice or is one of the shards' own, or no column is left.
    """
    columns = spec.numeric_columns
    if columns is None:
        columns = tuple(
            name
            for name in table.column_names
            if name not in _other_roles(spec) and _holds_numbers(table.column(name))
        )
        if not columns:
            raise JobError(
                "no column of numbers is left to learn from; name some in prepare.numeric_columns, "
                "or make it empty to learn from images alone"
            )
    for column in columns:
        if column in (KEY, IMAGE, LABEL):
            raise JobError(
                f"the numeric column {column!r} has the name of one of the shards' own columns; "
                "rename it in the table, or put it into prepare.exclude_columns"
            )
        if columns.count(column) > 1:
            raise JobError(f"prepare.numeric_columns names {column!r} twice")
    return columns


def find_classes(column: pa.ChunkedArray, spec: PrepareSpec) -> Classes:
    """Return the two classes of the label column.

    They are 0 and 1, false and true, or the positive label and the most frequent other value.
    Further values are tolerated, and their rows set aside, up to `max_bad_fraction`.

    Raises:
        JobError: if there is one class only, or it is unclear which two.
    """
    counts = Counter(text for text in _label_texts(column) if text is not None)
    name, seen = spec.label_column, _counted(counts)
    if not counts:
        raise JobError(f"the label column {name!r} is empty")
    positive = spec.positive_label if spec.positive_label is None else _label(spec.positive_label)
    pairs = [pair for pair in (("0", "1"), ("false", "true")) if set(pair) <= counts.keys()]
    if positive is not None:
        if positive not in counts:
            raise JobError(
                f"prepare.positive_label={spec.positive_label!r} does not occur in the label "
                f"column {name!r}{did_you_mean(positive, list(counts))} (it holds: {seen})"
            )
        others = sorted(counts.keys() - {positive}, key=lambda value: (-counts[value], value))
        classes = Classes(others[0] if others else "", positive)
    elif len(counts) == 1:
        raise JobError(
            f"the label column {name!r} holds one class only ({seen}); a model needs rows of two"
        )
    elif pairs:
        classes = Classes(*pairs[0])
    elif len(counts) == 2:
        raise JobError(
            f"the label column {name!r} holds {seen}; say which of them counts as 1, such as "
            f"--prepare.positive_label {min(counts)!r}"
        )
    else:
        raise JobError(
            f"the label column {name!r} holds {len(counts)} values ({seen}), a yes/no model needs "
            "two; choose another prepare.label_column, or set prepare.positive_label"
        )
    if not classes.negative:
        raise JobError(
            f"the label column {name!r} holds one class only ({seen}); a model needs rows of two"
        )
    strangers = len(column) - counts[classes.negative] - counts[classes.positive]
    known = sum(counts.values()) - counts[classes.negative] - counts[classes.positive]
    if known and strangers > spec.max_bad_fraction * len(column):
        raise JobError(
            f"the label column {name!r} holds {len(counts)} values ({seen}), a yes/no model needs "
            f"two; correct those other than {classes.negative!r} and {classes.positive!r}, or "
            f"raise prepare.max_bad_fraction={spec.max_bad_fraction:g} to set their rows aside"
        )
    return classes


def read_rows(
    table: pa.Table,
    spec: PrepareSpec,
    numeric_columns: Sequence[str],
    classes: Classes | None,
) -> Rows:
    """Return the rows of a table, those that cannot be used with their reason.

    Args:
        table: as `read_table` returns it, checked by `require_columns`.
        spec: the roles of the columns.
        numeric_columns: to read, in this order.
        classes: of the label; None leaves label, group and split unread, as for `predict`.
    """
    keys = texts_of(table.column(spec.key_column))
    num_rows = len(keys)
    rows = Rows(
        keys=keys,
        image_paths=[""] * num_rows,
        numeric_RF=np.empty((num_rows, len(numeric_columns)), np.float32),
        reasons=[None] * num_rows,
        details=[""] * num_rows,
    )
    _check_keys(rows, spec.key_column)
    if classes is not None:
        _read_labels(rows, table.column(spec.label_column), spec.label_column, classes)
        _read_groups_and_splits(rows, table, spec)
    for position, name in enumerate(numeric_columns):
        _read_numbers(rows, position, table.column(name), name)
    _read_image_paths(rows, table, spec)
    return rows


def pattern_columns(spec: PrepareSpec) -> list[str]:
    """Return the table's columns that the image pattern names.

    Raises:
        JobError: if a brace is not closed or holds no name, or no column is named.
    """
    names = _BRACES.findall(spec.image_pattern)
    if not names or not all(names) or set("{}") & set(_BRACES.sub("", spec.image_pattern)):
        raise JobError(
            f"prepare.image_pattern={spec.image_pattern!r} must name columns in braces, such as "
            "'{key}.jpg'"
        )
    return [_pattern_column(name, spec) for name in names]


def texts_of(column: pa.ChunkedArray) -> list[str | None]:
    """Return cells as text without spaces around it, whole numbers without `.0`, None if empty.

    Raises:
        JobError: if the column holds something that is no text, such as lists.
    """
    return _texts(column).to_pylist()


def numbers_of(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return cells as float64, NaN where one is missing or no number; and which are no number.

    Raises:
        JobError: if the column holds neither numbers nor text.
    """
    kind = column.type
    nothing = np.zeros(len(column), bool)
    if pa.types.is_boolean(kind):
        column = pc.cast(column, pa.int8())
    elif not _is_number(kind):
        return _parse(_texts(column))
    values = pc.cast(column, pa.float64(), safe=False)
    return np.asarray(values.to_numpy(), np.float64), nothing


def _read_parquet(content: bytes) -> pa.Table:
    file = pq.ParquetFile(io.BytesIO(content))
    # Tables that carry their own pictures, embeddings or the like need not be read whole.
    columns = [
        f.name
        for f in file.schema_arrow
        if not (pa.types.is_nested(f.type) or pa.types.is_binary(f.type))
    ]
    return file.read(columns=columns)


def _read_csv(content: bytes) -> pa.Table:
    if content[:2] == b"\x1f\x8b":
        content = pa.CompressedInputStream(pa.BufferReader(content), "gzip").read()
    if not content.strip():
        raise pa.ArrowInvalid("it is empty")
    delimiter = "\t" if b"\t" in content.split(b"\n", 1)[0] else ","
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with csv.open_csv(io.BytesIO(content), parse_options=parse) as reader:
        names = reader.schema.names
    convert = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    return csv.read_csv(io.BytesIO(content), parse_options=parse, convert_options=convert)


def _other_roles(spec: PrepareSpec) -> set[str]:
    roles = [spec.key_column, spec.label_column, spec.group_column, spec.split_column]
    paths = [spec.image_column] if spec.image_column else pattern_columns(spec)
    return {role for role in [*roles, *paths, *spec.exclude_columns] if role is not None}


def _pattern_column(name: str, spec: PrepareSpec) -> str:
    return spec.key_column if name == "key" else name


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)


def _holds_numbers(column: pa.ChunkedArray) -> bool:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return _is_number(column.type) or pa.types.is_boolean(column.type)
    values, is_text = numbers_of(column)
    return int((~np.isnan(values)).sum()) > int(is_text.sum())


def _texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    if pa.types.is_floating(column.type):
        column = pa.chunked_array([pa.array(column.to_pylist(), pa.float64(), from_pandas=True)])
        whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**63))
        integers = pc.cast(pc.cast(pc.if_else(whole, column, None), pa.int64()), pa.string())
        column = pc.coalesce(integers, pc.cast(column, pa.string()))
    try:
        texts = pc.utf8_trim_whitespace(pc.cast(column, pa.string()))
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise JobError(f"a column of type {column.type} cannot be read as text: {error}") from error
    texts = pc.if_else(pc.equal(texts, ""), None, texts)
    # What pandas makes of whole numbers in a column where some are missing.
    if pc.all(pc.match_substring_regex(texts, r"^-?[0-9]+\.0$")).as_py():
        texts = pc.replace_substring_regex(texts, r"\.0$", "")
    return texts


def _parse(texts: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    lower = pc.utf8_lower(texts)
    is_number = pc.fill_null(pc.match_substring_regex(lower, _NUMBER), False)
    is_infinite = pc.fill_null(pc.match_substring_regex(lower, _INFINITY), False)
    values = pc.cast(pc.if_else(is_number, lower, None), pa.float64())
    values = np.array(values.to_numpy(), np.float64)
    missing = pc.or_(pc.is_null(lower), pc.is_in(lower, pa.array(_MISSING_NUMBER)))
    for word, value in (("true", 1.0), ("false", 0.0)):
        values[_mask(pc.fill_null(pc.equal(lower, word), False))] = value
    values[_mask(is_infinite)] = np.inf
    return values, np.isnan(values) & ~_mask(missing)


def _mask(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(bool)


def _label_texts(column: pa.ChunkedArray) -> list[str | None]:
    return [None if text is None else _label(text) for text in texts_of(column)]


def _label(text: str) -> str | None:
    """Return a label's text in one spelling, None for a missing one."""
    if text.lower() in _MISSING_LABEL:
        return None
    if text.lower() in ("true", "false"):
        return text.lower()
    return re.sub(r"^([+-]?[0-9]+)\.0+$", r"\1", text)


def _counted(counts: Counter[str]) -> str:
    shown = ", ".join(f"{value!r} {n} times" for value, n in counts.most_common(6))
    return shown + (", …" if len(counts) > 6 else "")


def _check_keys(rows: Rows, key_column: str) -> None:
    first_of: dict[str, int] = {}
    for row, key in enumerate(rows.keys):
        if key is None:
            rows.set_aside(row, "missing_key", f"row {row + 1} has no {key_column}")
        elif key in first_of:
            detail = f"row {row + 1} has the {key_column} of row {first_of[key] + 1}"
            rows.set_aside(row, "duplicate_key", detail)
        else:
            first_of[key] = row


def _read_labels(rows: Rows, column: pa.ChunkedArray, name: str, classes: Classes) -> None:
    number = {classes.negative: 0, classes.positive: 1}
    for row, text in enumerate(_label_texts(column)):
        rows.labels.append(-1 if text is None else number.get(text, -1))
        if rows.labels[-1] < 0:
            value = "empty" if text is None else repr(text)
            rows.set_aside(
                row,
                "bad_label",
                f"{name} is {value}, neither {classes.negative!r} nor {classes.positive!r}",
            )


def _read_groups_and_splits(rows: Rows, table: pa.Table, spec: PrepareSpec) -> None:
    groups = texts_of(table.column(spec.group_column)) if spec.group_column else rows.keys
    rows.groups = [group or "" for group in groups]
    rows.splits = [None] * len(rows.keys)
    for row, group in enumerate(groups):
        if group is None:
            rows.set_aside(row, "missing_group", f"{spec.group_column} is empty")
    if spec.split_column:
        known: dict[str | None, Split] = {split: split for split in SPLITS}
        for row, text in enumerate(texts_of(table.column(spec.split_column))):
            rows.splits[row] = known.get(text)
            if text not in known:
                detail = f"{spec.split_column} is {text!r}, none of {', '.join(SPLITS)}"
                rows.set_aside(row, "bad_split", detail)


def _read_numbers(rows: Rows, position: int, column: pa.ChunkedArray, name: str) -> None:
    try:
        values, is_text = numbers_of(column)
    except JobError as error:
        raise JobError(f"the numeric column {name!r} holds no numbers: {error}") from error
    for row in np.flatnonzero(is_text):
        rows.set_aside(int(row), "non_numeric_text", f"{name} is {column[int(row)].as_py()!r}")
    with np.errstate(over="ignore"):
        stored = values.astype(np.float32)
    for row in np.flatnonzero(np.isinf(stored)):
        detail = f"{name} is {column[int(row)].as_py()}, more than float32 holds"
        rows.set_aside(int(row), "non_finite_number", detail)
    rows.numeric_RF[:, position] = stored


def _read_image_paths(rows: Rows, table: pa.Table, spec: PrepareSpec) -> None:
    pattern = f"{{{spec.image_column}}}" if spec.image_column else spec.image_pattern
    names = [spec.image_column] if spec.image_column else pattern_columns(spec)
    columns = [texts_of(table.column(name)) for name in names]
    # Between the braces' names stands the text that all paths share.
    pieces = _BRACES.split(pattern)[::2]
    for row, values in enumerate(zip(*columns, strict=True)):
        if None in values:
            detail = f"{names[values.index(None)]} is empty, so the image has no path"
            rows.set_aside(row, "missing_image", detail)
        else:
            between = zip(values, pieces[1:], strict=True)
            rows.image_paths[row] = pieces[0] + "".join(f"{v}{text}" for v, text in between)
