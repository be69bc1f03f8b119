"""A step in all its ways, compared with each other and with Keras' `Model.fit`; see variants.py."""

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


def facts_of(folder: Path, replicas: int, which: str) -> dict[str, Any]:
    """Train variants of so many replicas in a process, since its devices are set once."""
    command = [sys.executable, "-m", "tests.ray_jobs.variants", str(folder), str(replicas), which]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1000)
    return json.loads((folder / f"facts-{replicas}.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Train variants of one and two replicas.

    Each process makes graphs on one core most of the time, so that two share a small machine well.
    """
    folder = tmp_path_factory.mktemp("variants")
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(facts_of, (folder, folder), (1, 2), ("fast", "fast"))
    return folder, one | two


@pytest.fixture(scope="module")
def trained_slowly(trained) -> tuple[Path, dict[str, Any]]:
    """Train the others, too."""
    folder, facts = trained
    for replicas in (1, 2, 4):
        facts = facts | facts_of(folder, replicas, "slow")
    return folder, facts


def weights(trained: tuple[Path, dict[str, Any]], name: str) -> dict[str, np.ndarray]:
    """Return what was learnt by gradients.

    Statistics of batch norms move once a part, and no variant draws other random states.
    """
    with np.load(trained[0] / f"{name}.npz", allow_pickle=False) as file:
        other = ("moving_", "seed_generator")
        return {k: file[k] for k in file.files if not any(part in k for part in other)}


def distance(trained: Any, name: str, other: str) -> float:
    return arrays.distance(weights(trained, name), weights(trained, other))


def test_one_worker_learns_what_model_fit_learns(trained):
    """50 steps, AdamW, moving average, focal loss, dropout, augmentation."""
    assert trained[1]["fifty"]["steps"] == 50
    assert distance(trained, "fifty", "fifty_by_fit") <= 1e-5


@pytest.mark.parametrize(("of", "name"), [("trained", "two"), slow("four")])
def test_several_replicas_learn_what_one_learns_with_all_that_is_random(request, of, name):
    trained = request.getfixturevalue(of)
    assert distance(trained, name, "one") <= 1e-4
    assert distance(trained, "one", "plain") > 1e-2
    assert trained[1][name]["replicas_alike"]


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
def test_all_replicas_hold_the_same_bits(request, of, name):
    assert request.getfixturevalue(of)[1][name]["replicas_alike"]


@pytest.mark.parametrize("of", ["trained", slow()])
def test_a_graph_is_made_once(request, of):
    assert {fact["traces"] for fact in request.getfixturevalue(of)[1].values()} == {1}


@pytest.mark.slow
def test_xla_learns_the_same(trained_slowly):
    assert distance(trained_slowly, "xla", "plain") <= 1e-4


@pytest.mark.parametrize(("of", "name"), [("trained", "accumulated_two"), slow("accumulated")])
def test_parts_of_a_step_add_up_to_the_step(request, of, name):
    """The parts hold the same rows, so that batch norms see the same in each as in all."""
    assert distance(request.getfixturevalue(of), name, "copies") <= 1e-4


@pytest.mark.slow
def test_parts_of_a_step_draw_what_the_step_would(trained_slowly):
    """Batch norms see other rows, so that only the losses are near each other."""
    facts = trained_slowly[1]
    first, second = (facts[name]["losses"] for name in ("accumulated_random", "one"))
    np.testing.assert_allclose(first, second, rtol=0.02)


def test_parts_of_an_exchange_are_the_exchange(trained):
    assert distance(trained, "exchanged_in_parts", "plain") <= 1e-4


@pytest.mark.parametrize(
    ("of", "name", "tolerance"),
    [
        ("trained", "float16", 0.002),
        slow("bfloat16", 0.01),
        slow("exchanged_bfloat16", 0.002),
    ],
)
def test_less_precision_learns_nearly_the_same(request, of, name, tolerance):
    trained = request.getfixturevalue(of)
    first, second = (trained[1][n]["losses"] for n in (name, "plain"))
    np.testing.assert_allclose(first, second, rtol=tolerance)
    assert weights(trained, name).keys() == weights(trained, "plain").keys()
    assert distance(trained, name, "plain") > 1e-6


def test_workers_skip_a_step_that_overflows_alike(trained):
    """The scale begins too high for the first steps, and comes down."""
    for name in ("float16", "float16_two"):
        assert trained[1][name]["scale"] <= 2**15
    losses = [trained[1][name]["losses"] for name in ("float16", "float16_two")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


@pytest.mark.slow
def test_steps_that_overflow_change_no_weight_until_the_scale_has_come_down(trained_slowly):
    """It begins at 2**40, and every step that overflows halves it."""
    fact = trained_slowly[1]["float16_high"]
    assert fact["still_after_epochs"] == [True, True, True, True, False, False]
    assert fact["scale"] < 2**25
    assert fact["finite"]


def test_the_norm_that_is_clipped_is_that_of_the_global_batch(trained):
    assert distance(trained, "clipped_two", "clipped") <= 1e-4
    assert distance(trained, "clipped", "plain") > 1e-3
