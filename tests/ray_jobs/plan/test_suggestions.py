from dataclasses import replace

from ray_jobs.plan.estimate import Estimator
from ray_jobs.plan.suggestions import suggestions
from tests.ray_jobs.plan.samples import COSTS, GIB, LAYER, MACHINE, manifest, spec


def estimator(run, kept_gib: float = 0.25, machine=MACHINE) -> Estimator:
    half = run.train.precision != "float32"
    layer = replace(LAYER, kept_bytes=kept_gib * GIB / (2 if half else 1))
    return Estimator(run, "box", machine, [replace(COSTS, layers=(layer,))], manifest(run))


def test_every_suggestion_fits_and_the_next_larger_batch_does_not():
    run = spec(train__num_workers=2, train__global_batch_size=32)
    assert not estimator(run).plan().fits
    suggested = suggestions(estimator(run), estimator)
    assert [suggestion.changes for suggestion in suggested] == [
        {"train.accumulate_steps": 2},
        {"train.precision": "mixed_bfloat16"},
        {"train.global_batch_size": 22},
    ]
    for suggestion in suggested:
        changed = run.overlay(suggestion.changes)
        assert estimator(changed).plan().fits
        assert estimator(changed).plan() == suggestion.plan
    larger = run.overlay({"train.global_batch_size": 24})
    assert not estimator(larger).plan().fits
    text = "--train.accumulate_steps 2 (batch norms then see 8 of 16 rows at once)"
    assert suggested[0].text == text


def test_two_changes_are_combined_if_one_is_not_enough():
    run = spec(train__global_batch_size=1)

    def huge(of) -> Estimator:
        return estimator(of, kept_gib=4)

    (suggestion,) = suggestions(huge(run), huge)
    assert suggestion.changes == {"train.precision": "mixed_bfloat16"}
    two = run.overlay({"train.global_batch_size": 2})
    found = [suggestion.changes for suggestion in suggestions(huge(two), huge)]
    assert found == [{"train.precision": "mixed_bfloat16", "train.accumulate_steps": 2}]
