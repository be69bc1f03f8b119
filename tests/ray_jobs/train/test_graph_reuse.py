import numpy as np
import pytest

from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint import Checkpoint
from ray_jobs.train.graph_reuse import TUNABLE_SETTINGS
from tests.ray_jobs.tune.searches import prepare_in, spec_in

FIRST = {
    "train.learning_rate": 1e-3, "train.weight_decay": 0.01, "model.dropout": 0.4, "model.l2": 3e-3,
    "model.numeric.category_dropout": 0.1, "model.fusion.modality_dropout": 0.2,
    "model.fusion.auxiliary_weight": 0.5,
}  # fmt: skip
THEN = {path: value / 2 for path, value in FIRST.items()}


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> RunSpec:
    folder = tmp_path_factory.mktemp("graph-reuse")
    prepare_in(folder)
    # A smooth activation, since ReLU amplifies rounding errors.
    return spec_in(folder, train__optimizer="adamw", model__activation="silu")


def loop_of(spec: RunSpec, tunable: bool):
    from ray_jobs.cluster.strategy import WorkerContext
    from ray_jobs.train.loop import Loop

    manifest = read_manifest(Folder(spec.data.prepared))
    return Loop(spec, manifest, WorkerContext(), tunable=tunable)


def trained(loop) -> Checkpoint:
    return loop.snapshots.take(loop.run(), {}, {})


def difference(one: Checkpoint, other: Checkpoint) -> float:
    """The largest difference of two models' weights, relative to the largest weight of a tensor."""
    arrays = zip(one.model.values(), other.model.values(), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)) for a, b in arrays)


@pytest.mark.parametrize(
    "schedule",
    ["cosine", *(pytest.param(name, marks=pytest.mark.slow) for name in ("constant", "plateau"))],
)
def test_a_reused_graph_trains_like_a_new_one(spec, schedule):
    spec = spec.overlay({"train.schedule": schedule})
    assert set(FIRST) == set(TUNABLE_SETTINGS)
    loop = loop_of(spec.overlay(FIRST), tunable=True)
    first = trained(loop)
    traces = loop.train_step.call.experimental_get_tracing_count()
    # Names and paths do not affect the graph.
    assert loop.reuse_for(
        spec.overlay({**THEN, "run.name": "other", "run.storage_path": "/elsewhere"})
    )
    then = trained(loop)
    assert loop.train_step.call.experimental_get_tracing_count() == traces == 1
    expected = trained(loop_of(spec.overlay(THEN), tunable=False))
    assert then.state.history[-1]["val/log_loss"] == pytest.approx(
        expected.state.history[-1]["val/log_loss"], rel=1e-5
    )
    assert difference(then, expected) < 1e-4
    # Each setting has an effect, so the comparison is meaningful.
    assert difference(then, first) > 0.01
    # These rows have no categories to drop.
    for path in set(TUNABLE_SETTINGS) - {"model.numeric.category_dropout"}:
        assert loop.reuse_for(spec.overlay({**FIRST, path: THEN[path]}))
        assert difference(trained(loop), first) > 1e-5, path
    assert loop.reuse_for(spec.overlay(FIRST))
    assert difference(trained(loop), first) == 0


def test_a_loop_is_not_reused_for_another_graph(spec):
    loop = loop_of(spec.overlay({**FIRST, "model.l2": 0}), tunable=True)
    for path, value in {
        "model.fusion.units": 16, "train.optimizer": "sgd", "train.epochs": 5, "run.seed": 1,
        "model.l2": 1e-3, "data.image_size": 8, "train.label_smoothing": 0.1,
    }.items():  # fmt: skip
        assert not loop.reuse_for(spec.overlay({**FIRST, "model.l2": 0, path: value})), path
    # Without dropout, a layer and its random state are missing.
    assert not loop.reuse_for(spec.overlay({**FIRST, "model.l2": 0, "model.dropout": 0}))
    assert not loop_of(spec, tunable=False).reuse_for(spec)


def test_a_checkpoint_of_another_trial_does_not_change_the_learning_rate(spec):
    rates = [
        spec.overlay({"train.schedule": "constant", "train.learning_rate": r}) for r in (3e-3, 1e-4)
    ]
    loop = loop_of(rates[0], tunable=True)
    epochs = loop.epochs()
    checkpoint = loop.snapshots.take(next(epochs), {}, {})
    epochs.close()
    assert loop.reuse_for(rates[1])
    state = next(loop.epochs(checkpoint=checkpoint))
    assert state.history[-1]["train/learning_rate"] == pytest.approx(1e-4)
