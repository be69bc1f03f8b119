"""Reads the cells of a source's table as `Rows` and quarantines the rows that cannot be used.

Input: a `Source` whose columns have been checked. Output: keys, numbers, words, labels, groups and
splits in the table's order, and a reason for each quarantined row.

Tables can have millions of rows, so columns stay Arrow and NumPy; only quarantined rows become
Python objects.
"""

# pyright: reportAttributeAccessIssue=false

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import SPLITS, PrepareSpec
from ray_jobs.prepare.cell_text import TEXT, column_text, first_rows, label_text
from ray_jobs.prepare.number_parsing import parse_numbers, suggest_rule
from ray_jobs.prepare.sources.source import ImageRefs, Source

# Per column: finding the rule of one cell takes a millisecond, and every cell may need one.
_MAX_SUGGESTIONS = 100


@dataclass
class Rows:
    """Rows as columns of equal length."""

    keys: pa.LargeStringArray
    """Null where missing."""
    images: tuple[ImageRefs, ...]
    """One entry per image name, in the order of `image_columns`."""
    numeric_RF: np.ndarray
    """float32, NaN where missing."""
    categories: dict[str, pa.LargeStringArray]
    """Text of the categorical columns, null where missing."""
    labels: np.ndarray
    """int8, -1 where there is no usable label."""

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, indices: np.ndarray) -> "Rows":
        """Return the rows at some indices."""
        return Rows(
            keys=self.keys.take(pa.array(indices)),
            images=tuple(refs.take(indices) for refs in self.images),
            numeric_RF=self.numeric_RF[indices],
            categories={n: texts.take(pa.array(indices)) for n, texts in self.categories.items()},
            labels=self.labels[indices],
        )


@dataclass
class CheckedRows(Rows):
    """All rows of the table, and why some are quarantined."""

    groups: pa.LargeStringArray
    """The key where there is no group column; never null."""
    splits: np.ndarray
    """int8 index in `SPLITS`, from the split column; -1 without one."""
    quarantined: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Row → reason (one word) and detail."""
    unmatched: tuple[tuple[str, str, str], ...] = ()
    """Key, reason and detail of each image without a row."""

    def quarantine(self, row: int, reason: str, detail: str) -> None:
        """Exclude a row; of several reasons the first is kept."""
        self.quarantined.setdefault(row, (reason, detail))

    @property
    def good(self) -> np.ndarray:
        """Mask of the rows that can be used."""
        good = np.ones(len(self), bool)
        good[list(self.quarantined)] = False
        return good


def read_rows(
    source: Source,
    spec: PrepareSpec,
    numeric_columns: Sequence[str],
    classes: tuple[str, str] | None,
    categorical: Sequence[str] = (),
) -> CheckedRows:
    """Return the rows of a source's table.

    Args:
        source: The source, whose columns have been checked.
        spec: The `prepare` section.
        numeric_columns: Columns of numbers to read.
        classes: Negative and positive class of the label column. None, as in `predict`, skips
            labels, groups and splits.
        categorical: Columns of words to read.

    Raises:
        JobError: If a column as a whole cannot be read.
    """
    table = source.table
    keys = column_text(table.column(spec.key_column))
    names = (spec.image_columns or ("",)) if source.images else ()
    rows = CheckedRows(
        keys=keys,
        images=tuple(source.images[name] for name in names),
        numeric_RF=np.empty((len(keys), len(numeric_columns)), np.float32),
        categories={name: column_text(table.column(name)) for name in categorical},
        labels=np.full(len(keys), -1, np.int8),
        groups=keys.fill_null(""),
        splits=np.full(len(keys), -1, np.int8),
        unmatched=source.unmatched,
    )
    _check_keys(rows, spec.key_column)
    if classes is not None:
        _read_labels(rows, table.column(spec.label_column), spec.label_column, classes)
        _read_groups_and_splits(rows, table, spec)
    for position, name in enumerate(numeric_columns):
        _read_numbers(rows, position, table.column(name), name, spec)
    for row, (reason, detail) in source.quarantined.items():
        rows.quarantine(row, reason, detail)
    if rows.images:
        has_image = np.any([images.has_image for images in rows.images], axis=0)
        detail = "the row has none of its images" if spec.image_columns else "the row has no image"
        for row in np.flatnonzero(~has_image).tolist():
            rows.quarantine(row, "missing_image", detail)
    return rows


def _check_keys(rows: CheckedRows, key_column: str) -> None:
    for row in _rows_where(rows.keys.is_null()):
        rows.quarantine(row, "missing_key", f"row {row + 1} has no {key_column}")
    first = first_rows(rows.keys, rows.keys)
    for row in np.flatnonzero((first >= 0) & (first < np.arange(len(first)))).tolist():
        detail = f"row {row + 1} has the {key_column} of row {first[row] + 1}"
        rows.quarantine(row, "duplicate_key", detail)


def _read_labels(
    rows: CheckedRows, column: pa.ChunkedArray, name: str, classes: tuple[str, str]
) -> None:
    negative, positive = classes
    missing, other = -2, -1
    encoded = column_text(column).dictionary_encode()
    spellings = [label_text(text) for text in encoded.dictionary.to_pylist()]
    class_of = {None: missing, negative: 0, positive: 1}
    # The last entry is for null cells, whose code is -1.
    class_of_code = np.array([*(class_of.get(s, other) for s in spellings), missing], np.int8)
    codes = encoded.indices.fill_null(-1).to_numpy()
    labels = class_of_code[codes]
    for row in np.flatnonzero(labels == missing).tolist():
        rows.quarantine(row, "missing_label", f"{name} is empty")
    for row in np.flatnonzero(labels == other).tolist():
        rows.quarantine(
            row,
            "bad_label",
            f"{name} is {spellings[codes[row]]!r}, neither {negative!r} nor {positive!r}",
        )
    rows.labels = np.maximum(labels, -1)


def _read_groups_and_splits(rows: CheckedRows, table: pa.Table, spec: PrepareSpec) -> None:
    if spec.group_column:
        groups = column_text(table.column(spec.group_column))
        rows.groups = groups.fill_null("")
        for row in _rows_where(groups.is_null()):
            rows.quarantine(row, "missing_group", f"{spec.group_column} is empty")
    if spec.split_column:
        names = column_text(table.column(spec.split_column))
        indices = pc.index_in(names, value_set=pa.array(SPLITS, TEXT))
        rows.splits = indices.fill_null(-1).to_numpy().astype(np.int8)
        for row in np.flatnonzero(rows.splits < 0).tolist():
            detail = (
                f"{spec.split_column} is {names[row].as_py()!r}, not one of {', '.join(SPLITS)}"
            )
            rows.quarantine(row, "bad_split", detail)


def _read_numbers(
    rows: CheckedRows, position: int, column: pa.ChunkedArray, name: str, spec: PrepareSpec
) -> None:
    rule = spec.number_rules.get(name)
    try:
        values, is_invalid = parse_numbers(column, rule)
    except JobError as error:
        raise JobError(f"the numeric column {name!r} holds no numbers: {error}") from error
    for count, row in enumerate(np.flatnonzero(is_invalid).tolist()):
        cell = column[row].as_py()
        detail = f"{name} is {cell!r}"
        if rule:
            detail += f", which the rule {rule} cannot read"
        elif count < _MAX_SUGGESTIONS and (suggested := suggest_rule(str(cell))):
            detail += f"; prepare.number_rules {{{name}: {suggested}}} would read it"
        rows.quarantine(row, "non_numeric_text", detail)
    with np.errstate(over="ignore"):
        stored = values.astype(np.float32)
    for row in np.flatnonzero(np.isinf(stored)).tolist():
        detail = f"{name} is {column[row].as_py()}, outside the range of float32"
        rows.quarantine(row, "non_finite_number", detail)
    rows.numeric_RF[:, position] = stored


def _rows_where(mask: pa.BooleanArray) -> list[int]:
    return np.flatnonzero(mask.to_numpy(zero_copy_only=False)).tolist()
