"""Finds the key column and the pattern of image paths, where no setting names them.

The key is a column of different cells that occur in the names of the images: `17` in
`17_front.jpg`.
"""

# pyright: reportAttributeAccessIssue=false

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.config.text import names_text
from ray_jobs.prepare.cell_text import TEXT, apply_text_rule, column_text, find_text_rule
from ray_jobs.prepare.columns import ID_NAME, MIN_READ
from ray_jobs.prepare.number_parsing import is_numeric, propose_rule
from ray_jobs.prepare.sources.source import ImageRefs
from ray_jobs.prepare.sources.source_files import IMAGE_SUFFIXES
from ray_jobs.prepare.table import parse_path_pattern

DEFAULT_KEY = "key"
_SAMPLE_NAMES = 2000
_MIN_MATCHED = 0.5
"""Fraction of the sampled names, or of as many as there are rows, that must contain a key."""
_MAIN_SHARE = 0.9
"""Fraction of the matched names that the patterns must cover."""
_MAX_IMAGES = 16
_SEPARATOR = r"[/_\-. ]+"
_PARTS = re.compile(rf"(\{{[^{{}}]*\}}|{_SEPARATOR})")
_SUFFIX = re.compile(rf"({'|'.join(map(re.escape, IMAGE_SUFFIXES))})$", re.IGNORECASE)


class _Part(NamedTuple):
    """A part of a name between separators."""

    text: str
    name: int
    """Index of the name."""
    tokens: list[str]
    """The name's parts between separators, and the separators."""
    first: int
    last: int


def needs_key(table: pa.Table, spec: PrepareSpec) -> bool:
    """Return whether the key column is not set and has to be found."""
    return spec.key_column == DEFAULT_KEY and DEFAULT_KEY not in table.column_names


def find_key(
    table: pa.Table, spec: PrepareSpec, list_names: Callable[[], pa.LargeStringArray]
) -> dict[str, Any]:
    """Return the key column, and the pattern of the images if it is not the default.

    The key is the column that names the images. If settings such as `prepare.image_column` say
    which images belong to a row, it is a column in them that is different in each row, else the
    first such column of text or with a name like an id.

    Args:
        table: A table without the default key column.
        spec: The `prepare` section.
        list_names: Returns the paths of the images.

    Raises:
        JobError: If the table is empty, no column fits, or each row has several images.
    """
    if not table.num_rows:
        raise JobError(f"the table {spec.table} has no rows")
    if found := find_pattern(table, spec, list_names):
        return found
    unique = list(_unique_columns(table, spec))
    named = [spec.image_column] if spec.image_column else parse_path_pattern(spec)[0]
    keys = [c for c in unique if c in named] or [c for c in unique if _is_id(table, c)]
    if keys and not _is_default(spec):
        return {"key_column": keys[0]}
    problem = (
        f"prepare.key_column: the table has no column {DEFAULT_KEY!r} (it has: "
        f"{names_text(table.column_names)})"
    )
    suggestion = f", such as {names_text(unique[:3])}" if unique else ""
    remedy = f"set prepare.key_column to a column that is different in each row{suggestion}"
    if _is_default(spec):
        column, patterns = _find_named(table, table.column_names, list_names())
        pattern = shlex.quote(patterns[0]) if patterns else "'{COLUMN}.jpg'"
        repeated = f"{column!r}, which repeats cells" if column else "none of its columns"
        problem += f", and the images are named after {repeated}"
        remedy += f", and add --prepare.image_pattern {pattern}"
    raise JobError(f"{problem}; {remedy}")


def find_pattern(
    table: pa.Table, spec: PrepareSpec, list_names: Callable[[], pa.LargeStringArray]
) -> dict[str, Any]:
    """Return key column and pattern by the names of the images, empty if they cannot be found.

    Args:
        table: The table; if it has the key column, no other one is considered.
        spec: The `prepare` section; without the default pattern, nothing is searched.
        list_names: Returns the paths of the images.

    Raises:
        JobError: If each row has several images.
    """
    if not _is_default(spec):
        return {}
    has_key = spec.key_column in table.column_names
    columns = [spec.key_column] if has_key else list(_unique_columns(table, spec))
    column, patterns = _find_named(table, columns, list_names())
    if len(patterns) > 1:
        raise _several_images(column, patterns)
    if not patterns:
        return {}
    is_default = patterns[0] == spec.image_pattern.replace(DEFAULT_KEY, column)
    return {"key_column": column} | ({} if is_default else {"image_pattern": patterns[0]})


def _is_default(spec: PrepareSpec) -> bool:
    """Whether no setting says which images belong to a row."""
    default = type(spec).model_fields["image_pattern"].default
    return not (spec.image_column or spec.image_columns or spec.image_pattern != default)


def describe_found(settings: Mapping[str, Any]) -> list[str]:
    """Return a note on settings that were found, if there are any."""
    found = ", ".join(f"prepare.{name}={value}" for name, value in settings.items())
    return [f"inferred from the data: {found}"] if found else []


def find_joined_key(
    table: pa.Table, spec: PrepareSpec, keys: pa.LargeStringArray
) -> dict[str, Any]:
    """Return the key column of a table whose cells are the keys of images in containers."""
    if not needs_key(table, spec):
        return {}

    def count_common(column: str) -> int:
        cells = table.column(column)
        rule = find_text_rule(cells)
        known = apply_text_rule(column_text(cells), rule)
        is_common = pc.is_in(apply_text_rule(keys, rule), value_set=known, skip_nulls=True)
        return pc.sum(is_common).as_py() or 0

    counts = {column: count_common(column) for column in _unique_columns(table, spec)}
    column = max(counts, key=lambda column: counts[column], default="")
    return {"key_column": column} if column and counts[column] else {}


def add_key(
    table: pa.Table, spec: PrepareSpec, refs: ImageRefs, may_find: bool = True
) -> tuple[pa.Table, dict[str, Any]]:
    """Return the records of containers with a key column, and the setting that names it.

    Without an id or text that is different in each row, or if none may be found, the key is the
    place of the image.
    """
    if not needs_key(table, spec):
        return table, {}
    ids = (column for column in _unique_columns(table, spec) if _is_id(table, column))
    if may_find and (column := next(ids, None)) is not None:
        return table, {"key_column": column}
    places = [refs.name(row) for row in range(len(refs))]
    return table.append_column(DEFAULT_KEY, pa.array(places, TEXT)), {"key_column": DEFAULT_KEY}


def _unique_columns(table: pa.Table, spec: PrepareSpec) -> Iterator[str]:
    """Yield the columns without a setting that are different in each row."""
    named = {
        spec.label_column, spec.group_column, spec.split_column, spec.fold_column,
        spec.weight_column, *(spec.numeric_columns or ()), *spec.number_rules,
    }  # fmt: skip
    for column in table.column_names:
        cells = table.column(column)
        if column not in named and not pa.types.is_floating(cells.type):
            # Arrow does not count the words of dictionaries.
            cells = cells if is_numeric(cells.type) else column_text(cells)
            num_different = pc.count_distinct(cells, mode="only_valid").as_py()
            if num_different >= max((1 - spec.max_bad_fraction) * len(cells), 1):
                yield column


def _is_id(table: pa.Table, column: str) -> bool:
    """Return whether a column is named like an id, or holds text that is no number."""
    cells = table.column(column)
    if ID_NAME.search(column):
        return True
    if find_text_rule(cells) in ("number", "boolean"):
        return False
    proposal = propose_rule(cells)
    return not proposal or proposal[1] < MIN_READ


def _several_images(column: str, patterns: Sequence[str]) -> JobError:
    flags = ""
    if found := _merge(patterns):
        pattern, names = found
        flags = (
            f"--prepare.image_pattern {shlex.quote(pattern)} --prepare.image_columns "
            f"{shlex.quote(','.join(names))} to use all of them, or "
        )
    return JobError(
        f"each {column} has several images ({', '.join(patterns)}); add --prepare.key_column "
        f"{shlex.quote(column)} and {flags}--prepare.image_pattern {shlex.quote(patterns[0])} to "
        "use one"
    )


def _find_named(
    table: pa.Table, columns: Sequence[str], names: pa.LargeStringArray
) -> tuple[str, tuple[str, ...]]:
    """Return the column whose cells occur in most names, and the patterns of the names.

    The column is empty and there are no patterns if no column fits.
    """
    at = np.linspace(0, len(names) - 1, min(len(names), _SAMPLE_NAMES)).astype(np.int64)
    paths = [name for name in names.take(pa.array(at)).to_pylist() if _SUFFIX.search(name)]
    bases = [path.rpartition("/")[2] for path in paths]
    for texts in (bases, paths):
        parts = _split_names(texts)
        counts = {c: _count_patterns(table.column(c), c, parts) for c in columns}
        # Of two columns with equally many matches, prefer the one that leaves less of the names.
        column = max(counts, key=lambda c: (counts[c].total(), -_rest(counts[c])), default="")
        # The images of other rows, such as a test set, may be in the same folder.
        expected = len(texts) * min(table.num_rows / max(len(names), 1), 1)
        is_named = column and counts[column].total() >= max(_MIN_MATCHED * expected, 1)
        if is_named and (patterns := _main_patterns(counts[column])):
            return column, patterns
    return "", ()


def _split_names(names: Sequence[str]) -> list[_Part]:
    """Return all parts of names between separators."""
    parts: list[_Part] = []
    for name, text in enumerate(names):
        tokens = re.split(f"({_SEPARATOR})", text)
        for first in range(0, len(tokens), 2):
            for last in range(first, len(tokens), 2):
                parts.append(_Part("".join(tokens[first : last + 1]), name, tokens, first, last))
    return parts


def _count_patterns(cells: pa.ChunkedArray, column: str, parts: Sequence[_Part]) -> Counter[str]:
    """Return the number of names by pattern, for the longest part of each name that is a cell."""
    rule = find_text_rule(cells)
    keys = apply_text_rule(pa.array([part.text for part in parts], TEXT), rule)
    known = apply_text_rule(column_text(cells), rule)
    # Cells may be paths with other folders.
    known = pa.concat_arrays([known, pc.replace_substring_regex(known, r"^.*[/\\]", "")])
    is_key = pc.is_in(keys, value_set=known)
    longest: dict[int, tuple[int, str]] = {}
    for at in np.flatnonzero(is_key.to_numpy(zero_copy_only=False)).tolist():
        text, name, tokens, first, last = parts[at]
        if len(text) > longest.get(name, (0, ""))[0]:
            pattern = f"{''.join(tokens[:first])}{{{column}}}{''.join(tokens[last + 1 :])}"
            longest[name] = len(text), pattern
    return Counter(pattern for _, pattern in longest.values())


def _rest(patterns: Counter[str]) -> int:
    """Return the number of characters around the keys, without extensions."""
    rests = {pattern: re.sub(r"\{[^{}]*\}", "", _SUFFIX.sub("", pattern)) for pattern in patterns}
    return sum(len(rests[pattern]) * count for pattern, count in patterns.items())


def _main_patterns(patterns: Counter[str]) -> tuple[str, ...]:
    """Return the patterns that cover most names, with `.*` for different extensions.

    There are none if that takes too many patterns.
    """
    suffixes: set[str] = set()
    stems = Counter[str]()
    for pattern, count in patterns.items():
        stem = _SUFFIX.sub("", pattern)
        stems[stem] += count
        suffixes.add(pattern[len(stem) :])
    suffix = suffixes.pop() if len(suffixes) == 1 else ".*"
    ((_, most),) = stems.most_common(1)
    main = [(stem, count) for stem, count in stems.most_common(_MAX_IMAGES) if 2 * count >= most]
    if sum(count for _, count in main) < _MAIN_SHARE * stems.total():
        return ()
    return tuple(stem + suffix for stem, _ in main)


def _merge(patterns: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return one pattern with `{image}` and its values, if the patterns differ in one word."""
    parts = [_PARTS.split(pattern) for pattern in patterns]
    if len({len(words) for words in parts}) > 1:
        return None
    different = [at for at, words in enumerate(zip(*parts, strict=True)) if len(set(words)) > 1]
    if len(different) != 1:
        return None
    names = sorted(words[different[0]] for words in parts)
    parts[0][different[0]] = "{image}"
    return ("".join(parts[0]), names) if all(names) else None
