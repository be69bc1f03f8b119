"""Measures how long the analysis of many predicted rows takes, and how much memory it needs.

Method: the analysis of `evaluate` (intervals, comparisons, slices, cohorts, thresholds), and the
training of its baselines, on simulated rows with 25 columns of numbers and 5 of words. The model
fails in one part of the rows, which the cohorts have to find.

Run:   python -m benchmarks.report [--rows 100000]
The last line of the output is JSON: seconds, and the highest memory of the process in MB.
"""

import argparse
import json
import resource
import time

import numpy as np
import pyarrow as pa

from ray_jobs.evaluate.analysis import BASELINE, OtherModel, analyse, head_models
from ray_jobs.evaluate.baselines import predict_baselines
from ray_jobs.evaluate.evaluated_rows import EvaluatedRows

_NUM_NUMBERS, _NUM_WORDS = 25, 5


def simulate(num_rows: int) -> EvaluatedRows:
    """Return rows whose probabilities are right, except for those with a large c0 and word a."""
    rng = np.random.default_rng(0)
    label_N = (rng.random(num_rows) < 0.3).astype(np.int8)
    score_N = rng.normal(size=num_rows) + 1.6 * label_N
    numbers = {f"c{i}": rng.normal(size=num_rows) + 0.1 * label_N for i in range(_NUM_NUMBERS)}
    numbers["c1"][rng.random(num_rows) < 0.1] = np.nan
    words = {f"w{i}": rng.choice(list("abcdefg"), num_rows) for i in range(_NUM_WORDS)}
    bad_N = (numbers["c0"] > 1) & (words["w0"] == "a")
    score_N[bad_N] = rng.normal(size=int(bad_N.sum()))
    return EvaluatedRows(
        label_N=label_N,
        probability_N=1 / (1 + np.exp(1.28 - 1.6 * score_N - np.log(3 / 7))),
        numbers=numbers,
        words={name: pa.array(values) for name, values in words.items()},
        logits_NM=np.stack([score_N, score_N + rng.normal(size=num_rows)], axis=1),
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    rows = simulate(parser.parse_args().rows)
    columns = pa.table({**rows.numbers, **rows.words})
    started = time.monotonic()
    train = columns.append_column("label", pa.array(rows.label_N))
    found = predict_baselines(train, columns, list(rows.numbers), list(rows.words))
    seconds = {"baselines": time.monotonic() - started}
    started = time.monotonic()
    others = head_models(rows, ("first", "second"), 0.5, rows)
    others += [OtherModel(BASELINE, name, p_N, 0.5) for name, p_N in found.items()]
    metrics = analyse(rows, 0.5, others, rows)
    seconds["analysis"] = time.monotonic() - started
    print(f"ROC AUC {metrics['roc_auc']:.4f}, {metrics['intervals']['roc_auc']}")
    print(f"{len(metrics['slices'])} slices; cohorts: {[c['value'] for c in metrics['cohorts']]}")
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"rows": len(rows.label_N), "seconds": seconds, "peak_mb": peak_mb}))


if __name__ == "__main__":
    main()
