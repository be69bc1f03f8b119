from dataclasses import replace
from typing import Any

import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.plan.estimate import Estimator, StagePlan, ring_s
from tests.ray_jobs.plan.samples import COSTS, GIB, LAYER, MACHINE, manifest, plan, spec


def stage_of(of: RunSpec, **given: Any) -> StagePlan:
    (stage,) = plan(of, **given).stages
    return stage


def test_a_ring_all_reduce_sends_each_byte_almost_twice_over_the_slowest_link():
    # Patarasuk and Yuan: 2 (n - 1) / n × S / B, and as many messages.
    assert ring_s(100e6, 4, 10, 0) == pytest.approx(1.5 * 100e6 / 10e9)
    assert ring_s(0, 4, 10, 50) == pytest.approx(6 * 50e-6)
    assert ring_s(100e6, 1, 10, 50) == 0


@pytest.mark.parametrize(
    ("layer", "forward_s"),
    [
        (replace(LAYER, flops=1e12, moved_bytes=0), 32 * 1e12 / 10e12),
        (replace(LAYER, flops=0, moved_bytes=1e9, weight_bytes=5e9), (32 * 1e9 + 5e9) / 100e9),
        (replace(LAYER, flops=1, moved_bytes=1), 1e-6),
    ],
    ids=["compute-bound", "memory-bound", "bound by the overhead"],
)
def test_a_layer_takes_its_bound_once_forward_and_twice_backward(layer, forward_s):
    update_s = 8 * (2 * 1e6 + 2e6) / 100e9 + 10 * 1e-6
    for learns, forwards in ((True, 3), (False, 1)):
        costs = replace(COSTS, layers=(replace(layer, learns=learns),))
        seconds = stage_of(spec(), costs=costs).compute_s
        assert seconds == pytest.approx(forwards * forward_s + update_s)


def test_a_precision_is_as_fast_as_the_table_says_or_as_float32_if_it_is_missing():
    costs = replace(COSTS, layers=(replace(LAYER, flops=1e12),), num_variables=0, num_slots=0)
    full, bfloat16, float16 = (
        stage_of(spec(train__precision=precision), costs=costs).compute_s
        for precision in ("float32", "mixed_bfloat16", "mixed_float16")
    )
    assert full == float16 == pytest.approx(2 * bfloat16, rel=1e-3)


def test_memory_is_the_sum_of_its_parts():
    run = spec(train__num_workers=2, train__global_batch_size=8, data__prefetch_batches=1)
    memory = stage_of(run).memory
    assert memory.weights == 4e6
    assert memory.gradients == 4e6 + 4e6  # the packed copy that is exchanged
    assert memory.optimizer == 8e6
    assert memory.activations == 4 * (0.25 + 2 * 0.25) * GIB
    assert memory.batches == 4 * 3000 * 3
    assert memory.total == pytest.approx(16e6 + 8e6 - 4e6 + 3 * GIB + 36000 + GIB)
    assert memory.capacity == 10 * GIB
    assert memory.fits
    # Accumulated parts need less memory and a second gradient.
    run = spec(train__global_batch_size=8)
    whole = stage_of(run).memory
    parts = stage_of(run.overlay({"train.accumulate_steps": 4})).memory
    assert parts.activations == whole.activations / 4
    assert parts.gradients == 2 * whole.gradients


def test_cores_compute_feed_and_share_the_memory_which_holds_the_graph_as_well():
    cpu = MACHINE.model_copy(update={"gpus": 0, "layer_mib": 3})
    run = spec(train__use_gpu=False, train__cpus_per_worker=2)
    stage = stage_of(run, machine=cpu)
    assert stage.step_s == pytest.approx(stage.compute_s + stage.feed_s)
    assert stage.memory.capacity == 10 * GIB / 4
    assert stage.memory.reserved == GIB + 3 * 2**20
    one_core = stage_of(run.overlay({"train.cpus_per_worker": 1}), machine=cpu)
    assert one_core.compute_s == pytest.approx(2 * stage.compute_s, rel=1e-3)
    frozen = replace(COSTS, layers=(replace(LAYER, learns=False),))
    assert stage_of(run, machine=cpu, costs=frozen).memory.reserved == GIB + 2**20


def test_workers_exchange_gradients_over_the_link_of_a_machine_or_the_network():
    two, four = (spec(train__num_workers=n) for n in (2, 4))
    assert stage_of(two).exchange_s == pytest.approx(ring_s(4e6, 2, 50, 10))
    assert stage_of(four).exchange_s == pytest.approx(ring_s(4e6, 4, 1, 10))
    assert stage_of(four).exchange_bytes == 2 * 3 / 4 * 4e6
    half = stage_of(four.overlay({"train.all_reduce_dtype": "bfloat16"}))
    assert half.exchange_bytes == 2 * 3 / 4 * 2e6
    # Synchronized batch norms cost messages.
    synced = stage_of(two, costs=replace(COSTS, sync_norms=5))
    assert synced.exchange_s - stage_of(two).exchange_s == pytest.approx(5 * 4 * 2 * 10e-6)


def test_scaling_efficiency_compares_runs_with_the_same_global_batch():
    one, four = (stage_of(spec(train__num_workers=n)) for n in (1, 4))
    assert one.efficiency == pytest.approx(1)
    assert four.efficiency == pytest.approx(one.step_s / (4 * four.step_s))
    assert 0 < four.efficiency < 1
    slow = MACHINE.model_copy(update={"network_gbit_s": 0.01})
    (warning,) = plan(spec(train__num_workers=4), machine=slow).warnings
    assert warning.startswith("scaling efficiency is only 1%; increase train.global_batch_size")
    assert "fewer workers (1, 2)" in warning


def test_wall_time_and_cost_follow_from_steps_machines_and_prices():
    found = plan(spec(train__num_workers=4))
    (stage,) = found.stages
    assert stage.steps == 3 * 1000 // 32
    assert found.num_machines == 2
    assert found.wall_s > 40 + stage.steps * stage.step_s
    assert found.usd == {
        "on_demand": pytest.approx(found.wall_s / 3600 * 2 * 6),
        "spot": pytest.approx(found.wall_s / 3600 * 2 * 2),
    }


def test_stages_divide_the_steps_and_the_largest_one_sets_the_memory():
    small = replace(COSTS, layers=(replace(LAYER, learns=False, kept_bytes=0),), epochs=1)
    run = spec(train__global_batch_size=64)
    found = Estimator(run, "box", MACHINE, [small, replace(COSTS, epochs=2)], manifest(run)).plan()
    assert sum(stage.steps for stage in found.stages) == 3 * 1000 // 64
    assert found.stages[0].memory.fits
    assert not found.fits
    assert found.peak_memory == found.stages[1].memory


def test_a_slow_feed_sets_the_step_time_and_raises_a_warning():
    quick = replace(COSTS, layers=(replace(LAYER, flops=1, moved_bytes=1),))
    stage = stage_of(spec(), costs=quick)
    # 32 JPEGs of 456 px: as many pixels as 65 of 320 px, of which a core decodes 2,149 a second.
    assert stage.feed_s == pytest.approx(32 * (456 / 320) ** 2 / 2149, rel=1e-3)
    assert stage.step_s == stage.feed_s
    (warning,) = plan(spec(), costs=quick).warnings
    assert warning.startswith("train.cpus_per_worker=1 is too low: until rows are cached, each")
    assert "cores; box has 4 per worker, so prepare images at the model's" in warning
    slower = replace(COSTS, layers=(replace(LAYER, flops=3e9),))
    (warning,) = plan(spec(), costs=slower).warnings
    assert warning.endswith("feed needs 1.0 cores; set it to 2")
    assert plan(spec(train__cpus_per_worker=2), costs=slower).warnings == ()
    # Cached rows are decoded in the first epoch only.
    cached = stage_of(spec(data__cache="auto", data__image_size=224), costs=quick)
    assert cached.feed_s < stage.feed_s / 10
    assert cached.seconds > 31 * stage.feed_s
    raw = stage_of(spec(prepare__store="raw", prepare__image_size=224), costs=quick)
    assert raw.feed_s == pytest.approx(32 / 9020, rel=1e-3)


def test_without_xla_a_warning_says_that_gpu_times_assume_it():
    (warning,) = plan(spec(train__jit_compile=False)).warnings
    assert warning.startswith("step times assume XLA (train.jit_compile=true)")
    cpu = MACHINE.model_copy(update={"gpus": 0})
    assert plan(spec(train__jit_compile=False, train__use_gpu=False), machine=cpu).warnings == ()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("gpus_per_worker=4", "train.gpus_per_worker=4 exceeds the 2 GPUs of box; lower it"),
        ("cpus_per_worker=9", "train.cpus_per_worker=9 exceeds the 8 CPUs of box; lower it"),
        ("global_batch_size=1024", "global_batch_size=1024 exceeds the 1000 rows"),
    ],
)
def test_an_impossible_run_is_refused(setting, message):
    name, _, value = setting.partition("=")
    with pytest.raises(JobError, match=message):
        plan(spec(**{f"train__{name}": int(value)}))
