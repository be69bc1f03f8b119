"""The table: CSV or Parquet → one row a thing, usable or with the reason why it is not.

Enters: a file by path or URI, then the `Source` made of it.  Leaves: `Rows`, column by column, in
the table's order.

What concerns a whole column (it is missing, its classes are unclear) is an error; what concerns one
cell sets that row aside. Tables have millions of rows: columns stay Arrow and NumPy, only rows that
are set aside become Python objects. Imports neither Ray nor TensorFlow.
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
from ray_jobs.batch import KEY, LABEL
from ray_jobs.cli import JobError
from ray_jobs.manifest import ImageInfo
from ray_jobs.numbers import is_number, numbers_of, suggest_rule, texts
from ray_jobs.sources.refs import ImageRefs, Source
from ray_jobs.spec import SPLITS, PrepareSpec
from ray_jobs.storage import split_file

_MISSING_LABEL = ("nan", "na", "n/a", "<na>", "null")
_BRACES = re.compile(r"\{([^{}]*)\}")
# Of each column: to find a cell's rule takes a millisecond, and all cells may lack one.
_MOST_SUGGESTIONS = 100


@dataclass(frozen=True)
class Classes:
    """The two values of the label column, as text."""

    negative: str
    positive: str


@dataclass
class Rows:
    """The table's rows: columns of one length, and why a row is set aside."""

    keys: pa.StringArray
    """Null where missing."""
    images: tuple[ImageRefs, ...]
    """One entry an image name, in the specification's order."""
    numeric_RF: np.ndarray
    """float32, NaN where missing."""
    categories: dict[str, pa.StringArray]
    """Texts of the categorical columns, null where missing."""
    labels: np.ndarray
    """int8, -1 where there is none to use."""
    groups: pa.StringArray
    """The key where there is no group column; never null."""
    splits: np.ndarray
    """int8, place in `SPLITS` where the split column says, else -1."""
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Reason (one word) and detail of each row that cannot be used."""

    def __len__(self) -> int:
        return len(self.keys)

    def set_aside(self, row: int, reason: str, detail: str) -> None:
        """Say why a row cannot be used; the first reason counts."""
        self.bad.setdefault(row, (reason, detail))

    @property
    def good(self) -> np.ndarray:
        """Whether each row can be used."""
        good = np.ones(len(self), bool)
        good[list(self.bad)] = False
        return good


def read_table(location: str) -> pa.Table:
    """Return a CSV or Parquet file; the cells of a CSV stay text, since one may be no number.

    Raises:
        JobError: if there is no such file, it cannot be read, or it has no rows.
    """
    if not location:
        raise JobError("prepare.table is not set: give the path or URI of a CSV or Parquet file")
    folder, name = split_file(location)
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


def require_columns(
    table: pa.Table, spec: PrepareSpec, categorical: Sequence[str] = (), *, labelled: bool = True
) -> None:
    """Check that every column that the spec names is there, and none has two roles.

    Where images are is for the source to check.

    Raises:
        JobError: naming the setting, the column, the nearest match and the columns there are.
    """
    named: dict[str, Sequence[str | None]] = {
        "prepare.key_column": [spec.key_column],
        "prepare.numeric_columns": spec.numeric_columns or (),
        "prepare.number_rules": tuple(spec.number_rules),
        "data.categorical": categorical,
    }
    if labelled:
        named |= {
            "prepare.label_column": [spec.label_column],
            "prepare.group_column": [spec.group_column],
            "prepare.split_column": [spec.split_column],
            "prepare.exclude_columns": spec.exclude_columns,
        }
    for setting, columns in named.items():
        for column in columns:
            if column is not None:
                require_column(table, column, setting)
    if spec.key_column == spec.label_column:
        raise JobError(f"{spec.key_column!r} cannot be both prepare.key_column and label_column")
    own = (KEY, *ImageInfo.of(spec).columns, LABEL)
    learnt = {
        "prepare.numeric_columns": spec.numeric_columns or (),
        "data.categorical": categorical,
    }
    for setting, columns in learnt.items():
        for column in columns:
            for role in ("key_column", "label_column", "split_column"):
                if column == getattr(spec, role):
                    raise JobError(f"{setting} names {column!r}, the {role}; leave it out")
            if column in spec.exclude_columns:
                raise JobError(f"{setting} and prepare.exclude_columns both name {column!r}")
            if list(columns).count(column) > 1:
                raise JobError(f"{setting} names {column!r} twice")
            if column in own:
                raise JobError(
                    f"{setting} names {column!r}, which is the name of one of the shards' own "
                    "columns; rename it in the table"
                )
    for column in set(categorical) & set(spec.numeric_columns or ()):
        raise JobError(
            f"prepare.numeric_columns and data.categorical both name {column!r}; a column holds "
            "numbers or words"
        )
    for name in spec.image_columns:
        if not name or spec.image_columns.count(name) > 1:
            raise JobError(
                f"prepare.image_columns={list(spec.image_columns)} must be names, each once"
            )
    if spec.image_columns and spec.image_column:
        raise JobError(
            f"prepare.image_column={spec.image_column!r} is for one image a row and "
            "prepare.image_columns for several; keep one of them"
        )


def require_column(table: pa.Table, column: str, setting: str) -> None:
    """Check that a column that a setting names is there.

    Raises:
        JobError: naming the setting, the column, the nearest match and the columns there are.
    """
    if column not in table.column_names:
        raise JobError(
            f"{setting}: the table has no column {column!r}"
            f"{did_you_mean(column, table.column_names)} (it has: {', '.join(table.column_names)})"
        )


def find_numeric_columns(
    table: pa.Table, spec: PrepareSpec, categorical: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the columns to learn from: those named, or all of numbers that have no other role.

    A column of a CSV is one of numbers if more than half of its filled cells are, or if there is a
    rule for it. So a few words among numbers set rows aside, and do not make the column disappear.

    Raises:
        JobError: if a name is one of the shards' own, or nothing but images is left unawares.
    """
    if spec.numeric_columns is not None:
        return spec.numeric_columns
    taken = _other_roles(spec) | set(categorical)
    columns = tuple(
        name
        for name in table.column_names
        if name not in taken and (name in spec.number_rules or _holds_numbers(table.column(name)))
    )
    if not columns and not categorical:
        raise JobError(
            "no column of numbers is left to learn from; name some in prepare.numeric_columns, "
            "or make it empty to learn from images alone"
        )
    for column in columns:
        if column in (KEY, *ImageInfo.of(spec).columns, LABEL):
            raise JobError(
                f"the numeric column {column!r} has the name of one of the shards' own columns; "
                "rename it in the table, or put it into prepare.exclude_columns"
            )
    return columns


def find_classes(column: pa.ChunkedArray, spec: PrepareSpec) -> Classes:
    """Return the two classes of the label column.

    They are 0 and 1, false and true, or the positive label and the most frequent other value.
    Further values are tolerated, and their rows set aside, up to `max_bad_fraction`.

    Raises:
        JobError: if there is one class only, or it is unclear which two.
    """
    counts = _label_counts(column)
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
    others = counts.total() - counts[classes.negative] - counts[classes.positive]
    unlabelled = 0 if spec.skip_unlabelled else len(column) - counts.total()
    if others and others + unlabelled > spec.max_bad_fraction * len(column):
        raise JobError(
            f"the label column {name!r} holds {len(counts)} values ({seen}), a yes/no model needs "
            f"two; correct those other than {classes.negative!r} and {classes.positive!r}, or "
            f"raise prepare.max_bad_fraction={spec.max_bad_fraction:g} to set their rows aside"
        )
    return classes


def read_rows(
    source: Source,
    spec: PrepareSpec,
    numeric_columns: Sequence[str],
    classes: Classes | None,
    categorical: Sequence[str] = (),
) -> Rows:
    """Return the rows of a source, those that cannot be used with their reason.

    Args:
        source: of the rows, its table checked by `require_columns`.
        spec: the roles of the columns.
        numeric_columns: to read, in this order.
        classes: of the label; None leaves label, group and split unread, as for `predict`.
        categorical: columns of words to read.
    """
    table = source.table
    keys = texts_of(table.column(spec.key_column))
    names = (spec.image_columns or ("",)) if source.images else ()
    rows = Rows(
        keys=keys,
        images=tuple(source.images[name] for name in names),
        numeric_RF=np.empty((len(keys), len(numeric_columns)), np.float32),
        categories={name: texts_of(table.column(name)) for name in categorical},
        labels=np.full(len(keys), -1, np.int8),
        groups=keys.fill_null(""),
        splits=np.full(len(keys), -1, np.int8),
    )
    _check_keys(rows, spec.key_column)
    if classes is not None:
        _read_labels(rows, table.column(spec.label_column), spec.label_column, classes)
        _read_groups_and_splits(rows, table, spec)
    for position, name in enumerate(numeric_columns):
        _read_numbers(rows, position, table.column(name), name, spec)
    for row, (reason, detail) in source.bad.items():
        rows.set_aside(row, reason, detail)
    if rows.images:
        is_there = np.any([images.is_there for images in rows.images], axis=0)
        detail = "it has none of its images" if spec.image_columns else "there is no image for it"
        for row in np.flatnonzero(~is_there).tolist():
            rows.set_aside(row, "missing_image", detail)
    return rows


def path_pattern(spec: PrepareSpec, name: str = "") -> tuple[list[str], list[str]]:
    """Return the image pattern as columns, and the texts before, between and after them.

    Args:
        spec: with the pattern.
        name: of one of several images, which `{image}` stands for.

    Raises:
        JobError: if a brace is not closed or holds no name, or no column is named.
    """
    pattern = spec.image_pattern.replace("{image}", name) if name else spec.image_pattern
    columns = _BRACES.findall(pattern)
    if not columns or not all(columns) or set("{}") & set(_BRACES.sub("", pattern)):
        raise JobError(
            f"prepare.image_pattern={spec.image_pattern!r} must name columns in braces, such as "
            "'{key}.jpg'"
        )
    return [spec.key_column if c == "key" else c for c in columns], _BRACES.split(pattern)[::2]


def texts_of(column: pa.ChunkedArray) -> pa.StringArray:
    """Return cells as text without spaces around it, whole numbers without `.0`, null if empty.

    Raises:
        JobError: if the column holds something that is no text, such as lists.
    """
    return texts(column).combine_chunks()


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
    paths = [spec.image_column, *spec.image_columns]
    if not spec.image_column:
        paths += path_pattern(spec, next(iter(spec.image_columns), ""))[0]
    return {role for role in [*roles, *paths, *spec.exclude_columns] if role is not None}


def _holds_numbers(column: pa.ChunkedArray) -> bool:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return is_number(column.type) or pa.types.is_boolean(column.type)
    values, is_text = numbers_of(column)
    return int((~np.isnan(values)).sum()) > int(is_text.sum())


def _label_counts(column: pa.ChunkedArray) -> Counter[str]:
    """Return how often each label occurs, in one spelling; missing ones are left out."""
    counts: Counter[str] = Counter()
    for found in pc.value_counts(texts_of(column)).to_pylist():
        label = None if found["values"] is None else _label(found["values"])
        if label is not None:
            counts[label] += found["counts"]
    return counts


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
    for row in _rows_where(rows.keys.is_null()):
        rows.set_aside(row, "missing_key", f"row {row + 1} has no {key_column}")
    codes = rows.keys.dictionary_encode().indices.fill_null(-1).to_numpy()
    # Written from the last row to the first, so that the first stays.
    first = np.empty(len(codes) + 1, np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    for row in np.flatnonzero((first[codes] != np.arange(len(codes))) & (codes >= 0)).tolist():
        detail = f"row {row + 1} has the {key_column} of row {first[codes[row]] + 1}"
        rows.set_aside(row, "duplicate_key", detail)


def _read_labels(rows: Rows, column: pa.ChunkedArray, name: str, classes: Classes) -> None:
    missing, other = -2, -1
    encoded = texts_of(column).dictionary_encode()
    spelled = [_label(text) for text in encoded.dictionary.to_pylist()]
    number = {None: missing, classes.negative: 0, classes.positive: 1}
    # The last entry is for cells that are null, whose code is -1.
    numbers = np.array([*(number.get(label, other) for label in spelled), missing], np.int8)
    codes = encoded.indices.fill_null(-1).to_numpy()
    labels = numbers[codes]
    for row in np.flatnonzero(labels == missing).tolist():
        rows.set_aside(row, "missing_label", f"{name} is empty")
    for row in np.flatnonzero(labels == other).tolist():
        rows.set_aside(
            row,
            "bad_label",
            f"{name} is {spelled[codes[row]]!r}, neither {classes.negative!r} nor "
            f"{classes.positive!r}",
        )
    rows.labels = np.maximum(labels, -1)


def _read_groups_and_splits(rows: Rows, table: pa.Table, spec: PrepareSpec) -> None:
    if spec.group_column:
        groups = texts_of(table.column(spec.group_column))
        rows.groups = groups.fill_null("")
        for row in _rows_where(groups.is_null()):
            rows.set_aside(row, "missing_group", f"{spec.group_column} is empty")
    if spec.split_column:
        named = texts_of(table.column(spec.split_column))
        places = pc.index_in(named, value_set=pa.array(SPLITS))
        rows.splits = places.fill_null(-1).to_numpy().astype(np.int8)
        for row in np.flatnonzero(rows.splits < 0).tolist():
            detail = f"{spec.split_column} is {named[row].as_py()!r}, none of {', '.join(SPLITS)}"
            rows.set_aside(row, "bad_split", detail)


def _read_numbers(
    rows: Rows, position: int, column: pa.ChunkedArray, name: str, spec: PrepareSpec
) -> None:
    rule = spec.number_rules.get(name)
    try:
        values, is_text = numbers_of(column, rule)
    except JobError as error:
        raise JobError(f"the numeric column {name!r} holds no numbers: {error}") from error
    for count, row in enumerate(np.flatnonzero(is_text).tolist()):
        cell = column[row].as_py()
        detail = f"{name} is {cell!r}"
        if rule:
            detail += f", which the rule {rule} does not read"
        elif count < _MOST_SUGGESTIONS and (suggested := suggest_rule(str(cell))):
            detail += f"; prepare.number_rules {{{name}: {suggested}}} would read it"
        rows.set_aside(row, "non_numeric_text", detail)
    with np.errstate(over="ignore"):
        stored = values.astype(np.float32)
    for row in np.flatnonzero(np.isinf(stored)).tolist():
        detail = f"{name} is {column[row].as_py()}, more than float32 holds"
        rows.set_aside(row, "non_finite_number", detail)
    rows.numeric_RF[:, position] = stored


def _rows_where(mask: pa.BooleanArray) -> list[int]:
    return np.flatnonzero(mask.to_numpy(zero_copy_only=False)).tolist()
