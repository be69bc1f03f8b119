"""Simulates evaluated rows with known faults."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from ray_jobs.evaluate.evaluated_rows import EvaluatedRows


def simulate(num_rows: int = 2000, seed: int = 0, **changes: Any) -> EvaluatedRows:
    """Return rows with right probabilities, two numbers and a word that say nothing."""
    rng = np.random.default_rng(seed)
    label_N = (rng.random(num_rows) < 0.4).astype(np.int8)
    score_N = rng.normal(size=num_rows) + 2 * label_N
    probability_N = 1 / (1 + np.exp(2 - 2 * score_N - np.log(0.4 / 0.6)))
    fields: dict[str, Any] = {
        "label_N": label_N,
        "probability_N": probability_N,
        "keys": [str(i) for i in range(num_rows)],
        "numbers": {"age": rng.normal(size=num_rows), "size": rng.normal(size=num_rows)},
        "words": {"site": pa.array(rng.choice(["arm", "leg", "back"], num_rows))},
    }
    return EvaluatedRows(**(fields | changes))


def with_bad_cohort(rows: EvaluatedRows) -> EvaluatedRows:
    """Replace the probabilities of old rows at the arm by random ones."""
    bad_N = (rows.numbers["age"] > 0.5) & (np.array(rows.words["site"].to_pylist()) == "arm")
    random_N = np.random.default_rng(5).random(len(rows.label_N))
    return replace(rows, probability_N=np.where(bad_N, random_N, rows.probability_N))
