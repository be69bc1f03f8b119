"""The label column → its two classes, and the class of each cell.

What concerns the whole column (one class only, or it is unclear which two) is an error. Imports
neither Ray nor TensorFlow.
"""

# pyarrow makes the functions of its compute module when it is imported, unseen by pyright.
# pyright: reportAttributeAccessIssue=false

import re
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from mm_model.nearest_match import did_you_mean
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import PrepareSpec
from ray_jobs.prepare.table import texts_of

_MISSING_LABEL = ("nan", "na", "n/a", "<na>", "null")


@dataclass(frozen=True)
class Classes:
    """The two values of the label column, as text."""

    negative: str
    positive: str


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
    positive = (
        spec.positive_label if spec.positive_label is None else label_text(spec.positive_label)
    )
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
        classes = Classes("", *counts)
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


def _label_counts(column: pa.ChunkedArray) -> Counter[str]:
    """Return how often each label occurs, in one spelling; missing ones are left out."""
    counts: Counter[str] = Counter()
    for found in pc.value_counts(texts_of(column)).to_pylist():
        label = None if found["values"] is None else label_text(found["values"])
        if label is not None:
            counts[label] += found["counts"]
    return counts


def label_text(text: str) -> str | None:
    """Return a label's text in one spelling, None for a missing one."""
    if text.lower() in _MISSING_LABEL:
        return None
    if text.lower() in ("true", "false"):
        return text.lower()
    return re.sub(r"^([+-]?[0-9]+)\.0+$", r"\1", text)


def _counted(counts: Counter[str]) -> str:
    shown = ", ".join(f"{value!r} {n} times" for value, n in counts.most_common(6))
    return shown + (", …" if len(counts) > 6 else "")
