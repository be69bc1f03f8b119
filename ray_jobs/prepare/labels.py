"""Finds the two classes of the label column.

A problem with the whole column, such as a single class, raises an error here. A problem with one
cell quarantines its row in row_validation.py.
"""

# pyright: reportAttributeAccessIssue=false

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from mm_model.nearest_match import did_you_mean
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import PrepareSpec
from ray_jobs.config.text import count_text
from ray_jobs.prepare.cell_text import column_text, label_text


def find_classes(column: pa.ChunkedArray, spec: PrepareSpec) -> tuple[str, str]:
    """Return the negative and the positive class of the label column, as text.

    They are 0 and 1, false and true, or the positive label and the most frequent other value. Rows
    with further values go to quarantine, up to `max_bad_fraction` of all rows.

    Raises:
        JobError: If there is only one class, or it is unclear which values are the two classes.
    """
    counts = _count_labels(column)
    name, values = f"the label column {spec.label_column!r}", _format_counts(counts)
    too_many = f"{name} holds {len(counts)} values ({values}), but a binary classifier needs two"
    if not counts:
        raise JobError(f"{name} is empty; choose another prepare.label_column")
    positive = spec.positive_label and label_text(spec.positive_label)
    if positive is not None and positive not in counts:
        raise JobError(
            f"prepare.positive_label={spec.positive_label!r} does not occur in {name}"
            f"{did_you_mean(positive, list(counts))} (it holds: {values})"
        )
    if len(counts) == 1:
        raise JobError(
            f"{name} holds only one class ({values}); add rows of another class, or choose another "
            "prepare.label_column"
        )
    pairs = [pair for pair in (("0", "1"), ("false", "true")) if set(pair) <= counts.keys()]
    if positive is not None:
        negative = min(counts.keys() - {positive}, key=lambda value: (-counts[value], value))
        classes = (negative, positive)
    elif pairs:
        classes = pairs[0]
    elif len(counts) == 2:
        raise JobError(
            f"{name} holds {values}; set which of them counts as 1, such as "
            f"--prepare.positive_label {min(counts)!r}"
        )
    else:
        raise JobError(
            f"{too_many}; choose another prepare.label_column or set prepare.positive_label"
        )
    num_other = counts.total() - counts[classes[0]] - counts[classes[1]]
    unlabelled = 0 if spec.skip_unlabelled else len(column) - counts.total()
    if num_other and num_other + unlabelled > spec.max_bad_fraction * len(column):
        raise JobError(
            f"{too_many}; correct the values other than {classes[0]!r} and {classes[1]!r}, or "
            f"raise prepare.max_bad_fraction={spec.max_bad_fraction:g} to quarantine their rows"
        )
    return classes


def _count_labels(column: pa.ChunkedArray) -> Counter[str]:
    """Return the number of rows per label, without missing labels."""
    counts: Counter[str] = Counter()
    for entry in pc.value_counts(column_text(column).drop_null()).to_pylist():
        label = label_text(entry["values"])
        if label is not None:
            counts[label] += entry["counts"]
    return counts


def _format_counts(counts: Counter[str]) -> str:
    text = ", ".join(f"{value!r} {count_text(n, 'time')}" for value, n in counts.most_common(6))
    return text + (", …" if len(counts) > 6 else "")
