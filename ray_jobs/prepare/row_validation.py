"""The cells of a source's table → `Rows`: usable, or with the reason why they are not.

Enters: a `Source` whose columns were checked.  Leaves: keys, numbers, words, labels, groups and
splits, column by column, in the table's order.

What concerns one cell sets that row aside. Tables have millions of rows: columns stay Arrow and
NumPy, only rows that are set aside become Python objects. Imports neither Ray nor TensorFlow.
"""

# pyarrow makes the functions of its compute module when it is imported, unseen by pyright.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import SPLITS, PrepareSpec
from ray_jobs.prepare.labels import Classes, label_text
from ray_jobs.prepare.number_parsing import numbers_of, suggest_rule
from ray_jobs.prepare.sources.refs import ImageRefs, Source
from ray_jobs.prepare.table import texts_of

# Of each column: to find a cell's rule takes a millisecond, and all cells may lack one.
_MOST_SUGGESTIONS = 100


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

    def quarantine(self, row: int, reason: str, detail: str) -> None:
        """Say why a row cannot be used; the first reason counts."""
        self.bad.setdefault(row, (reason, detail))

    @property
    def good(self) -> np.ndarray:
        """Whether each row can be used."""
        good = np.ones(len(self), bool)
        good[list(self.bad)] = False
        return good


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
        rows.quarantine(row, reason, detail)
    if rows.images:
        is_there = np.any([images.is_there for images in rows.images], axis=0)
        detail = "it has none of its images" if spec.image_columns else "there is no image for it"
        for row in np.flatnonzero(~is_there).tolist():
            rows.quarantine(row, "missing_image", detail)
    return rows


def _check_keys(rows: Rows, key_column: str) -> None:
    for row in _rows_where(rows.keys.is_null()):
        rows.quarantine(row, "missing_key", f"row {row + 1} has no {key_column}")
    codes = rows.keys.dictionary_encode().indices.fill_null(-1).to_numpy()
    # Written from the last row to the first, so that the first stays.
    first = np.empty(len(codes) + 1, np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    for row in np.flatnonzero((first[codes] != np.arange(len(codes))) & (codes >= 0)).tolist():
        detail = f"row {row + 1} has the {key_column} of row {first[codes[row]] + 1}"
        rows.quarantine(row, "duplicate_key", detail)


def _read_labels(rows: Rows, column: pa.ChunkedArray, name: str, classes: Classes) -> None:
    missing, other = -2, -1
    encoded = texts_of(column).dictionary_encode()
    spelled = [label_text(text) for text in encoded.dictionary.to_pylist()]
    number = {None: missing, classes.negative: 0, classes.positive: 1}
    # The last entry is for cells that are null, whose code is -1.
    numbers = np.array([*(number.get(label, other) for label in spelled), missing], np.int8)
    codes = encoded.indices.fill_null(-1).to_numpy()
    labels = numbers[codes]
    for row in np.flatnonzero(labels == missing).tolist():
        rows.quarantine(row, "missing_label", f"{name} is empty")
    for row in np.flatnonzero(labels == other).tolist():
        rows.quarantine(
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
            rows.quarantine(row, "missing_group", f"{spec.group_column} is empty")
    if spec.split_column:
        named = texts_of(table.column(spec.split_column))
        places = pc.index_in(named, value_set=pa.array(SPLITS))
        rows.splits = places.fill_null(-1).to_numpy().astype(np.int8)
        for row in np.flatnonzero(rows.splits < 0).tolist():
            detail = f"{spec.split_column} is {named[row].as_py()!r}, none of {', '.join(SPLITS)}"
            rows.quarantine(row, "bad_split", detail)


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
        rows.quarantine(row, "non_numeric_text", detail)
    with np.errstate(over="ignore"):
        stored = values.astype(np.float32)
    for row in np.flatnonzero(np.isinf(stored)).tolist():
        detail = f"{name} is {column[row].as_py()}, more than float32 holds"
        rows.quarantine(row, "non_finite_number", detail)
    rows.numeric_RF[:, position] = stored


def _rows_where(mask: pa.BooleanArray) -> list[int]:
    return np.flatnonzero(mask.to_numpy(zero_copy_only=False)).tolist()
