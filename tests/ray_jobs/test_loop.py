"""The loop on real workers: one trainer of one worker, one of two, each through all scenarios."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_jobs.manifest import read_manifest
from ray_jobs.order import TrainingOrder
from ray_jobs.spec import DataSpec, RunSpec
from ray_jobs.storage import Folder
from tests.ray_jobs.tiny import ROW, write_prepared

pytestmark = pytest.mark.multiworker

PLAIN = {
    "image": {"kind": "tiny", "weights": None, "units": 16},
    "numeric": {"units": [16, 16]},
    "fusion": {"units": 16, "modality_dropout": 0},
    "augmentation": {
        "flip": "none", "rotation": 0, "zoom": 0, "translation": 0, "contrast": 0, "brightness": 0,
    },
    "dropout": 0,
}  # fmt: skip
SCENARIOS: dict[str, dict[str, Any]] = {
    # 20 steps on the same rows, whatever the number of workers.
    "synchronised": {
        "model": {**PLAIN, "batch_norm": "sync"},
        "train": {"epochs": 4, "global_batch_size": 20},
    },
    # Everything that is random, and batch norm of each worker's own rows.
    "random": {
        "model": {
            "image": PLAIN["image"],
            "numeric": {"units": [16, 16]},
            "fusion": {"units": 16, "kind": "gated"},
        },
        "train": {
            "epochs": 3,
            "global_batch_size": 16,
            "schedule": "plateau",
            "plateau_patience": 1,
        },
    },
    # What the first epoch is good for, and the next ones spoil: the labels' noise by heart.
    "patience": {
        "model": PLAIN,
        "train": {"epochs": 20, "global_batch_size": 20, "learning_rate": 0.05, "patience": 2},
    },
    # A backbone of keras.applications, whose variables are not all floats.
    "application": {
        "model": {**PLAIN, "image": {"kind": "efficientnet_b0", "weights": None, "units": 8}},
        "train": {"epochs": 1, "global_batch_size": 50},
    },
    # Nothing divides anything: 101 rows, 37 to validate, steps of 14.
    "uneven": {"model": PLAIN, "train": {"epochs": 20, "global_batch_size": 14}},
}


def spec_of(scenario: str, prepared: str, num_workers: int) -> RunSpec:
    sections = SCENARIOS[scenario]
    train = {
        "learning_rate": 1e-3,
        "patience": 100,
        **sections["train"],
        "num_workers": num_workers,
    }
    return RunSpec.model_validate(
        {"data": {"prepared": prepared}, "model": sections["model"], "train": train}
    )


def run_scenarios(config: dict[str, Any]) -> None:
    """Run every scenario on one worker; leave what it saw in files for the test."""
    import ray.train
    import tensorflow as tf

    from ray_jobs.loop import Loop, Place, set_devices

    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size())
    output = Path(config["output"])
    set_devices(1, use_gpu=False)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()

    class Watched(Loop):
        rows: list[list[int]]
        batches: list[Any]

        def _on_device(self, batches: Any) -> Any:
            for tensors in super()._on_device(batches):
                real = tensors.weight_B1.numpy()[:, 0] > 0
                numbers = tensors.inputs["numeric"].numpy()
                self.rows.append(numbers[real, ROW].astype(int).tolist())
                self.batches.append((tensors.inputs, tensors.label_B1, tensors.weight_B1))
                yield tensors

    for name in SCENARIOS:
        if name == "application" and place.num_workers == 1:
            continue
        spec = spec_of(name, config["prepared"], place.num_workers)
        loop = Watched(spec, read_manifest(Folder(spec.data.prepared)), place, strategy)
        loop.rows, loop.batches = [], []
        epochs: list[dict[str, Any]] = []

        def on_epoch(record, copy, name=name, epochs=epochs):
            saved = copy()
            np.savez(
                output / f"{name}-{len(epochs)}-{place.num_workers}-{place.rank}.npz",
                **{k.replace("/", "|"): v for k, v in saved.model.items()},
            )
            epochs.append(record)

        checkpoints: list[Any] = []

        def on_epoch_kept(record, copy, on_epoch=on_epoch, checkpoints=checkpoints):
            checkpoints.append(copy())
            on_epoch(record, copy)

        outcome = loop.run(on_epoch_kept, lambda event: None)
        graph = loop.train_step.get_concrete_function(*loop.batches[0]).graph.as_graph_def()
        facts = {
            "rows": loop.rows,
            "epochs": epochs,
            # In the graph and in every function that it calls.
            "collectives": str(graph).count('op: "CollectiveReduceV2"'),
            "variables": len(loop.model.trainable_variables),
            "label": outcome.label_N.tolist(),
            "history": [epoch["epoch"] for epoch in outcome.state.history],
            "best_epoch": outcome.state.best_epoch,
        }
        best = checkpoints[outcome.state.best_epoch or 0].model
        facts["best_restored"] = same_arrays(best, outcome.best_model)
        if name == "random":
            facts["resumed_alike"] = resumed_alike(loop, checkpoints)
        if name == "uneven":
            _, y_B1, weight_B1 = loop.batches[0]
            facts["weights"] = np.concatenate([y_B1, weight_B1], axis=1).tolist()
        if name == "synchronised" and place.num_workers == 1:
            facts["distance_to_fit"] = distance_to_fit(loop, spec)
        path = output / f"{name}-{place.num_workers}-{place.rank}.json"
        path.write_text(json.dumps(facts))


def same_arrays(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """Whether two copies of variables are bitwise the same, in the same order."""
    pairs = zip(first.values(), second.values(), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


def resumed_alike(loop: Any, undisturbed: list[Any]) -> list[bool]:
    """Go on from the first checkpoint in a loop of its own; compare what the others hold."""
    from ray_jobs.loop import Loop

    resumed: list[Any] = []
    again = Loop(loop.spec, loop.manifest, loop.place, loop.strategy)
    again.run(lambda record, copy: resumed.append(copy()), lambda event: None, undisturbed[0])
    return [
        same_arrays(getattr(a, part), getattr(b, part))
        for a, b in zip(undisturbed[1:], resumed, strict=True)
        for part in ("model", "optimizer", "best")
    ]


def distance_to_fit(loop: Any, spec: RunSpec) -> float:
    """Train a twin with Keras' own step on the same batches; return the largest distance."""
    import keras

    from mm_model.optimizer import make_optimizer
    from ray_jobs.loop import new_model

    keras.utils.set_random_seed(spec.run.seed)
    twin = new_model(spec, loop.manifest)
    total_steps = loop.order.steps_before(spec.train.epochs)
    twin.compile(make_optimizer(spec.train, total_steps), "binary_crossentropy", jit_compile=False)
    batches = iter(loop.batches)
    for epoch in range(spec.train.epochs):
        for inputs, y, weight in islice(batches, loop.order.num_steps(epoch)):
            twin.train_on_batch(inputs, y, sample_weight=weight)
        list(islice(batches, 2))  # 37 validation rows, 20 at once
    return max(
        float(np.abs(a.numpy() - b.numpy()).max() / max(np.abs(b.numpy()).max(), 1e-12))
        for a, b in zip(twin.trainable_variables, loop.model.trainable_variables, strict=True)
    )


@pytest.fixture(scope="module")
def seen(ray_local, tmp_path_factory) -> dict[str, Any]:
    """Train with one and with two workers; return what each left, and the manifest."""
    from ray.train import RunConfig, ScalingConfig

    from ray_jobs.tf_backend import KerasTrainer

    folder = tmp_path_factory.mktemp("loop")
    rows = {"train": 101, "validation": 37, "test": 5}
    manifest = write_prepared(folder / "prepared", rows, size=32)
    for num_workers in (1, 2):
        KerasTrainer(
            run_scenarios,
            train_loop_config={"output": str(folder), "prepared": str(folder / "prepared")},
            scaling_config=ScalingConfig(num_workers=num_workers),
            run_config=RunConfig(name=f"ray-{num_workers}", storage_path=str(folder)),
        ).fit()
    facts = {path.stem: json.loads(path.read_text()) for path in folder.glob("*-*-*.json")}
    return {"folder": folder, "manifest": manifest, **facts}


def arrays(seen: dict[str, Any], scenario: str, epoch: int, num_workers: int, rank: int) -> dict:
    path = seen["folder"] / f"{scenario}-{epoch}-{num_workers}-{rank}.npz"
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_two_workers_learn_what_one_learns(seen):
    one, two = arrays(seen, "synchronised", 3, 1, 0), arrays(seen, "synchronised", 3, 2, 0)
    start = arrays(seen, "synchronised", 0, 1, 0)
    assert seen["synchronised-1-0"]["epochs"][-1]["step"] == 20
    assert one.keys() == two.keys()
    for name, w in one.items():
        assert np.abs(two[name] - w).max() <= 1e-4 * np.abs(w).max(), name
    assert max(np.abs(w - start[name]).max() for name, w in one.items()) > 1e-3


def test_one_worker_learns_what_model_fit_learns(seen):
    assert seen["synchronised-1-0"]["distance_to_fit"] <= 1e-4


@pytest.mark.parametrize(("scenario", "epochs"), [("random", 3), ("uneven", 20)])
def test_all_workers_hold_bitwise_equal_weights_and_statistics_after_any_epoch(
    seen, scenario, epochs
):
    for epoch in range(epochs):
        first, second = (arrays(seen, scenario, epoch, 2, rank) for rank in (0, 1))
        assert any("moving_variance" in name for name in first)
        for name, value in first.items():
            assert value.tobytes() == second[name].tobytes(), (epoch, name)


@pytest.mark.parametrize("scenario", ["random", "uneven"])
def test_a_step_has_one_gradient_collective(seen, scenario):
    assert seen[f"{scenario}-2-0"]["variables"] > 20
    assert seen[f"{scenario}-2-0"]["collectives"] == 1


@pytest.mark.parametrize("num_workers", [1, 2])
def test_no_row_is_dropped_or_doubled_where_nothing_divides(seen, num_workers):
    facts = [seen[f"uneven-{num_workers}-{rank}"] for rank in range(num_workers)]
    order = TrainingOrder.of(seen["manifest"].splits["train"], 14, 0, DataSpec())
    trained, validated = Counter(), [Counter() for _ in range(20)]
    for fact in facts:
        batches = iter(fact["rows"])
        for epoch in range(20):
            for _ in range(order.num_steps(epoch)):
                rows = next(batches)
                assert len(rows) == 14 // num_workers
                trained.update(rows)
            while sum(validated[epoch].values()) < 37:
                rows = next(batches)
                validated[epoch].update(rows)
                if len(rows) < 14 // num_workers:
                    break
    assert sum(trained.values()) == 20 * 101 // 14 * 14
    # What no full step of the last epoch took is the only difference between two rows.
    assert set(trained.values()) <= {19, 20}
    for epoch in range(20):
        assert validated[epoch] == Counter(range(37))
    assert facts[0]["history"] == list(range(20))


def test_every_worker_sees_the_same_validation_rows_in_stored_order(seen):
    expected = [float(i % 3 == 0) for i in range(37)]
    for name in ("uneven-1-0", "uneven-2-0", "uneven-2-1"):
        assert seen[name]["label"] == expected


def test_every_worker_comes_to_the_same_records(seen):
    first, second = (seen[f"random-2-{rank}"]["epochs"] for rank in (0, 1))
    timing = ("data/", "time/")
    for a, b in zip(first, second, strict=True):
        same = [key for key in a if not key.startswith(timing)]
        assert {key: a[key] for key in same} == {key: b[key] for key in same}


def test_the_order_of_training_rows_does_not_depend_on_the_number_of_workers(seen):
    steps = [rows for rows in seen["synchronised-1-0"]["rows"]]
    halves = [seen[f"synchronised-2-{rank}"]["rows"] for rank in (0, 1)]
    assert steps[0] == halves[0][0] + halves[1][0]
    assert steps[4] == halves[0][4] + halves[1][4]


def test_training_stops_out_of_patience_and_returns_the_best_epoch(seen):
    for name in ("patience-1-0", "patience-2-0", "patience-2-1"):
        epochs = seen[name]["epochs"]
        losses = [epoch["val/log_loss"] for epoch in epochs]
        assert seen[name]["best_epoch"] == int(np.argmin(losses))
        assert len(epochs) == seen[name]["best_epoch"] + 1 + 2
        assert len(epochs) < 20
        assert seen[name]["best_restored"]


def test_a_run_resumed_from_a_checkpoint_goes_on_bitwise_alike(seen):
    """Plateau schedule, dropout, augmentation, batch norm of each worker's own rows."""
    for name in ("random-1-0", "random-2-0", "random-2-1"):
        assert seen[name]["resumed_alike"] == [True] * 6


def test_rows_are_weighed_as_scikit_learn_balances_classes(seen):
    from sklearn.utils.class_weight import compute_class_weight

    y = np.arange(101) % 3 == 0
    expected = compute_class_weight("balanced", classes=np.array([False, True]), y=y)
    weights = seen["uneven-2-0"]["weights"]
    assert {label for label, _ in weights} == {0.0, 1.0}
    for label, weight in weights:
        assert weight == pytest.approx(expected[int(label)])


def test_a_backbone_of_keras_applications_goes_through_an_epoch(seen):
    first, second = (arrays(seen, "application", 0, 2, rank) for rank in (0, 1))
    assert any("normalization" in name for name in first)
    for name, value in first.items():
        assert value.tobytes() == second[name].tobytes(), name


def test_pixels_become_a_tensor_without_a_copy_and_other_arrays_with_one():
    from ray_jobs.loop import as_tensor
    from ray_jobs.rows import aligned

    pixels = aligned((2, 5, 5, 3))
    pixels[:] = np.arange(150).reshape(pixels.shape)
    shifted = np.zeros(151, np.uint8)[1:]
    shared, copied = as_tensor(pixels), as_tensor(shifted)
    np.testing.assert_array_equal(shared, pixels)
    pixels[0, 0, 0, 0] = shifted[0] = 200
    assert (int(shared[0, 0, 0, 0]), int(copied[0])) == (200, 0)
    pixels.flags.writeable = False
    np.testing.assert_array_equal(as_tensor(pixels), pixels)
