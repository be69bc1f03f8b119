"""Decides what each column of the table is: the one place where columns get their roles.

Input: the table, the settings, and the class of each row. Output: a `Column` for each column with
its role, the reason, and for a column that is left out the flag that would use it. `prepare` prints
them and stores them in the manifest.
"""

# pyright: reportAttributeAccessIssue=false

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.config.text import count_text, names_text
from ray_jobs.data.manifest import Column, Role
from ray_jobs.prepare.cell_text import MISSING_WORDS, TEXT, column_text, find_text_rule
from ray_jobs.prepare.given_splits import split_named
from ray_jobs.prepare.number_parsing import (
    is_date,
    is_numeric,
    parse_numbers,
    propose_rule,
    resolve_rule,
)
from ray_jobs.prepare.table import parse_path_pattern, shard_columns

LEAK_AUC = 0.999
"""A column that separates the classes with at least this AUC is left out as a copy of the label."""

_EXCLUDED, _UNLISTED = "in exclude_columns", "not in numeric_columns"
BY_SETTING = (_EXCLUDED, _UNLISTED)
"""Reasons of columns that a setting leaves out."""
_MIN_ARRANGEMENTS = 1e6
"""Number of ways to distribute the classes over the rows, below which a column may separate them by
chance."""
_MIN_COUNTER_ROWS = 10
MIN_READ = 0.9
"""Fraction of a column's cells that a rule must read to be proposed."""
_MAX_WORDS = 100
_MIN_ROWS_PER_WORD = 4
_MIN_SPACES = 2
"""Minimum average number of spaces per cell for a column to be proposed as free text."""
_PLAIN_WORD = re.compile(r"(?!(?:yes|no|on|off|true|false|null|none|y|n)$)[A-Za-z_][A-Za-z0-9_]*")
_INDEX_NAME = re.compile(
    r"^(unnamed: ?\d+(\.\d+)?|(__index_)?level_\d+(__)?|column \d+|index|)$", re.IGNORECASE
)
ID_NAME = re.compile(
    r"(?i:(^|[_ .-])(id|ids|uuid|guid|key)$|(^|_)id[_ ])|[a-z]I[Dd]$"
    r"|(?i:(case|client|customer|image|item|member|patient|person|record|sample|study|subject|user)"
    r"id$)"
)


def find_columns(
    table: pa.Table,
    spec: PrepareSpec,
    categorical: Sequence[str] = (),
    labels: np.ndarray | None = None,
    text: Sequence[str] = (),
) -> tuple[Column, ...]:
    """Return the role of each column of the table, in order.

    Settings decide first: `numeric_columns`, `number_rules`, `data.categorical`, `data.text` and
    `exclude_columns`. Of the other columns, numbers are inputs unless they identify rows, have one
    value or copy the label; text is left out, with a proposal, or used with `prepare.columns=auto`.

    Args:
        table: The table.
        spec: The `prepare` section.
        categorical: Columns of `data.categorical`.
        labels: Class of each row, negative if unknown; finds copies of the label.
        text: Columns of `data.text`.

    Raises:
        JobError: If an input has a reserved name, or no input is left.
    """
    fixed, is_automatic = dict(_fixed_roles(spec)), spec.numeric_columns is None
    columns = []
    for name in table.column_names:
        cells = table.column(name)
        if name in fixed:
            column = _text_column(name, fixed[name], cells, spec)
        elif name in spec.exclude_columns:
            column = _left_out(name, _EXCLUDED)
        elif name in categorical:
            column = _text_column(name, "category", cells, spec)
        elif name in text:
            column = _text_column(name, "text", cells, spec)
        elif name in (spec.number_rules if is_automatic else spec.numeric_columns):
            rule = spec.number_rules.get(name)
            rule = str(resolve_rule(cells, rule)) if rule else ""
            column = Column(name=name, role="number", rule=rule)
        elif not is_automatic:
            column = _left_out(name, _UNLISTED)
        else:
            column = _classify(name, cells, labels)
            if spec.columns == "auto" and column.proposed:
                rule = str(resolve_rule(cells, column.rule))
                column = column.model_copy(update={"role": column.proposed, "rule": rule})
                if column.role in ("category", "text"):
                    column = _text_column(name, column.role, cells, spec)
        columns.append(column)
    _require_inputs(columns, spec)
    return tuple(columns)


def proposed_flags(columns: Sequence[Column]) -> str:
    """Return the flags that use the columns with a proposal; empty if there is none."""
    unused = [column for column in columns if column.role == "left_out"]
    rules = {c.name: c.rule for c in unused if c.proposed == "number"}
    flags = [number_rules_flag(rules)] if rules else []
    for role, setting in (("category", "data.categorical"), ("text", "data.text")):
        if names := [c.name for c in unused if c.proposed == role]:
            listed = ", ".join(map(_word, names))
            is_plain = all(map(_PLAIN_WORD.fullmatch, names))
            value = ",".join(names) if is_plain else shlex.quote(f"[{listed}]")
            flags.append(f"--{setting} {value}")
    return " ".join(flags)


def number_rules_flag(rules: Mapping[str, str]) -> str:
    """Return the flag that sets the rules of some columns."""
    pairs = ", ".join(f"{_word(name)}: {_word(rule)}" for name, rule in rules.items())
    return f"--prepare.number_rules {shlex.quote(f'{{{pairs}}}')}"


def describe(columns: Sequence[Column]) -> Iterator[str]:
    """Yield lines that tell what each column is."""
    kinds = {"number": "numeric columns", "category": "categorical columns", "text": "text columns"}
    for role, text in kinds.items():
        names = [
            names_text([c.name]) + (f" ({c.rule})" if c.rule and role == "number" else "")
            for c in columns
            if c.role == role
        ]
        if names or role != "text":
            yield f"{text}: {', '.join(names) or 'none'}"
    for column in columns:
        if column.role == "left_out":
            yield f"left out: {names_text([column.name])} ({column.reason})"
    if flags := proposed_flags(columns):
        yield f"to use them, add {flags}"


def _fixed_roles(spec: PrepareSpec) -> Iterator[tuple[str, Role]]:
    """Yield the columns that a setting gives a role other than input, the main role last."""
    images = () if spec.image_separator else spec.image_columns
    paths: list[str | None] = [spec.image_column, *images]
    if not spec.image_column and (not images or "{image}" in spec.image_pattern):
        paths += parse_path_pattern(spec, next(iter(images), ""))[0]
    roles: list[tuple[str | None, Role]] = [
        *((path, "image") for path in paths),
        (spec.fold_column, "fold"),
        (spec.weight_column, "weight"),
        (spec.split_column, "split"),
        (spec.group_column, "group"),
        (spec.label_column, "label"),
        (spec.key_column, "key"),
    ]
    for name, role in roles:
        if name is not None:
            yield name, role


def _text_column(name: str, role: Role, cells: pa.ChunkedArray, spec: PrepareSpec) -> Column:
    if role == "text":
        # The note "No" of a small table is no boolean.
        return Column(name=name, role=role, rule=spec.text_rules.get(name) or "text")
    is_text = role in ("key", "group", "image", "category", "fold")
    rule = spec.text_rules.get(name) or (find_text_rule(cells) if is_text else "")
    return Column(name=name, role=role, rule=rule)


def _classify(name: str, cells: pa.ChunkedArray, labels: np.ndarray | None) -> Column:
    """Return the role of a column without a setting."""
    left_out = partial(_left_out, name)
    is_number = is_numeric(cells.type) or pa.types.is_boolean(cells.type)
    if is_number or is_date(cells.type):
        texts = cells.combine_chunks()
    else:
        texts = column_text(cells)
        texts = pc.if_else(pc.is_in(texts, pa.array(MISSING_WORDS, TEXT)), None, texts)
    num_filled = len(texts) - texts.null_count
    if not num_filled:
        return left_out("empty")
    num_words = pc.count_distinct(texts, mode="only_valid").as_py()
    if num_words == 1 and num_filled == len(texts):
        return left_out(f"always {texts[0].as_py()!r}")
    is_unique = num_words == num_filled and num_filled >= _MIN_COUNTER_ROWS
    values = None
    if not is_date(cells.type):
        values, is_invalid = parse_numbers(cells)
        # A few words among numbers quarantine their rows and do not drop the column.
        if int((~np.isnan(values)).sum()) <= int(is_invalid.sum()):
            values = None
    if values is None:
        return _classify_text(name, cells, texts, num_filled, num_words, labels)
    if is_unique and _is_counter(values):
        return left_out("a row number")
    if is_unique and _INDEX_NAME.search(name):
        return left_out("the index of a table, different in each row")
    if ID_NAME.search(name) and (values == np.floor(values))[~np.isnan(values)].all():
        if is_unique:
            return left_out("an id, different in each row")
        is_word = _are_words(num_words, num_filled)
        return left_out("an id of several rows", "category" if is_word else None)
    if auc := _leak(values, labels):
        return left_out(_leak_text(auc))
    return Column(name=name, role="number")


def _classify_text(
    name: str,
    cells: pa.ChunkedArray,
    texts: pa.LargeStringArray,
    num_filled: int,
    num_words: int,
    labels: np.ndarray | None,
) -> Column:
    left_out = partial(_left_out, name)
    first = texts.drop_null()[0].as_py()
    example = f"text such as {str(first)[:40]!r}"
    proposal = propose_rule(cells)
    if proposal and proposal[1] >= MIN_READ:
        rule, _ = proposal
        values, _ = parse_numbers(cells, resolve_rule(cells, rule))
        if auc := _leak(values, labels):
            reason = f"{example}, which {rule} reads, {_leak_text(auc)}"
            return left_out(reason)
        # The proposal is from a sample of the words.
        num_read = int((~np.isnan(values)).sum())
        reason = f"{example}; {rule} reads {num_read:,} of {count_text(num_filled, 'cell')}"
        if num_read >= MIN_READ * num_filled:
            return left_out(reason, "number", str(rule))
    words = texts.drop_null().unique().to_pylist() if num_words <= _MAX_WORDS else []
    if {"train", "test"} <= {split_named(word) for word in words}:
        reason = f"words of splits; to use them, add --prepare.split_column {shlex.quote(name)}"
        return left_out(reason)
    if _are_words(num_words, num_filled):
        codes = texts.dictionary_encode().indices.fill_null(-1).to_numpy() + 1
        if auc := _leak_of_words(codes, labels):
            return left_out(_leak_text(auc))
        reason = f"{count_text(num_words, 'word')} such as {str(first)[:40]!r}"
        return left_out(reason, "category")
    num_different = "all" if num_words == num_filled else f"{num_words:,}"
    reason = f"{example}, {num_different} different in {count_text(num_filled, 'row')}"
    num_spaces = pc.mean(pc.count_substring(texts, " ")).as_py()
    return left_out(reason, "text" if num_spaces >= _MIN_SPACES else None)


def _left_out(name: str, reason: str, proposed: Role | None = None, rule: str = "") -> Column:
    return Column(name=name, role="left_out", reason=reason, proposed=proposed, rule=rule)


def _are_words(num_words: int, num_filled: int) -> bool:
    """Whether a column has so few different cells that they can be categories."""
    return num_words <= _MAX_WORDS and num_words * _MIN_ROWS_PER_WORD <= num_filled


def _is_counter(values: np.ndarray) -> bool:
    """Whether integers are 0 to N - 1 or 1 to N, in any order."""
    low, high = np.nanmin(values), np.nanmax(values)
    return low in (0, 1) and high - low == len(values) - 1 and not np.isnan(values).any()


def _leak(values: np.ndarray, labels: np.ndarray | None) -> float | None:
    """Return the AUC of a column, or of its missing values, if it separates the classes."""
    if labels is None:
        return None
    from scipy.special import comb

    is_labelled, is_missing = labels >= 0, np.isnan(values)
    scores = [(values, is_labelled & ~is_missing)]
    if is_missing.any():
        scores.append((is_missing, is_labelled))
    for score, is_used in scores:
        y = labels[is_used] == 1
        num_positive = int(y.sum())
        if comb(len(y), num_positive) < _MIN_ARRANGEMENTS:
            continue
        # As scipy.stats.rankdata, which takes a second to import.
        _, place, counts = np.unique(score[is_used], return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
        above = ranks[y].sum() - num_positive * (num_positive + 1) / 2
        auc = float(above / (num_positive * (len(y) - num_positive)))
        if max(auc, 1 - auc) >= LEAK_AUC:
            return max(auc, 1 - auc)
    return None


def _leak_text(auc: float) -> str:
    return f"separates the classes on its own, AUC {auc:.3f}; a copy of the label?"


def _leak_of_words(codes: np.ndarray, labels: np.ndarray | None) -> float | None:
    """Return the AUC of a column of words, each scored by its positive fraction.

    Words of a single row count as one word, since each would separate its row by chance.
    """
    if labels is None:
        return None
    labels, codes = labels[labels >= 0], codes[labels >= 0]
    codes = np.where(np.bincount(codes)[codes] > 1, codes, 0)
    num_rows = np.bincount(codes)
    fractions = np.bincount(codes, labels == 1) / np.maximum(num_rows, 1)
    return _leak(fractions[codes], labels)


def _require_inputs(columns: Sequence[Column], spec: PrepareSpec) -> None:
    inputs = [column for column in columns if column.role in ("number", "category", "text")]
    for column in inputs:
        if column.name in shard_columns(spec):
            raise JobError(
                f"the {column.role} column {column.name!r} has the name of a reserved column of "
                "the shards; rename it in the table, or add it to prepare.exclude_columns"
            )
    if not inputs and spec.numeric_columns is None:
        flags = proposed_flags(columns)
        left = [column.name for column in columns if column.role == "left_out"]
        raise JobError(
            f"no column is left to learn from (left out: {names_text(left)}); "
            + (f"add {flags}, or " if flags else "name some in prepare.numeric_columns, or ")
            + "set prepare.numeric_columns to [] to learn from images alone"
        )


def _word(text: str) -> str:
    """Return a text as a YAML value."""
    return text if _PLAIN_WORD.fullmatch(text) else json.dumps(text, ensure_ascii=False)
