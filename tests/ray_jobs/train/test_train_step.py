"""Variants of the training step, compared with each other and with `Model.fit`; see variants.py."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ray_jobs import arrays

pytestmark = [pytest.mark.multiworker, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[3]


def slow(*values: Any) -> Any:
    return pytest.param("trained_slowly", *values, marks=pytest.mark.slow)


def results_of(folder: Path, replicas: int, speed: str) -> dict[str, Any]:
    """Train variants in a process of their own, because its devices can be set only once."""
    command = [sys.executable, "-m", "tests.ray_jobs.variants", str(folder), str(replicas), speed]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1000)
    return json.loads((folder / f"results-{replicas}.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Train fast variants with one and two replicas, in parallel since tracing uses one core."""
    folder = tmp_path_factory.mktemp("variants")
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(results_of, (folder, folder), (1, 2), ("fast", "fast"))
    return folder, one | two


@pytest.fixture(scope="module")
def trained_slowly(trained) -> tuple[Path, dict[str, Any]]:
    """Also train the slow variants."""
    folder, results = trained
    for replicas in (1, 2, 4):
        results = results | results_of(folder, replicas, "slow")
    return folder, results


def weights(trained: tuple[Path, dict[str, Any]], name: str) -> dict[str, np.ndarray]:
    """Return the trained weights, without batch-norm statistics and random states."""
    with np.load(trained[0] / f"{name}.npz", allow_pickle=False) as file:
        other = ("moving_", "seed_generator")
        return {k: file[k] for k in file.files if not any(part in k for part in other)}


def distance(trained: Any, name: str, other: str) -> float:
    return arrays.distance(weights(trained, name), weights(trained, other))


def test_one_worker_trains_like_model_fit(trained):
    """50 steps, AdamW, moving average, focal loss, dropout, augmentation."""
    assert trained[1]["fifty"]["steps"] == 50
    assert distance(trained, "fifty", "fifty_by_fit") <= 1e-5


@pytest.mark.parametrize(("of", "name"), [("trained", "two"), slow("four")])
def test_several_replicas_train_like_one_with_random_operations(request, of, name):
    trained = request.getfixturevalue(of)
    assert distance(trained, name, "one") <= 1e-4
    assert distance(trained, "one", "plain") > 1e-2
    assert trained[1][name]["replicas_equal"]


@pytest.mark.parametrize(
    ("of", "name"),
    [
        ("trained", "float16_two"),
        ("trained", "accumulated_two"),
        ("trained", "exchanged_in_parts"),
        ("trained", "clipped_two"),
        slow("exchanged_bfloat16"),
    ],
)
def test_all_replicas_are_bitwise_equal(request, of, name):
    assert request.getfixturevalue(of)[1][name]["replicas_equal"]


@pytest.mark.parametrize("of", ["trained", slow()])
def test_the_graph_is_traced_once(request, of):
    assert {result["traces"] for result in request.getfixturevalue(of)[1].values()} == {1}


@pytest.mark.slow
def test_xla_trains_the_same(trained_slowly):
    assert distance(trained_slowly, "xla", "plain") <= 1e-4


@pytest.mark.parametrize(("of", "name"), [("trained", "accumulated_two"), slow("accumulated")])
def test_accumulated_parts_equal_the_whole_step(request, of, name):
    """All parts contain the same rows, so batch norms compute the same statistics."""
    assert distance(request.getfixturevalue(of), name, "copies") <= 1e-4


@pytest.mark.slow
def test_accumulated_parts_draw_the_same_random_numbers(trained_slowly):
    """Batch norms see other rows, so the losses agree only approximately."""
    results = trained_slowly[1]
    first, second = (results[name]["losses"] for name in ("accumulated_random", "one"))
    np.testing.assert_allclose(first, second, rtol=0.02)


def test_an_exchange_in_parts_equals_the_whole_exchange(trained):
    assert distance(trained, "exchanged_in_parts", "plain") <= 1e-4


@pytest.mark.parametrize(
    ("of", "name", "tolerance"),
    [
        ("trained", "float16", 0.002),
        slow("bfloat16", 0.01),
        slow("exchanged_bfloat16", 0.002),
    ],
)
def test_lower_precision_trains_almost_the_same(request, of, name, tolerance):
    trained = request.getfixturevalue(of)
    first, second = (trained[1][n]["losses"] for n in (name, "plain"))
    np.testing.assert_allclose(first, second, rtol=tolerance)
    assert weights(trained, name).keys() == weights(trained, "plain").keys()
    assert distance(trained, name, "plain") > 1e-6


def test_replicas_skip_the_same_overflowing_steps(trained):
    """The initial scale may be too high for the first steps."""
    for name in ("float16", "float16_two"):
        assert trained[1][name]["scale"] <= 2**15
    losses = [trained[1][name]["losses"] for name in ("float16", "float16_two")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_overflowing_steps_change_no_weight_and_do_not_count(trained):
    """The scale starts at 2**40, and every overflowing step halves it."""
    result = trained[1]["float16_high"]
    unchanged = result["unchanged_after_epochs"]
    assert unchanged == sorted(unchanged, reverse=True)
    assert (unchanged[0], unchanged[-1]) == (True, False)
    assert result["finite"]
    two = trained[1]["float16_high_two"]
    assert two["replicas_equal"]
    for one in (result, two):
        assert one["iterations"] == one["steps"] - np.log2(2.0**40 / one["scale"])
    assert trained[1]["fifty"]["iterations"] == 50


def test_clip_norm_applies_to_the_gradient_of_the_global_batch(trained):
    assert distance(trained, "clipped_two", "clipped") <= 1e-4
    assert distance(trained, "clipped", "plain") > 1e-3
