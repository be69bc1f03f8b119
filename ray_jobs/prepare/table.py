"""Checks the columns that the settings name, and parses patterns of image paths.

columns.py decides what the other columns are; labels.py and row_validation.py read the cells.
"""

import re
from collections.abc import Sequence
from itertools import combinations

import pyarrow as pa

from mm_model.nearest_match import did_you_mean
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.config.text import names_text
from ray_jobs.data.batch import FOLD, GROUP, KEY, LABEL, ORIGINAL_PIXELS, WEIGHT
from ray_jobs.data.manifest import ImageInfo

_BRACES = re.compile(r"\{([^{}]*)\}")
_FORMAT = re.compile(r"(.+):(?:0([0-9]+))?d?")
_ROLES = (
    "key_column", "label_column", "group_column", "split_column", "fold_column", "weight_column",
)  # fmt: skip


def require_columns(
    table: pa.Table,
    spec: PrepareSpec,
    categorical: Sequence[str] = (),
    text: Sequence[str] = (),
    *,
    labelled: bool = True,
) -> None:
    """Check that every column named in the spec exists, and that none has two roles.

    The columns of image paths are checked by the source.

    Raises:
        JobError: If a column is missing or has two roles. The message contains the setting, the
            column, and for a missing column the nearest match and the existing columns.
    """
    inputs = {
        "prepare.numeric_columns": spec.numeric_columns or (),
        "data.categorical": categorical,
        "data.text": text,
    }
    columns_of = {name: getattr(spec, name) for name in _ROLES}
    named: dict[str, Sequence[str | None]] = {
        "prepare.key_column": [spec.key_column],
        **inputs,
        "prepare.number_rules": tuple(spec.number_rules),
    }
    if labelled:
        named |= {f"prepare.{name}": [column] for name, column in columns_of.items()}
        named["prepare.exclude_columns"] = spec.exclude_columns
    used = {column for columns in named.values() for column in columns}
    unused = [name for name in table.column_names if name not in used]
    missing = [
        f"{setting}: the table has no column {column!r}{did_you_mean(column, unused)}"
        for setting, columns in named.items()
        for column in columns
        if column is not None and column not in table.column_names
    ]
    if missing:
        raise JobError(f"{'; '.join(missing)} (it has: {names_text(table.column_names)})")
    if spec.key_column == spec.label_column:
        raise JobError(f"{spec.key_column!r} cannot be both prepare.key_column and label_column")
    for setting, columns in (inputs | {"prepare.weight_column": [spec.weight_column]}).items():
        for column in columns:
            for role, other in columns_of.items():
                if column is not None and column == other and not setting.endswith(role):
                    raise JobError(f"{setting} names {column!r}, the {role}; leave it out")
    for setting, columns in inputs.items():
        for column in columns:
            if column in spec.exclude_columns:
                raise JobError(f"{setting} and prepare.exclude_columns both name {column!r}")
            if list(columns).count(column) > 1:
                raise JobError(f"{setting} names {column!r} twice")
            if column in shard_columns(spec):
                raise JobError(
                    f"{setting} names {column!r}, which is a reserved column of the shards; rename "
                    "it in the table"
                )
    if spec.split_column and spec.split_keys:
        raise JobError(
            f"prepare.split_column={spec.split_column!r} and prepare.split_keys both assign the "
            "splits; set only one of them"
        )
    for (setting, columns), (other, others) in combinations(inputs.items(), 2):
        for column in set(columns) & set(others):
            raise JobError(
                f"{setting} and {other} both name {column!r}; remove it from one of them"
            )
    for name in spec.image_columns:
        if not name or spec.image_columns.count(name) > 1:
            raise JobError(
                f"prepare.image_columns={list(spec.image_columns)} holds an empty or repeated "
                "name; give each image a name of its own"
            )
    if spec.image_columns and spec.image_column and spec.image_separator is None:
        raise JobError(
            f"prepare.image_column={spec.image_column!r} is for one image per row and "
            "prepare.image_columns for several; set only one of them"
        )


def require_column(
    names: Sequence[str], column: str, setting: str, owner: str = "the table"
) -> None:
    """Check that a column named in a setting exists."""
    if column not in names:
        raise JobError(
            f"{setting}: {owner} has no column {column!r}{did_you_mean(column, names)} "
            f"(it has: {names_text(names)})"
        )


def parse_path_pattern(
    spec: PrepareSpec, name: str = ""
) -> tuple[list[str], list[str], list[int | None]]:
    """Split `prepare.image_pattern` into its columns, the texts around them, and their formats.

    The format is the number of digits of an integer, such as 5 in `{id:05d}.jpg`. The ending `.*`
    is left out, since images are also found by another extension.

    Args:
        spec: The `prepare` section.
        name: Name of one of several images, which replaces `{image}`.

    Raises:
        JobError: If a brace is not closed or is empty, or the pattern names no column.
    """
    pattern = spec.image_pattern.replace("{image}", name) if name else spec.image_pattern
    columns = _BRACES.findall(pattern)
    if not columns or not all(columns) or set("{}") & set(_BRACES.sub("", pattern)):
        raise JobError(
            f"prepare.image_pattern={spec.image_pattern!r} must name columns in braces, such as "
            "'{key}.jpg'"
        )
    texts = _BRACES.split(pattern.removesuffix(".*"))[::2]
    formats: list[int | None] = []
    for i, column in enumerate(columns):
        match = _FORMAT.fullmatch(column)
        if ":" in column and not match:
            raise JobError(
                f"prepare.image_pattern={spec.image_pattern!r}: {column!r} has an unknown format; "
                "give the number of digits of an integer, such as {id:05d}"
            )
        columns[i] = match[1] if match else column
        formats.append(int(match[2] or 1) if match else None)
    return [spec.key_column if c == "key" else c for c in columns], texts, formats


def shard_columns(spec: PrepareSpec) -> tuple[str, ...]:
    """Return the names of columns that every shard has."""
    optional = {FOLD: spec.fold_column, GROUP: spec.group_column, WEIGHT: spec.weight_column}
    set_columns = (name for name, column in optional.items() if column is not None)
    return (KEY, *ImageInfo.of(spec).columns, *set_columns, LABEL, ORIGINAL_PIXELS)
