"""The loop alone and on two real workers, in slow tests also on four; see scenarios.py."""

import pickle
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from ray_jobs.config.spec import DataSpec
from ray_jobs.data.manifest import read_manifest
from ray_jobs.data.sampler import TrainingSampler
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.arrays import distance, same_arrays
from tests.ray_jobs.scenarios import loop_of, run_scenario, run_scenarios
from tests.ray_jobs.tiny import write_prepared

pytestmark = [pytest.mark.multiworker, pytest.mark.timeout(1200)]

Results = dict[str, list[dict[str, Any]]]
"""Results of each rank by scenario."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    num_rows = {"train": 101, "validation": 37, "test": 5}
    write_prepared(folder / "prepared", num_rows, size=32)
    write_prepared(folder / "texts", num_rows, size=32, texts=True)
    return folder


@pytest.fixture(scope="module")
def one(folder) -> Results:
    """Results of this process alone, and what training left in the temporary folder."""
    from ray_jobs.cluster.strategy import WorkerContext

    (folder / "temporary").mkdir()
    with patch.object(tempfile, "tempdir", str(folder / "temporary")):
        loop = loop_of("synchronised", folder, WorkerContext())
        results = run_scenario("synchronised", loop, folder)
    return {"synchronised": [{**results, "temporary": list((folder / "temporary").iterdir())}]}


@pytest.fixture(scope="module")
def two(ray_local, folder, one) -> Results:
    return on_workers(folder, 2, ("synchronised", "random"))


@pytest.fixture(scope="module")
def two_slowly(ray_local, folder) -> Results:
    return on_workers(folder, 2, ("patience", "stages", "resumed", "transformers"))


@pytest.fixture(scope="module")
def four(ray_local, folder, two) -> Results:
    return on_workers(folder, 4, ("synchronised",))


def on_workers(folder: Path, num_workers: int, names: tuple[str, ...]) -> Results:
    from ray.train import RunConfig, ScalingConfig

    from ray_jobs.cluster.tf_backend import KerasTrainer

    KerasTrainer(
        run_scenarios,
        train_loop_config={"folder": str(folder), "scenarios": names},
        scaling_config=ScalingConfig(num_workers=num_workers),
        run_config=RunConfig(name=f"{names[0]}-{num_workers}", storage_path=str(folder)),
    ).fit()
    files = {
        name: [folder / f"{name}-{num_workers}-{rank}.pickle" for rank in range(num_workers)]
        for name in names
    }
    return {name: [pickle.loads(f.read_bytes()) for f in files[name]] for name in names}


@pytest.mark.parametrize("many", ["two", pytest.param("four", marks=pytest.mark.slow)])
def test_many_workers_train_like_one_with_random_operations(request, one, many):
    few, more = one["synchronised"][0], request.getfixturevalue(many)["synchronised"][0]
    # Seed generators are numbered by process.
    names = [[n for n in of["models"][3] if "seed_generator" not in n] for of in (few, more)]
    assert names[0] == names[1]
    assert more["records"][3]["step"] == 20
    assert distance(more["models"][3], few["models"][3]) <= 1e-4
    assert distance(more["models"][3], few["models"][0]) > 1e-2


@pytest.mark.parametrize(
    ("fewer", "many"), [("one", "two"), pytest.param("two", "four", marks=pytest.mark.slow)]
)
def test_a_run_that_resumes_with_twice_as_many_workers_trains_the_same(request, fewer, many):
    few, more = (request.getfixturevalue(name)["synchronised"][0] for name in (fewer, many))
    assert 0 < distance(more["first"]["model"], few["models"][3]) <= 1e-4


@pytest.mark.parametrize(("scenario", "epochs"), [("random", 3), ("synchronised", 4)])
def test_all_workers_have_the_same_weights_statistics_and_records(two, scenario, epochs):
    first, second = two[scenario]
    assert len(first["models"]) == len(first["records"]) == epochs
    assert any("moving_variance" in name for name in first["models"][0])
    assert all(map(same_arrays, first["models"], second["models"]))
    for a, b in zip(first["records"], second["records"], strict=True):
        same = [key for key in a if not key.startswith(("data/", "time/"))]
        assert {key: a[key] for key in same} == {key: b[key] for key in same}


def test_a_step_has_one_gradient_collective(two):
    assert sum("kernel" in name for name in two["random"][0]["models"][0]) > 5
    assert two["random"][0]["collectives"] == 1


def test_the_graph_is_traced_once(one, two):
    ranks = [*one["synchronised"], *two["synchronised"], *two["random"]]
    assert [results["traces"] for results in ranks] == [1] * 5


@pytest.mark.parametrize("of", ["one", "two"])
def test_no_row_is_dropped_or_repeated_with_uneven_sizes(request, folder, of):
    workers = request.getfixturevalue(of)["synchronised"]
    epochs, size = 4, 20 // len(workers)
    split = read_manifest(Folder(folder / "prepared")).splits["train"]
    sampler = TrainingSampler.of(split, 20, 0, DataSpec())
    trained, validated = Counter(), [Counter() for _ in range(epochs)]
    for worker in workers:
        batches = iter(worker["rows"])
        for epoch in range(epochs):
            for _ in range(sampler.num_steps(epoch)):
                rows = next(batches)
                assert len(rows) == size
                trained.update(rows)
            while sum(validated[epoch].values()) < 37:
                rows = next(batches)
                validated[epoch].update(rows)
                if len(rows) < size:
                    break
    assert sum(trained.values()) == epochs * 101 // 20 * 20
    # Rows that fill no complete step of the last epoch are used once less.
    assert set(trained.values()) == {epochs - 1, epochs}
    assert validated == [Counter(range(37))] * epochs
    assert workers[0]["history"] == list(range(epochs))


def test_rank_0_gets_all_validation_rows_in_stored_order(one, two):
    expected = [float(i % 3 == 0) for i in range(37)]
    for results in (one["synchronised"][0], two["synchronised"][0]):
        assert results["label"] == [expected] * len(results["label"])
        assert results["label"]


def test_rows_are_weighted_by_the_balanced_weights_of_their_classes(two):
    positives = sum(i % 3 == 0 for i in range(101))
    balanced = {0.0: 101 / 2 / (101 - positives), 1.0: 101 / 2 / positives}
    found = two["random"][0]["weights"]
    assert {label for label, _ in found} == {0.0, 1.0}
    assert [weight for _, weight in found] == pytest.approx([balanced[y] for y, _ in found])


def test_training_leaves_nothing_in_the_temporary_folder(one):
    """A killed worker could not delete the source that Autograph generates, for example."""
    assert one["synchronised"][0]["temporary"] == []


def test_checkpoints_are_early_enough_to_be_written_in_time(two):
    # Epochs of 6 steps; a failure may cost 4 steps, one of which is for writing.
    assert two["random"][0]["steps_of_checkpoints"] == [3, 6, 9, 12, 15, 18]


def test_a_run_resumed_from_a_stop_or_from_the_end_of_an_epoch_is_bitwise_equal(two):
    """With plateau schedule, moving average, mixup and dropout."""
    for results in two["random"]:
        assert results["first"]["step"] == 8
        assert not results["first"]["finished"]
        assert results["resumed_equal"] == [True, True]


def test_a_stop_at_the_last_step_of_an_epoch_ends_the_epoch(one):
    first = one["synchronised"][0]["first"]
    assert first["step"] == 10
    assert not first["finished"]
    assert first["undisturbed"]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["resumed", "transformers"])
def test_a_run_resumed_by_a_new_loop_from_any_checkpoint_is_bitwise_equal(two_slowly, scenario):
    """Within an epoch and at its end."""
    assert [results["resumed_equal"] for results in two_slowly[scenario]] == [[True] * 2] * 2


@pytest.mark.slow
def test_the_graph_is_traced_once_for_each_stage(two_slowly):
    """The count is of the last stage, which has a graph of its own."""
    assert [results["traces"] for results in two_slowly["stages"]] == [1, 1]


@pytest.mark.slow
def test_training_stops_without_patience_and_keeps_the_best_epoch(two_slowly):
    for rank, results in enumerate(two_slowly["patience"]):
        losses = [record["val/log_loss"] for record in results["records"]]
        best = results["best_epoch"]
        assert best == int(np.argmin(losses))
        assert len(losses) == best + 1 + 2
        assert len(losses) < 20
        # Only rank 0 keeps the best epoch.
        assert results["best"].keys() == ({best} if rank == 0 else set())
        if rank == 0:
            assert same_arrays(results["models"][best], results["best"][best])


@pytest.mark.slow
def test_a_backbone_is_frozen_and_unfrozen(two_slowly):
    first, second = two_slowly["stages"]
    assert all(map(same_arrays, first["models"], second["models"]))
    frozen, unfrozen = first["models"]
    moved = {name for name in frozen if frozen[name].tobytes() != unfrozen[name].tobytes()}
    lowest = {name for name in frozen if "stem" in name}
    assert lowest
    assert lowest <= moved
    # With variables that are not float32.
    assert any("normalization" in name for name in frozen)
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
