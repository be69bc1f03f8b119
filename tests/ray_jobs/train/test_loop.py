"""The loop on real workers: all scenarios with one and two workers, one scenario with four."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_jobs.config.spec import DataSpec
from ray_jobs.data.sampler import TrainingSampler
from tests.ray_jobs.scenarios import FAST, SCENARIOS, run_scenarios
from tests.ray_jobs.tiny import write_prepared

pytestmark = [pytest.mark.multiworker, pytest.mark.timeout(1200)]


def trained(folder: Path, scenarios: dict[int, tuple[str, ...]]) -> dict[str, Any]:
    """Train scenarios by their number of workers; return their results and the manifest."""
    from ray.train import RunConfig, ScalingConfig

    from ray_jobs.cluster.tf_backend import KerasTrainer

    rows = {"train": 101, "validation": 37, "test": 5}
    manifest = write_prepared(folder / "prepared", rows, size=32)
    config = {"output": str(folder), "prepared": str(folder / "prepared")}
    for num_workers, names in scenarios.items():
        KerasTrainer(
            run_scenarios,
            train_loop_config={**config, "scenarios": names},
            scaling_config=ScalingConfig(num_workers=num_workers),
            run_config=RunConfig(name=f"ray-{num_workers}", storage_path=str(folder)),
        ).fit()
    results = {path.stem: json.loads(path.read_text()) for path in folder.glob("*-*-*.json")}
    return {"folder": folder, "manifest": manifest, **results}


@pytest.fixture(scope="module")
def results(ray_local, tmp_path_factory) -> dict[str, Any]:
    """Results of the fast scenarios with one and two workers."""
    return trained(tmp_path_factory.mktemp("loop"), {1: FAST, 2: FAST})


@pytest.fixture(scope="module")
def slow_results(ray_local, tmp_path_factory) -> dict[str, Any]:
    """Results of the slow scenarios with two workers."""
    others = tuple(name for name in SCENARIOS if name not in FAST)
    return trained(tmp_path_factory.mktemp("slow"), {2: others})


@pytest.fixture(scope="module")
def results_of_four(ray_local, tmp_path_factory) -> dict[str, Any]:
    """Results of one scenario with one, two and four workers."""
    scenarios = dict.fromkeys((1, 2, 4), ("synchronised",))
    return trained(tmp_path_factory.mktemp("four"), scenarios)


MANY_WORKERS = pytest.mark.parametrize(
    ("of", "num_workers"),
    [("results", 2), pytest.param("results_of_four", 4, marks=pytest.mark.slow)],
)


def arrays(results: dict[str, Any], scenario: str, epoch: int, num_workers: int, rank: int) -> dict:
    path = results["folder"] / f"{scenario}-{epoch}-{num_workers}-{rank}.npz"
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@MANY_WORKERS
def test_many_workers_train_like_one_with_random_operations(request, of, num_workers):
    results = request.getfixturevalue(of)
    one, many = (arrays(results, "synchronised", 3, n, 0) for n in (1, num_workers))
    start = arrays(results, "synchronised", 0, 1, 0)
    assert results["synchronised-1-0"]["epochs"][-1]["step"] == 20
    assert one.keys() == many.keys()
    for name, w in one.items():
        assert np.abs(many[name] - w).max() <= 1e-4 * np.abs(w).max(), name
    assert max(np.abs(w - start[name]).max() for name, w in one.items()) > 1e-3


@MANY_WORKERS
def test_a_run_that_resumes_with_twice_as_many_workers_trains_the_same(request, of, num_workers):
    results = request.getfixturevalue(of)
    assert 0 < results[f"synchronised-{num_workers}-0"]["distance_of_resumed"] <= 1e-4


@pytest.mark.parametrize(("scenario", "epochs"), [("random", 3), ("uneven", 8)])
def test_weights_and_statistics_are_bitwise_equal_on_all_workers_after_each_epoch(
    results, scenario, epochs
):
    for epoch in range(epochs):
        first, second = (arrays(results, scenario, epoch, 2, rank) for rank in (0, 1))
        assert any("moving_variance" in name for name in first)
        for name, value in first.items():
            assert value.tobytes() == second[name].tobytes(), (epoch, name)


@pytest.mark.parametrize("scenario", ["random", "uneven"])
def test_a_step_has_one_gradient_collective(results, scenario):
    assert results[f"{scenario}-2-0"]["variables"] > 20
    assert results[f"{scenario}-2-0"]["collectives"] == 1


@pytest.mark.parametrize("num_workers", [1, 2])
def test_no_row_is_dropped_or_repeated_with_uneven_sizes(results, num_workers):
    workers = [results[f"uneven-{num_workers}-{rank}"] for rank in range(num_workers)]
    sampler = TrainingSampler.of(results["manifest"].splits["train"], 14, 0, DataSpec())
    trained, validated = Counter(), [Counter() for _ in range(8)]
    for worker in workers:
        batches = iter(worker["rows"])
        for epoch in range(8):
            for _ in range(sampler.num_steps(epoch)):
                rows = next(batches)
                assert len(rows) == 14 // num_workers
                trained.update(rows)
            while sum(validated[epoch].values()) < 37:
                rows = next(batches)
                validated[epoch].update(rows)
                if len(rows) < 14 // num_workers:
                    break
    assert sum(trained.values()) == 8 * 101 // 14 * 14
    # Rows that fill no complete step of the last epoch are used once less.
    assert set(trained.values()) <= {7, 8}
    for epoch in range(8):
        assert validated[epoch] == Counter(range(37))
    assert workers[0]["history"] == list(range(8))


def test_rank_0_gets_all_validation_rows_in_stored_order(results):
    expected = [float(i % 3 == 0) for i in range(37)]
    for name in ("uneven-1-0", "uneven-2-0"):
        assert results[name]["label"] == expected


def test_all_workers_have_the_same_records(results):
    first, second = (results[f"random-2-{rank}"]["epochs"] for rank in (0, 1))
    timing = ("data/", "time/")
    for a, b in zip(first, second, strict=True):
        same = [key for key in a if not key.startswith(timing)]
        assert {key: a[key] for key in same} == {key: b[key] for key in same}


def test_the_order_of_training_rows_does_not_depend_on_the_number_of_workers(results):
    steps = [rows for rows in results["synchronised-1-0"]["rows"]]
    halves = [results[f"synchronised-2-{rank}"]["rows"] for rank in (0, 1)]
    assert steps[0] == halves[0][0] + halves[1][0]
    assert steps[4] == halves[0][4] + halves[1][4]


@pytest.mark.slow
def test_training_stops_without_patience_and_returns_the_best_epoch(slow_results):
    results = slow_results
    for name in ("patience-2-0", "patience-2-1"):
        epochs = results[name]["epochs"]
        losses = [epoch["val/log_loss"] for epoch in epochs]
        assert results[name]["best_epoch"] == int(np.argmin(losses))
        assert len(epochs) == results[name]["best_epoch"] + 1 + 2
        assert len(epochs) < 20
        # Only rank 0 keeps the best epoch.
        assert results[name].get("best_is_kept", name.endswith("1"))


@pytest.mark.slow
def test_a_run_resumed_from_any_checkpoint_is_bitwise_equal(slow_results):
    """Within and between epochs, with plateau schedule, moving average, mixup and dropout."""
    for name in ("resumed-2-0", "resumed-2-1"):
        assert slow_results[name]["resumed_equal"] == [True] * 2


def test_checkpoints_are_early_enough_to_be_written_in_time(results):
    # Epochs of 6 steps; a failure may cost 4 steps, one of which is for writing.
    assert results["random-2-0"]["steps_of_checkpoints"] == [3, 6, 9, 12, 15, 18]


def test_a_run_stopped_at_any_step_resumes_bitwise_equal(results):
    for name in ("random-2-0", "random-2-1"):
        stopped, step, saved_step, equal = results[name]["stopped_equal"]
        assert stopped
        assert step == saved_step == 8
        assert equal


def test_a_stop_at_the_last_step_of_an_epoch_ends_the_epoch(results):
    assert results["random-1-0"]["stopped_between"] == [True, 6, 1, True]


def test_the_graph_is_traced_once(results):
    assert results["random-2-0"]["traces"] == 1
    assert results["uneven-2-0"]["traces"] == 1


@pytest.mark.slow
def test_the_graph_is_traced_again_for_another_stage(slow_results):
    assert slow_results["stages-2-0"]["traces"] == 2


def test_class_weights_equal_those_of_scikit_learn(results):
    from sklearn.utils.class_weight import compute_class_weight

    y = np.arange(101) % 3 == 0
    expected = compute_class_weight("balanced", classes=np.array([False, True]), y=y)
    weights = results["uneven-2-0"]["weights"]
    assert {label for label, _ in weights} == {0.0, 1.0}
    for label, weight in weights:
        assert weight == pytest.approx(expected[int(label)])


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "stem"), [("stages", "image_conv0"), ("application", "stem")])
def test_a_backbone_is_frozen_and_unfrozen(slow_results, scenario, stem):
    results = slow_results
    for epoch in (0, 1):
        first, second = (arrays(results, scenario, epoch, 2, rank) for rank in (0, 1))
        for name, value in first.items():
            assert value.tobytes() == second[name].tobytes(), name
    frozen, unfrozen = (arrays(results, scenario, epoch, 2, 0) for epoch in (0, 1))
    moved = {name for name in frozen if frozen[name].tobytes() != unfrozen[name].tobytes()}
    lowest = {name for name in frozen if stem in name}
    assert lowest
    assert lowest <= moved
    # With variables that are not float32.
    assert scenario == "stages" or any("normalization" in name for name in frozen)
    # Frozen batch norms keep their initial statistics.
    means = [name for name in lowest if "moving_mean" in name]
    assert means
    assert all(not frozen[name].any() for name in means)


def test_only_aligned_writable_arrays_share_memory_with_their_tensor():
    from ray_jobs.data.decoder import aligned_array
    from ray_jobs.train.device_batch import as_tensor

    pixels = aligned_array((2, 5, 5, 3))
    pixels[:] = np.arange(150).reshape(pixels.shape)
    shifted = np.zeros(151, np.uint8)[1:]
    shared, copied = as_tensor(pixels), as_tensor(shifted)
    np.testing.assert_array_equal(shared, pixels)
    pixels[0, 0, 0, 0] = shifted[0] = 200
    assert (int(shared[0, 0, 0, 0]), int(copied[0])) == (200, 0)
    pixels.flags.writeable = False
    np.testing.assert_array_equal(as_tensor(pixels), pixels)
