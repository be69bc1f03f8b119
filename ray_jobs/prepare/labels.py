"""Finds the two classes of the label column.

A problem with the whole column, such as a single class, raises an error here. A problem with one
cell quarantines its row in row_validation.py.
"""

# pyright: reportAttributeAccessIssue=false

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mm_model.nearest_match import did_you_mean
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.config.text import count_text
from ray_jobs.prepare.cell_text import column_text, label_key

MISSING, UNLABELLED, OTHER = -3, -2, -1
"""What a label is if it is of neither class: an empty cell, a mark in `prepare.unlabelled`, or a
word of no class."""

# Negative and positive label of columns that need no `positive_label`.
_PAIRS = (
    ("0", "1"), ("false", "true"), ("no", "yes"), ("n", "y"), ("f", "t"), ("negative", "positive"),
    ("neg", "pos"),
)  # fmt: skip
# Words that often mean unlabelled.
_MARKS = ("-1", "?", "none", "unknown", "uncertain", "unlabeled", "unlabelled", "missing")


@dataclass(frozen=True)
class Classes:
    """The two classes of a label column; labels are compared by `label_key`."""

    negative: str
    positive: str
    codes: Mapping[str, int]
    """0, 1 or `UNLABELLED` by the key of a label."""
    note: str

    def code(self, text: str | None) -> int:
        """Return 0, 1, `MISSING`, `UNLABELLED` or `OTHER` for the text of a cell."""
        key = label_key(text)
        return self.codes.get(key, MISSING if key == "" else OTHER)

    def codes_of(self, column: pa.ChunkedArray) -> np.ndarray:
        """Return the code of each cell as int8."""
        encoded = column_text(column).dictionary_encode()
        # The last entry is for null cells, whose code is -1.
        codes = [self.code(text) for text in [*encoded.dictionary.to_pylist(), None]]
        return np.array(codes, np.int8)[encoded.indices.fill_null(-1).to_numpy()]


def find_classes(column: pa.ChunkedArray, spec: PrepareSpec) -> Classes:
    """Return the classes of the label column.

    The positive class is `prepare.positive_label`, or the second word of 0 and 1, false and true,
    no and yes, and the like.

    Raises:
        JobError: If there is only one class, or it is unclear which labels are positive.
    """
    counts, spellings = _count_labels(column)
    column_name = f"the label column {spec.label_column!r}"
    values = _format_counts(counts, spellings)
    unlabelled = {label_key(text) for text in spec.unlabelled}
    labels = [key for key, _ in counts.most_common() if key and key not in unlabelled]
    if not labels:
        raise JobError(f"{column_name} is empty; choose another prepare.label_column")
    positive = [label_key(text) for text in spec.positive_label]
    for key, text in zip(positive, spec.positive_label, strict=True):
        if key not in labels:
            raise JobError(
                f"prepare.positive_label={text!r} does not occur in {column_name}"
                f"{did_you_mean(text, list(spellings.values()))} (it holds: {values})"
            )
    if len(labels) == len(set(positive)) or len(labels) == 1:
        raise JobError(
            f"{column_name} holds only one class ({values}); add rows of another class, or choose "
            "another prepare.label_column"
        )
    pair = next((pair for pair in _PAIRS if set(pair) <= set(labels)), None)
    if not positive:
        if pair is None:
            usual = [key for key in labels if key not in _MARKS]
            marks = [key for key in labels if key in _MARKS and len(usual) > 1]
            rarest = (usual if marks else labels)[-1]
            flags = f"--prepare.positive_label {_flag_text(spellings[rarest])}"
            if marks:
                flags += f" --prepare.unlabelled {_flag_text(spellings[marks[0]])}"
            raise JobError(
                f"{column_name} holds {values}; set which of them are positive, such as {flags}"
            )
        positive = [pair[1]]
    negative = [pair[0]] if pair and pair[1:] == tuple(positive) else []
    negative = negative or [next(key for key in labels if key not in positive)]
    others = [key for key in labels if key not in (*positive, *negative)]
    default = "negative" if spec.positive_label else "quarantine"
    if (spec.other_labels or default) == "negative":
        negative += others
        others = []
    num_other = sum(counts[key] for key in others)
    if num_other > spec.max_bad_fraction * len(column):
        raise JobError(
            f"{column_name} holds {len(labels)} values ({values}), but a binary classifier needs "
            f"two. Of {_names(others, spellings)}, add those that are positive to "
            "--prepare.positive_label; set --prepare.other_labels negative if all others are "
            "negative, or name marks without a meaning in --prepare.unlabelled"
        )
    codes = dict.fromkeys(unlabelled, UNLABELLED) | dict.fromkeys(negative, 0)
    codes |= dict.fromkeys(positive, 1)
    names = [_names(keys, spellings) for keys in (positive, negative)]
    return Classes(
        negative=spellings[negative[0]] if len(negative) == 1 else f"not {_joined(spec)}",
        positive=_joined(spec) or spellings[positive[0]],
        codes=codes,
        note=f"label {spec.label_column}: positive {names[0]}; negative {names[1]}",
    )


def _joined(spec: PrepareSpec) -> str:
    return " or ".join(spec.positive_label)


def _count_labels(column: pa.ChunkedArray) -> tuple[Counter[str], dict[str, str]]:
    """Return the number of rows and the most frequent spelling of each label, by key."""
    counts: Counter[str] = Counter()
    spellings: dict[str, str] = {}
    entries = pc.value_counts(column_text(column)).to_pylist()
    for entry in sorted(entries, key=lambda entry: (-entry["counts"], str(entry["values"]))):
        key = label_key(entry["values"])
        counts[key] += entry["counts"]
        spellings.setdefault(key, entry["values"] or "")
    return counts, spellings


def _format_counts(counts: Counter[str], spellings: Mapping[str, str]) -> str:
    shown = [(key, n) for key, n in counts.most_common() if key]
    text = ", ".join(f"{spellings[key]!r} {count_text(n, 'time')}" for key, n in shown[:6])
    return text + (", …" if len(shown) > 6 else "")


def _names(keys: Iterable[str], spellings: Mapping[str, str]) -> str:
    names = [repr(spellings[key]) for key in keys]
    return ", ".join(names[:6]) + (f" and {len(names) - 6:,} more" if len(names) > 6 else "")


def _flag_text(label: str) -> str:
    """Return a label as it is written after a flag."""
    return label if label.isalnum() else shlex.quote(json.dumps([label], ensure_ascii=False))
