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

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import NumberRule, PrepareSpec
from ray_jobs.prepare.cell_text import column_text, first_rows, role_text
from ray_jobs.prepare.columns import number_rules_flag
from ray_jobs.prepare.given_splits import describe_bad_word, read_split_keys, read_split_words
from ray_jobs.prepare.labels import MISSING, OTHER, UNLABELLED, Classes
from ray_jobs.prepare.number_parsing import parse_numbers, propose_rule, resolve_rule
from ray_jobs.prepare.sources.source import ImageRefs, Source


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
    """Text of the categorical and text columns, null where missing."""
    labels: np.ndarray
    """int8, -1 where there is no usable label."""
    folds: pa.LargeStringArray | None = field(default=None, kw_only=True)
    """Text of the fold column, null where missing; None without one."""
    groups: pa.LargeStringArray | None = field(default=None, kw_only=True)
    """Text of the group column, null where missing; None without one."""
    weights: np.ndarray | None = field(default=None, kw_only=True)
    """float32; None without `prepare.weight_column`."""

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
            folds=None if self.folds is None else self.folds.take(pa.array(indices)),
            groups=None if self.groups is None else self.groups.take(pa.array(indices)),
            weights=None if self.weights is None else self.weights[indices],
        )


@dataclass
class CheckedRows(Rows):
    """All rows of the table, and why some are quarantined."""

    splits: np.ndarray
    """int8 index in `SPLITS` of the given split; -1 without one."""
    splits_note: str = ""
    """Where the given splits come from; empty if none are given."""
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

    def sample(self, max_rows: int) -> np.ndarray:
        """Return up to `max_rows` good rows, evenly spread."""
        good = np.flatnonzero(self.good)
        at = np.linspace(0, len(good) - 1, min(len(good), max_rows))
        return good[at.astype(np.int64)]


def read_rows(
    source: Source,
    spec: PrepareSpec,
    numeric_columns: Sequence[str],
    classes: Classes | None,
    categorical: Sequence[str] = (),
) -> CheckedRows:
    """Return the rows of a source's table.

    Args:
        source: The source, whose columns have been checked.
        spec: The `prepare` section.
        numeric_columns: Columns of numbers to read.
        classes: Classes of the label column. None, as in `predict`, skips labels, groups, splits
            and weights.
        categorical: Columns of words and texts to read.

    Raises:
        JobError: If a column as a whole cannot be read.
    """
    table = source.table
    keys = role_text(table, spec.key_column, spec, keep_words=True)
    names = (spec.image_columns or ("",)) if source.images else ()
    rows = CheckedRows(
        keys=keys,
        images=tuple(source.images[name] for name in names),
        numeric_RF=np.empty((len(keys), len(numeric_columns)), np.float32),
        categories={name: role_text(table, name, spec) for name in categorical},
        labels=np.full(len(keys), -1, np.int8),
        splits=np.full(len(keys), -1, np.int8),
        unmatched=source.unmatched,
    )
    _check_keys(rows, spec.key_column)
    if classes is not None:
        _read_labels(rows, table.column(spec.label_column), spec.label_column, classes)
        _read_groups_and_splits(rows, table, spec)
        if spec.weight_column:
            _read_weights(rows, table.column(spec.weight_column), spec.weight_column, spec)
    for position, name in enumerate(numeric_columns):
        _read_numbers(rows, position, table.column(name), name, spec)
    keep = spec.missing_image == "keep"
    for row, (reason, detail) in source.quarantined.items():
        if not (keep and reason == "missing_image"):
            rows.quarantine(row, reason, detail)
    if rows.images and not keep:
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


def _read_labels(rows: CheckedRows, column: pa.ChunkedArray, name: str, classes: Classes) -> None:
    labels, cells = classes.codes_of(column), column_text(column)
    for reason, code in (("missing_label", MISSING), ("unlabelled", UNLABELLED)):
        for row in np.flatnonzero(labels == code).tolist():
            rows.quarantine(row, reason, f"{name} is {cells[row].as_py() or 'empty'}")
    for row in np.flatnonzero(labels == OTHER).tolist():
        detail = f"neither {classes.negative!r} nor {classes.positive!r}"
        rows.quarantine(row, "bad_label", f"{name} is {cells[row].as_py()!r}, {detail}")
    rows.labels = np.maximum(labels, -1)


def _read_groups_and_splits(rows: CheckedRows, table: pa.Table, spec: PrepareSpec) -> None:
    if spec.group_column:
        groups = rows.groups = role_text(table, spec.group_column, spec)
        for row in _rows_where(groups.is_null()):
            rows.quarantine(row, "missing_group", f"{spec.group_column} is empty")
    if spec.fold_column:
        folds = rows.folds = role_text(table, spec.fold_column, spec)
        for row in _rows_where(folds.is_null()):
            rows.quarantine(row, "missing_fold", f"{spec.fold_column} is empty")
    if spec.split_keys:
        rule = spec.text_rules.get(spec.key_column, "text")
        found = read_split_keys(spec.split_keys, rows.keys, spec.key_column, rule)
        rows.splits, rows.splits_note = found
    elif spec.split_column:
        names = column_text(table.column(spec.split_column))
        rows.splits = read_split_words(names)
        rows.splits_note = f"from the column {spec.split_column}"
        for row in np.flatnonzero(rows.splits < 0).tolist():
            detail = describe_bad_word(names[row].as_py())
            rows.quarantine(row, "bad_split", f"{spec.split_column} is {detail}")


def _read_numbers(
    rows: CheckedRows, position: int, column: pa.ChunkedArray, name: str, spec: PrepareSpec
) -> None:
    values, remedies = _parse_float32(column, name, spec.number_rules.get(name), "numeric")
    for row, remedy in remedies.items():
        rows.quarantine(row, "non_numeric_text", f"{name} is {column[row].as_py()!r}{remedy}")
    for row in np.flatnonzero(np.isinf(values)).tolist():
        detail = f"{name} is {column[row].as_py()}, outside the range of float32"
        rows.quarantine(row, "non_finite_number", detail)
    # Excel does not store the sign of -0.
    rows.numeric_RF[:, position] = values + np.float32(0)


def _read_weights(rows: CheckedRows, column: pa.ChunkedArray, name: str, spec: PrepareSpec) -> None:
    rule = spec.number_rules.get(name)
    rule = resolve_rule(column, rule) if rule else None
    rows.weights, remedies = _parse_float32(column, name, rule, "weight")
    is_usable = (rows.weights > 0) & np.isfinite(rows.weights)
    for row in np.flatnonzero(~is_usable).tolist():
        cell = column[row].as_py()
        text = "empty" if cell in (None, "") else repr(cell)
        detail = f"{name} is {text}, but a weight is a positive number{remedies.get(row, '')}"
        rows.quarantine(row, "bad_weight", detail)


def _parse_float32(
    column: pa.ChunkedArray, name: str, rule: NumberRule | None, kind: str
) -> tuple[np.ndarray, dict[int, str]]:
    """Return the cells of a column, and what would read each one that is not a number, by row."""
    try:
        values, is_invalid = parse_numbers(column, rule)
    except JobError as error:
        raise JobError(f"the {kind} column {name!r} holds no numbers: {error}") from error
    if not is_invalid.any():
        with np.errstate(over="ignore", under="ignore"):
            return values.astype(np.float32), {}
    cells = column.filter(pa.array(is_invalid))
    remedy, is_read = f", which the rule {rule} cannot read", np.ones(len(cells), bool)
    if not rule:
        # One rule for all cells: a column has only one, and finding it takes 10 ms.
        proposed, _ = propose_rule(cells) or ("missing", 0)
        remedy = f"; {number_rules_flag({name: str(proposed)})} would read it"
        is_read = ~np.isnan(parse_numbers(cells, resolve_rule(cells, proposed))[0])
    other = f"; {number_rules_flag({name: 'missing'})} would treat it as missing"
    bad = zip(np.flatnonzero(is_invalid).tolist(), is_read, strict=True)
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float32), {row: remedy if read else other for row, read in bad}


def _rows_where(mask: pa.BooleanArray) -> list[int]:
    return np.flatnonzero(mask.to_numpy(zero_copy_only=False)).tolist()
