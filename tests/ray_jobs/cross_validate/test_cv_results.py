from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ray_jobs.cross_validate.cv_results import fold_findings


def summary(shifts: list[float], seed: int, num_groups: int | None = None) -> dict[str, Any]:
    """Return a summary of folds of 200 rows whose positives score higher by the given shifts."""
    rng = np.random.default_rng(seed)
    label = np.arange(200) % 4 == 0
    folds = [
        {
            "repeat": 1,
            "class_counts": [150, 50],
            "roc_auc": float(roc_auc_score(label, rng.normal(size=200) + shift * label)),
        }
        for shift in shifts
    ]
    num_rows = 200 * len(folds)
    return {"folds": folds, "num_rows": num_rows, "num_groups": num_groups or num_rows}


def test_folds_of_the_same_quality_have_a_finding_in_one_of_a_hundred_cases():
    found = [len(list(fold_findings(summary([1.5] * 5, seed)))) for seed in range(400)]
    assert np.mean(found) == pytest.approx(0.01, abs=0.015)


def test_a_fold_that_is_worse_than_the_others_is_found():
    (finding,) = fold_findings(summary([1.5, 1.5, 0.3, 1.5, 1.5], seed=0))
    assert finding.code == "unstable_folds"
    assert finding.text.startswith("The ROC AUC of the 5 folds is 0.")
    # Rows of a group are not independent.
    assert not list(fold_findings(summary([1.5, 1.5, 0.3, 1.5, 1.5], seed=0, num_groups=10)))
