import math

import pytest

from ray_jobs.train.telemetry.history_keys import sort_key


@pytest.mark.parametrize(
    ("metric", "best_first"),
    [("val/log_loss", [0.4, 0.5, 100.0]), ("val/roc_auc", [0.9, 0.8, 0.0])],
)
def test_values_sort_best_first_and_undefined_ones_last(metric, best_first):
    values = [None, math.nan, -math.inf, math.inf, *reversed(best_first)]
    ranked = sorted(values, key=lambda value: sort_key(metric, value))
    assert ranked[: len(best_first)] == best_first
