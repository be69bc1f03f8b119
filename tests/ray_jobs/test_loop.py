"""The loop on real workers: one trainer of one worker, one of two, each through all scenarios."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_jobs.checkpoint import LoopState, Saved
from ray_jobs.hooks import Hooks, Wish
from ray_jobs.manifest import read_manifest
from ray_jobs.order import TrainingOrder
from ray_jobs.spec import DataSpec, RunSpec
from ray_jobs.storage import Folder
from tests.ray_jobs.tiny import ROW, write_prepared

pytestmark = [pytest.mark.multiworker, pytest.mark.timeout(1200)]

PLAIN = {
    "image": {"kind": "tiny", "weights": None, "units": 16},
    "numeric": {"units": [16, 16]},
    "fusion": {"units": 16, "modality_dropout": 0},
    "augmentation": {
        "flip": "none", "rotation": 0, "zoom": 0, "translation": 0, "contrast": 0, "brightness": 0,
    },
    "dropout": 0,
}  # fmt: skip
RANDOM = {"image": PLAIN["image"], "numeric": PLAIN["numeric"], "fusion": {"units": 16}}
"""Dropout, modality dropout and augmentation as they come."""
SCENARIOS: dict[str, dict[str, Any]] = {
    # 20 steps on the same rows with the same draws, whatever the number of workers.
    "synchronised": {
        "model": {**RANDOM, "batch_norm": "sync"},
        "train": {"epochs": 4, "global_batch_size": 20, "checkpoint_every_steps": 3},
    },
    # Everything that is random, and batch norm of each worker's own rows.
    "random": {
        "model": {**RANDOM, "augmentation": {**PLAIN["augmentation"], "flip": "horizontal"}},
        "train": {
            "epochs": 3,
            "global_batch_size": 16,
            "schedule": "plateau",
            "plateau_patience": 1,
            "checkpoint_every_steps": 4,
            "ema_momentum": 0.9,
            "mixup_alpha": 0.2,
        },
    },
    # What the first epoch is good for, and the next ones spoil: the labels' noise by heart.
    "patience": {
        "model": PLAIN,
        "train": {"epochs": 20, "global_batch_size": 20, "learning_rate": 0.05, "patience": 2},
    },
    # A backbone of keras.applications, whose variables are not all floats; frozen at first.
    "application": {
        "model": {**PLAIN, "image": {"kind": "efficientnet_b0", "weights": None, "units": 8}},
        "train": {
            "epochs": 2,
            "global_batch_size": 50,
            "stages": [{"epochs": 1, "backbone": 0}, {"epochs": 1, "backbone_rate": 0.1}],
        },
    },
    # Nothing divides anything: 101 rows, 37 to validate, steps of 14.
    "uneven": {"model": PLAIN, "train": {"epochs": 20, "global_batch_size": 14}},
}
ALSO_ON_FOUR = ("synchronised",)


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


class Kept(Hooks):
    """Keeps every checkpoint and record; wishes to stop when it is time."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.checkpoints: list[Saved] = []
        self.epochs: list[dict[str, Any]] = []
        self.step, self.stop_at = 0, stop_at

    def after_step(self, step: int) -> None:
        self.step = step

    def wish(self) -> Wish:
        return Wish(stop=self.stop_at is not None and self.step >= self.stop_at)

    def on_checkpoint(self, step: int, copy: Any) -> None:
        self.checkpoints.append(copy())

    def on_epoch(self, record: dict[str, Any], copy: Any) -> None:
        self.checkpoints.append(copy())
        self.epochs.append(record)


def run_scenarios(config: dict[str, Any]) -> None:
    """Run every scenario on one worker; leave what it saw in files for the test."""
    import ray.train

    from ray_jobs.loop import Loop
    from ray_jobs.replicas import Place, make_strategy, set_devices

    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size())
    output = Path(config["output"])
    set_devices(1, use_gpu=False)
    strategy = make_strategy(place.num_workers)

    class Watched(Loop):
        rows: list[list[int]]
        calls: list[Any]

        def _watched(self, tensors: Any) -> Any:
            real = tensors.weight_B1.numpy()[:, 0] > 0
            numbers = tensors.inputs["numeric"].numpy()
            self.rows.append(numbers[real, ROW].astype(int).tolist())
            return tensors

        def _steps(self, *arguments: Any) -> Any:
            for tensors in super()._steps(*arguments):
                self.calls.append((tensors.inputs, tensors.label_B1, tensors.weight_B1))
                yield self._watched(tensors)

        def _on_device(self, batches: Any) -> Any:
            yield from map(self._watched, super()._on_device(batches))

    for name in SCENARIOS:
        if place.num_workers == 4 and name not in ALSO_ON_FOUR:
            continue
        if name == "application" and place.num_workers == 1:
            continue
        spec = spec_of(name, config["prepared"], place.num_workers)
        manifest = read_manifest(Folder(spec.data.prepared))
        loop = Watched(spec, manifest, place, strategy)
        loop.rows, loop.calls, hooks = [], [], Kept()
        outcome = loop.run(hooks)
        after_epochs = [c for c in hooks.checkpoints if not c.local]
        for epoch, saved in enumerate(after_epochs):
            np.savez(
                output / f"{name}-{epoch}-{place.num_workers}-{place.rank}.npz",
                **{k.replace("/", "|"): v for k, v in saved.model.items()},
            )
        graph = loop.stepper.call.get_concrete_function(*loop.calls[-1]).graph.as_graph_def()
        best = outcome.best
        assert best is not None
        facts = {
            "rows": loop.rows,
            "epochs": hooks.epochs,
            # In the graph and in every function that it calls.
            "collectives": str(graph).count('op: "CollectiveReduceV2"'),
            "traces": loop.stepper.call.experimental_get_tracing_count(),
            "variables": len(loop.model.trainable_variables),
            "label": best.label_N.tolist(),
            "history": [epoch["epoch"] for epoch in outcome.state.history],
            "best_epoch": outcome.state.best_epoch,
            "steps_of_checkpoints": [c.state.step for c in hooks.checkpoints],
        }
        own = after_epochs[outcome.state.best_epoch or 0].model
        facts["best_restored"] = same_arrays(own, best.model)
        if name == "random":
            facts["resumed_alike"] = resumed_alike(loop, hooks.checkpoints)
            facts["stopped_alike"] = stopped_alike(loop, hooks.checkpoints)
        if name == "synchronised":
            facts["distance_of_resumed"] = distance_of_resumed(loop, output, hooks.checkpoints)
        if name == "uneven":
            _, y_B1, weight_B1 = loop.calls[0]
            facts["weights"] = np.concatenate([y_B1, weight_B1], axis=1).tolist()
        path = output / f"{name}-{place.num_workers}-{place.rank}.json"
        path.write_text(json.dumps(facts))


def same_arrays(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """Whether two copies of variables are bitwise the same, in the same order."""
    pairs = zip(first.values(), second.values(), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


def same_checkpoints(first: Saved, second: Saved) -> bool:
    """Whether two checkpoints are bitwise the same, but for times."""

    def untimed(record: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in record.items() if not k.startswith(("time/", "data/"))}

    def state(saved: Saved) -> LoopState:
        history = tuple(map(untimed, saved.state.history))
        return saved.state.model_copy(update={"history": history})

    return (
        state(first) == state(second)
        and same_arrays(first.model, second.model)
        and same_arrays(first.optimizer, second.optimizer)
        and same_arrays(first.local, second.local)
        and first.best.keys() == second.best.keys()
        and all(same_arrays(first.best[e].model, second.best[e].model) for e in first.best)
    )


def resumed_alike(loop: Any, undisturbed: list[Saved]) -> list[bool]:
    """Go on from some checkpoints in loops of their own; compare all later ones bit by bit."""
    from ray_jobs.loop import Loop

    alike = []
    # In the first epoch, and at its end.
    for start in (0, 1):
        hooks = Kept()
        again = Loop(loop.spec, loop.manifest, loop.place, loop.replicas.strategy)
        again.run(hooks, undisturbed[start])
        pairs = zip(undisturbed[start + 1 :], hooks.checkpoints, strict=True)
        alike.append(all(same_checkpoints(a, b) for a, b in pairs))
    return alike


def stopped_alike(loop: Any, undisturbed: list[Saved]) -> list[Any]:
    """Stop where no checkpoint is due, go on from there; compare the end."""
    from ray_jobs import loop as module
    from ray_jobs.loop import Loop

    hooks = Kept(stop_at=8)
    loop = Loop(loop.spec, loop.manifest, loop.place, loop.replicas.strategy)
    seconds, module._LOOK_UP_S = module._LOOK_UP_S, 0.0
    outcome = loop.run(hooks)
    module._LOOK_UP_S = seconds
    last = hooks.checkpoints[-1]
    rest = Kept()
    Loop(loop.spec, loop.manifest, loop.place, loop.replicas.strategy).run(rest, last)
    alike = same_checkpoints(undisturbed[-1], rest.checkpoints[-1])
    return [outcome.best is None, outcome.state.step, last.state.step, alike]


def distance_of_resumed(loop: Any, output: Path, undisturbed: list[Saved]) -> float:
    """Go on from another number of workers' checkpoint; return the distance to their end."""
    from ray_jobs.checkpoint import read_checkpoint, write_checkpoint
    from ray_jobs.loop import Loop

    num_workers = loop.place.num_workers
    if loop.place.rank == 0:
        for name, saved in (("middle", undisturbed[2]), ("end", undisturbed[-1])):
            folder = output / f"{name}-{num_workers}"
            folder.mkdir()
            saved.best = {}
            write_checkpoint(folder, saved)
    if num_workers == 1:
        return 0.0
    middle = read_checkpoint(output / f"middle-{num_workers // 2}")
    assert middle.local
    hooks = Kept()
    Loop(loop.spec, loop.manifest, loop.place, loop.replicas.strategy).run(hooks, middle)
    end = read_checkpoint(output / f"end-{num_workers // 2}")
    return distance(hooks.checkpoints[-1].model, end.model)


def distance(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    """Return the largest distance of two tensors, as a share of the largest weight in them."""
    pairs = zip(first.values(), second.values(), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12)) for a, b in pairs)


@pytest.fixture(scope="module")
def seen(ray_local, tmp_path_factory) -> dict[str, Any]:
    """Train with one, two and four workers; return what each left, and the manifest."""
    from ray.train import RunConfig, ScalingConfig

    from ray_jobs.tf_backend import KerasTrainer

    folder = tmp_path_factory.mktemp("loop")
    rows = {"train": 101, "validation": 37, "test": 5}
    manifest = write_prepared(folder / "prepared", rows, size=32)
    for num_workers in (1, 2, 4):
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


@pytest.mark.parametrize("num_workers", [2, 4])
def test_many_workers_learn_what_one_learns_with_all_that_is_random(seen, num_workers):
    one, many = (arrays(seen, "synchronised", 3, n, 0) for n in (1, num_workers))
    start = arrays(seen, "synchronised", 0, 1, 0)
    assert seen["synchronised-1-0"]["epochs"][-1]["step"] == 20
    assert one.keys() == many.keys()
    for name, w in one.items():
        assert np.abs(many[name] - w).max() <= 1e-4 * np.abs(w).max(), name
    assert max(np.abs(w - start[name]).max() for name, w in one.items()) > 1e-3


@pytest.mark.parametrize("num_workers", [2, 4])
def test_a_run_that_goes_on_with_twice_as_many_workers_learns_the_same(seen, num_workers):
    assert 0 < seen[f"synchronised-{num_workers}-0"]["distance_of_resumed"] <= 1e-4


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


def test_a_run_resumed_from_any_checkpoint_goes_on_bitwise_alike(seen):
    """In the middle of epochs and between them.

    Plateau schedule, moving average, mixup, dropout, augmentation, batch norm of own rows.
    """
    for name in ("random-1-0", "random-2-0", "random-2-1"):
        assert seen[name]["resumed_alike"] == [True] * 2


def test_checkpoints_come_a_little_before_a_failure_would_cost_too_much(seen):
    # Epochs of 6, 6 and 6 steps, at most 4 lost, of which one is for the writing.
    assert seen["random-2-0"]["steps_of_checkpoints"] == [3, 6, 9, 12, 15, 18]


def test_a_run_stopped_at_any_step_goes_on_bitwise_alike(seen):
    for name in ("random-1-0", "random-2-0", "random-2-1"):
        stopped, step, saved_step, alike = seen[name]["stopped_alike"]
        assert stopped
        assert step == saved_step == 8
        assert alike


def test_a_graph_is_made_once_and_once_more_for_another_stage(seen):
    assert seen["random-2-0"]["traces"] == 1
    assert seen["uneven-2-0"]["traces"] == 1


def test_rows_are_weighed_as_scikit_learn_balances_classes(seen):
    from sklearn.utils.class_weight import compute_class_weight

    y = np.arange(101) % 3 == 0
    expected = compute_class_weight("balanced", classes=np.array([False, True]), y=y)
    weights = seen["uneven-2-0"]["weights"]
    assert {label for label, _ in weights} == {0.0, 1.0}
    for label, weight in weights:
        assert weight == pytest.approx(expected[int(label)])


def test_a_backbone_of_keras_applications_is_frozen_and_thawed(seen):
    for epoch in (0, 1):
        first, second = (arrays(seen, "application", epoch, 2, rank) for rank in (0, 1))
        assert any("normalization" in name for name in first)
        for name, value in first.items():
            assert value.tobytes() == second[name].tobytes(), name
    frozen, thawed = (arrays(seen, "application", epoch, 2, 0) for epoch in (0, 1))
    moved = {name for name in frozen if frozen[name].tobytes() != thawed[name].tobytes()}
    stem = {name for name in frozen if "stem" in name and "normalization" not in name}
    assert stem
    assert stem <= moved
    # Batch norms of the frozen epoch kept their statistics: those that they are made with.
    means = [name for name in frozen if "stem" in name and "moving_mean" in name]
    assert all(not frozen[name].any() for name in means)


def test_pixels_become_a_tensor_without_a_copy_and_other_arrays_with_one():
    from ray_jobs.rows import aligned
    from ray_jobs.tensors import as_tensor

    pixels = aligned((2, 5, 5, 3))
    pixels[:] = np.arange(150).reshape(pixels.shape)
    shifted = np.zeros(151, np.uint8)[1:]
    shared, copied = as_tensor(pixels), as_tensor(shifted)
    np.testing.assert_array_equal(shared, pixels)
    pixels[0, 0, 0, 0] = shifted[0] = 200
    assert (int(shared[0, 0, 0, 0]), int(copied[0])) == (200, 0)
    pixels.flags.writeable = False
    np.testing.assert_array_equal(as_tensor(pixels), pixels)
