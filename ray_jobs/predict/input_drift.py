"""Compares rows with the training rows of a run, using only the files in its run folder.

Shapes: N rows, M heads.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ray_jobs.checks.column_drift import number_drift, word_drift
from ray_jobs.checks.finding import Finding, warning
from ray_jobs.config.text import count_text, names_text
from ray_jobs.predict.predictor import LOGITS, logits_array
from ray_jobs.predict.trained_run import TrainedRun
from ray_jobs.train.finalize import REFERENCE, VALIDATION, read_sample

_MIN_ROWS = 30


def input_drift(
    run: TrainedRun,
    numbers: Mapping[str, np.ndarray],
    words: Mapping[str, pa.Array],
    logits_NM: np.ndarray,
) -> list[dict[str, Any]]:
    """Return the drift of each column and of each head's logit, the largest first.

    Columns are compared with a sample of the training rows, and logits with those of the
    validation rows: a shift of the images shows in the logits of the image head (Rabanser et al.
    2019, "Failing Loudly: An Empirical Study of Methods for Detecting Dataset Shift"). Each entry
    has the `name` of the column or head and the fields of a `Drift`. The result is empty for too
    few rows, and for a run that an earlier version trained.

    Args:
        run: The run.
        numbers: Columns of numbers (N,), NaN for missing ones.
        words: Columns of words (N,), null for missing ones.
        logits_NM: Logits of the run's heads.
    """
    found: list[dict[str, Any]] = []
    reference = read_sample(run.folder, REFERENCE) or pa.table({})
    validation = read_sample(run.folder, VALIDATION) or pa.table({})
    known = reference.column_names
    for name, values in numbers.items():
        if name in known and len(values) >= _MIN_ROWS:
            train_N = reference[name].to_numpy().astype(np.float64)
            drift = number_drift(train_N, values.astype(np.float64))
            found.append({"name": name, **drift.model_dump()})
    for vocabulary in run.manifest.vocabularies:
        column = vocabulary.column
        if column in known and len(words.get(column, ())) >= _MIN_ROWS:
            counts = [
                np.bincount(vocabulary.codes(values.to_pylist()), minlength=vocabulary.num_codes)
                for values in (reference[column], words[column])
            ]
            found.append({"name": column, **word_drift(*counts).model_dump()})
    if run.heads and LOGITS in validation.column_names and len(logits_NM) >= _MIN_ROWS:
        validation_NM = logits_array(validation[LOGITS])
        for m, head in enumerate(run.heads):
            drift = number_drift(validation_NM[:, m], logits_NM[:, m])
            found.append({"name": f"{head} head", **drift.model_dump()})
    return sorted(found, key=lambda entry: -(entry["psi"] or 0.0))


def drift_findings(drift: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Yield findings on the columns and heads that differ from the training rows."""
    drifted = [entry for entry in drift if entry["values_drifted"]]
    if drifted:
        named = names_text(f"{entry['name']} (PSI {entry['psi']:.2f})" for entry in drifted)
        yield warning(
            "drift",
            f"{len(drifted)} of {len(drift)} columns and heads differ from the "
            f"training rows: {named}",
        )
    missing = [entry for entry in drift if entry["missing_drifted"]]
    if missing:
        named = names_text(entry["name"] for entry in missing)
        yield warning(
            "missing_drift",
            f"The fraction of missing values in {count_text(len(missing), 'column')} differs from "
            f"the training rows: {named}",
        )
