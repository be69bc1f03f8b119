from dataclasses import replace

import pytest

from ray_jobs.plan.estimate import Estimator
from ray_jobs.plan.suggestions import suggestions
from tests.ray_jobs.plan.samples import COSTS, GIB, LAYER, MACHINE, manifest, spec


def estimator(run, kept_gib: float = 0.25, machine=MACHINE) -> Estimator:
    half = run.train.precision != "float32"
    layer = replace(LAYER, kept_bytes=kept_gib * GIB / (2 if half else 1))
    return Estimator("box", machine, [replace(COSTS, layers=(layer,))], manifest(run))


def test_every_remedy_is_true_and_what_is_one_less_would_not_do():
    run = spec(train__num_workers=2, train__global_batch_size=32)
    assert not estimator(run).plan(run).fits
    ways = suggestions(run, estimator(run), estimator)
    assert [way.changes for way in ways] == [
        {"train.accumulate_steps": 2},
        {"train.precision": "mixed_bfloat16"},
        {"train.global_batch_size": 22},
    ]
    for way in ways:
        changed = run.overlay(way.changes)
        assert estimator(changed).plan(changed).fits
        assert estimator(changed).plan(changed) == way.plan
    larger = run.overlay({"train.global_batch_size": 24})
    assert not estimator(larger).plan(larger).fits
    assert ways[0].text == "--train.accumulate_steps 2 (batch norms then see 8 of 16 rows at once)"


def test_where_one_change_is_not_enough_two_are_tried():
    run = spec(train__global_batch_size=1)

    def huge(of) -> Estimator:
        return estimator(of, kept_gib=4)

    (way,) = suggestions(run, huge(run), huge)
    assert way.changes == {"train.precision": "mixed_bfloat16"}
    two = run.overlay({"train.global_batch_size": 2})
    found = [way.changes for way in suggestions(two, huge(two), huge)]
    assert found == [{"train.precision": "mixed_bfloat16", "train.accumulate_steps": 2}]


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_where_not_even_one_row_fits_there_is_none(precision):
    run = spec(train__global_batch_size=4, train__precision=precision)

    def hopeless(of) -> Estimator:
        return estimator(of, kept_gib=10)

    assert suggestions(run, hopeless(run), hopeless) == []
