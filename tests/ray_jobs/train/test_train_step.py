"""Variants of the training step on one or two devices are compared; see variants.py."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ray_jobs import arrays
from tests.ray_jobs.tiny import write_prepared
from tests.ray_jobs.variants import train_variants

pytestmark = [pytest.mark.multiworker, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[3]

Results = dict[str, dict[str, Any]]


def results_of(folder: Path, speed: str) -> Results:
    """Train with two devices in another process, because a process can set its devices only once.

    The variants with one device train meanwhile, since tracing uses one core.
    """
    import tensorflow as tf

    num_rows = {"train": 100, "validation": 20, "test": 5}
    write_prepared(folder / "prepared", num_rows)
    write_prepared(folder / "weighted", num_rows, weights=(0.1, 5, 2))
    write_prepared(folder / "texts", num_rows, texts=True)
    command = [sys.executable, "-m", "tests.ray_jobs.variants", str(folder), speed]
    with subprocess.Popen(command, cwd=ROOT) as other:
        one = train_variants(folder, speed, tf.distribute.get_strategy())
        assert other.wait(timeout=1000) == 0
    return one | pickle.loads((folder / "two.pickle").read_bytes())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Results:
    return results_of(tmp_path_factory.mktemp("fast"), "fast")


@pytest.fixture(scope="module")
def trained_slowly(tmp_path_factory) -> Results:
    return results_of(tmp_path_factory.mktemp("slow"), "slow")


def distance(results: Results, name: str, other: str) -> float:
    return arrays.distance(results[name]["weights"][-1], results[other]["weights"][-1])


def test_one_worker_trains_like_model_fit(trained):
    """50 steps, AdamW, moving average, focal loss, dropout, augmentation."""
    result = trained["fifty"]
    assert result["steps"] == result["iterations"] == 50
    other = ("moving_", "seed_generator")  # Batch-norm statistics and random states.
    ours, keras = (
        {k: v for k, v in result[name].items() if not any(part in k for part in other)}
        for name in ("averaged", "fitted")
    )
    assert arrays.distance(ours, keras) <= 1e-5


def test_weighted_rows_train_like_model_fit_with_sample_weight(trained):
    ours, keras = trained["weighted"]["weights"][-1], trained["weighted"]["fitted"]
    assert arrays.distance(ours, {name: keras[name] for name in ours}) <= 1e-5
    assert distance(trained, "weighted", "whole") > 1e-2


@pytest.mark.parametrize(
    ("parts", "whole"),
    [("parts", "whole"), ("clipped_parts", "clipped"), ("weighted_parts", "weighted")],
)
def test_accumulated_parts_and_exchanges_in_parts_equal_the_whole_step(trained, parts, whole):
    """Two replicas of two parts each; `clip_norm` applies to the gradient of the global batch."""
    assert distance(trained, parts, whole) <= 1e-4


def test_clip_norm_limits_the_gradient(trained):
    assert distance(trained, "clipped", "whole") > 1e-3


@pytest.mark.parametrize("name", ["overflowing", "overflowing_two"])
def test_overflowing_steps_change_no_weight_and_do_not_count(trained, name):
    """The scale starts at 2**40, and every overflowing step halves it."""
    result = trained[name]
    start, *epochs = result["weights"]
    unchanged = [arrays.same_arrays(start, weights) for weights in epochs]
    assert unchanged == sorted(unchanged, reverse=True)
    assert (unchanged[0], unchanged[-1]) == (True, False)
    assert result["finite"]
    assert result["iterations"] == result["steps"] - np.log2(2.0**40 / result["scale"])


@pytest.mark.parametrize("of", ["trained", pytest.param("trained_slowly", marks=pytest.mark.slow)])
def test_the_graph_is_traced_once_and_all_replicas_are_bitwise_equal(request, of):
    results = request.getfixturevalue(of)
    assert {result["traces"] for result in results.values()} == {1}
    equal = {
        name: r["replicas_equal"] for name, r in results.items() if r["replicas_equal"] is not None
    }
    assert len(equal) >= 3
    assert all(equal.values()), equal


@pytest.mark.slow
def test_two_replicas_train_like_one_with_random_operations(trained_slowly):
    assert distance(trained_slowly, "two", "one") <= 1e-4
    # Attention does not depend on the bias of its keys, whose gradient is rounding noise.
    two, one = (
        {k: v for k, v in trained_slowly[name]["weights"][-1].items() if "key/bias" not in k}
        for name in ("transformers_two", "transformers")
    )
    assert arrays.distance(two, one) <= 1e-4
    assert distance(trained_slowly, "one", "plain") > 1e-2


@pytest.mark.slow
def test_xla_trains_the_same(trained_slowly):
    assert distance(trained_slowly, "xla", "plain") <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        ("accumulated_copies", "copies"),
        ("accumulated_copies_two", "copies"),
        ("exchanged_in_parts", "plain"),
    ],
)
def test_parts_of_a_step_of_the_whole_network_equal_the_step(trained_slowly, parts, whole):
    """All accumulated parts contain the same rows, so batch norms compute the same statistics."""
    assert distance(trained_slowly, parts, whole) <= 1e-4


@pytest.mark.slow
def test_accumulated_parts_draw_the_same_random_numbers(trained_slowly):
    """Batch norms see other rows, so the losses agree only approximately."""
    first, second = (trained_slowly[name]["losses"] for name in ("accumulated", "one"))
    np.testing.assert_allclose(first, second, rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "other", "tolerance"),
    [
        ("float16", "plain", 0.002),
        ("bfloat16", "plain", 0.01),
        ("exchanged_bfloat16", "plain", 0.002),
        ("transformers_bfloat16", "transformers", 0.02),
    ],
)
def test_lower_precision_trains_almost_the_same(trained_slowly, name, other, tolerance):
    first, second = (trained_slowly[n]["losses"] for n in (name, other))
    np.testing.assert_allclose(first, second, rtol=tolerance)
    assert distance(trained_slowly, name, other) > 1e-6


@pytest.mark.slow
def test_replicas_skip_the_same_overflowing_steps(trained_slowly):
    """The initial loss scale may be too high for the first steps."""
    first, second = (trained_slowly[name]["losses"] for name in ("float16", "float16_two"))
    np.testing.assert_allclose(first, second, rtol=1e-3)
