import numpy as np
import pytest

from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint import Checkpoint
from ray_jobs.train.graph_reuse import TUNABLE_SETTINGS, same_graph
from tests.ray_jobs.tune.searches import prepared_in, spec_in

FIRST = {
    "train.learning_rate": 1e-3, "train.weight_decay": 0.01, "model.dropout": 0.4, "model.l2": 3e-3,
    "model.numeric.category_dropout": 0.1, "model.fusion.modality_dropout": 0.2,
    "model.fusion.auxiliary_weight": 0.5,
}  # fmt: skip
THEN = {path: value / 2 for path, value in FIRST.items()}


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> RunSpec:
    folder = tmp_path_factory.mktemp("turning")
    prepared_in(folder)
    # Smooth, since ReLU's kink makes of rounding what cannot be told from another setting.
    return spec_in(folder, train__optimizer="adamw", model__activation="silu")


def loop_of(spec: RunSpec, tunable: bool):
    from ray_jobs.cluster.strategy import WorkerContext
    from ray_jobs.train.loop import Loop

    manifest = read_manifest(Folder(spec.data.prepared))
    return Loop(spec, manifest, WorkerContext(), tunable=tunable)


def trained(loop) -> Checkpoint:
    return loop.snapshots.take(loop.run().state, {}, {})


def far(one: Checkpoint, other: Checkpoint) -> float:
    """The largest difference of two models' weights, of their largest weight each."""
    arrays = zip(one.model.values(), other.model.values(), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)) for a, b in arrays)


@pytest.mark.parametrize(
    "schedule",
    ["cosine", *(pytest.param(name, marks=pytest.mark.slow) for name in ("constant", "plateau"))],
)
def test_a_turned_loop_trains_as_a_new_one_would(spec, schedule):
    spec = spec.overlay({"train.schedule": schedule})
    assert set(FIRST) == set(TUNABLE_SETTINGS)
    loop = loop_of(spec.overlay(FIRST), tunable=True)
    first = trained(loop)
    traces = loop.stepper.call.experimental_get_tracing_count()
    assert loop.becomes(spec.overlay(THEN))
    then = trained(loop)
    assert loop.stepper.call.experimental_get_tracing_count() == traces == 1
    expected = trained(loop_of(spec.overlay(THEN), tunable=False))
    assert then.state.history[-1]["val/log_loss"] == pytest.approx(
        expected.state.history[-1]["val/log_loss"], rel=1e-5
    )
    assert far(then, expected) < 1e-4
    # All that differs shows, or the comparison would say nothing.
    assert far(then, first) > 0.01
    assert loop.becomes(spec.overlay(FIRST))
    assert far(trained(loop), first) == 0


def test_each_dial_has_its_effect(spec):
    loop = loop_of(spec.overlay(FIRST), tunable=True)
    first = trained(loop)
    for path in TUNABLE_SETTINGS:
        assert loop.becomes(spec.overlay({**FIRST, path: THEN[path]}))
        # These rows have no words to hide.
        least = 1e-5 if path != "model.numeric.category_dropout" else -1
        assert far(trained(loop), first) > least, path


def test_a_loop_does_not_become_one_with_another_graph(spec):
    loop = loop_of(spec.overlay({**FIRST, "model.l2": 0}), tunable=True)
    for path, value in {
        "model.fusion.units": 16, "train.optimizer": "sgd", "train.epochs": 5, "run.seed": 1,
        "model.l2": 1e-3, "data.image_size": 8, "train.label_smoothing": 0.1,
    }.items():  # fmt: skip
        assert not loop.becomes(spec.overlay({**FIRST, "model.l2": 0, path: value})), path
    # Without it there is no layer, and a checkpoint holds no random state of one.
    assert not loop.becomes(spec.overlay({**FIRST, "model.l2": 0, "model.dropout": 0}))
    assert not loop_of(spec, tunable=False).becomes(spec)


def test_names_and_places_make_no_graph(spec):
    other = spec.overlay({"run.name": "other", "run.storage_path": "/elsewhere"})
    assert same_graph(spec, other, ())
    assert not same_graph(spec, spec.overlay({"train.learning_rate": 0.5}), ())
    assert same_graph(spec, spec.overlay({"train.learning_rate": 0.5}), ["train.learning_rate"])


def test_a_checkpoint_of_another_trial_does_not_bring_its_learning_rate(spec):
    spec = spec.overlay({"train.schedule": "constant"})
    donor = loop_of(spec.overlay({"train.learning_rate": 3e-3}), tunable=False)
    epochs = donor.epochs()
    saved = donor.snapshots.take(next(epochs).state, {}, {})
    epochs.close()
    clone = loop_of(spec.overlay({"train.learning_rate": 1e-4}), tunable=False)
    outcome = next(clone.epochs(saved=saved))
    assert outcome.state.history[-1]["train/learning_rate"] == pytest.approx(1e-4)
