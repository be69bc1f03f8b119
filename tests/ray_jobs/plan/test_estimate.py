from dataclasses import replace

import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.plan.estimate import Estimator, ring_s
from tests.ray_jobs.plan.samples import COSTS, GIB, LAYER, MACHINE, manifest, plan, spec


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
    (stage,) = plan(spec(), costs=replace(COSTS, layers=(layer,))).stages
    assert stage.compute_s == pytest.approx(3 * forward_s + update_s)
    frozen = replace(COSTS, layers=(replace(layer, learns=False),))
    (stage,) = plan(spec(), costs=frozen).stages
    assert stage.compute_s == pytest.approx(forward_s + update_s)


def test_a_precision_is_as_fast_as_the_table_says_or_as_float32_if_it_is_missing():
    costs = replace(COSTS, layers=(replace(LAYER, flops=1e12),), num_variables=0, num_slots=0)
    seconds = [
        plan(spec(train__precision=p), costs=costs).stages[0].compute_s
        for p in ("float32", "mixed_bfloat16", "mixed_float16")
    ]
    assert seconds[0] == pytest.approx(2 * seconds[1], rel=1e-3)
    assert seconds[0] == seconds[2]


def test_memory_is_the_sum_of_its_parts():
    run = spec(train__num_workers=2, train__global_batch_size=8, data__prefetch_batches=1)
    (stage,) = plan(run).stages
    memory = stage.memory
    assert memory.weights == 4e6
    assert memory.gradients == 4e6 + 4e6  # the packed copy that is exchanged
    assert memory.optimizer == 8e6
    assert memory.activations == 4 * (0.25 + 2 * 0.25) * GIB
    assert memory.batches == 4 * 3000 * 3
    assert memory.total == pytest.approx(16e6 + 8e6 - 4e6 + 3 * GIB + 36000 + GIB)
    assert memory.capacity == 10 * GIB
    assert memory.fits


def test_on_cores_the_graph_takes_memory_as_well():
    cpu = MACHINE.model_copy(update={"gpus": 0, "layer_mib": 3})
    run = spec(train__use_gpu=False)
    (stage,) = plan(run, machine=cpu).stages
    assert stage.memory.reserved == GIB + 3 * 2**20
    (frozen,) = plan(
        run, machine=cpu, costs=replace(COSTS, layers=(replace(LAYER, learns=False),))
    ).stages
    assert frozen.memory.reserved == GIB + 2**20


def test_accumulated_parts_need_less_memory_and_a_second_gradient():
    run = spec(train__global_batch_size=8)
    (whole,), (parts,) = (plan(run.overlay({"train.accumulate_steps": n})).stages for n in (1, 4))
    assert parts.memory.activations == whole.memory.activations / 4
    assert parts.memory.gradients == 2 * whole.memory.gradients


def test_a_bfloat16_gradient_sends_half_the_bytes():
    run = spec(train__num_workers=4, train__global_batch_size=8)
    half = run.overlay({"train.all_reduce_dtype": "bfloat16"})
    (full_stage,), (half_stage,) = plan(run).stages, plan(half).stages
    assert full_stage.exchange_bytes == 2 * 3 / 4 * 4e6
    assert half_stage.exchange_bytes == 2 * 3 / 4 * 2e6


def test_one_machine_uses_its_own_link_and_several_use_the_network():
    (one,) = plan(spec(train__num_workers=2)).stages
    assert one.exchange_s == pytest.approx(ring_s(4e6, 2, 50, 10))
    (two,) = plan(spec(train__num_workers=4)).stages
    assert two.exchange_s == pytest.approx(ring_s(4e6, 4, 1, 10))


def test_synchronized_batch_norms_cost_messages():
    costs = replace(COSTS, sync_norms=5)
    (local,), (synced,) = (plan(spec(train__num_workers=2), costs=c).stages for c in (COSTS, costs))
    assert synced.exchange_s - local.exchange_s == pytest.approx(5 * 4 * 2 * 10e-6)


def test_scaling_efficiency_compares_runs_with_the_same_global_batch():
    (one,), (four,) = (plan(spec(train__num_workers=n)).stages for n in (1, 4))
    assert one.efficiency == pytest.approx(1)
    assert four.efficiency == pytest.approx(one.step_s / (4 * four.step_s))
    assert 0 < four.efficiency < 1


def test_wall_time_and_cost_follow_from_steps_machines_and_prices():
    run = spec(train__num_workers=4)
    found = plan(run)
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
    (stage,) = plan(spec(), costs=quick).stages
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


def test_cached_rows_are_decoded_in_the_first_epoch_only():
    quick = replace(COSTS, layers=(replace(LAYER, flops=1, moved_bytes=1),))
    (anew,) = plan(spec(), costs=quick).stages
    (cached,) = plan(spec(data__cache="auto", data__image_size=224), costs=quick).stages
    assert cached.feed_s < anew.feed_s / 10
    assert cached.seconds > 31 * anew.feed_s
    (raw,) = plan(spec(prepare__store="raw", prepare__image_size=224), costs=quick).stages
    assert raw.feed_s == pytest.approx(32 / 9020, rel=1e-3)


def test_low_efficiency_suggests_fewer_workers():
    slow = MACHINE.model_copy(update={"network_gbit_s": 0.01})
    (warning,) = plan(spec(train__num_workers=4), machine=slow).warnings
    assert warning.startswith("scaling efficiency is only 1%; increase train.global_batch_size")
    assert "fewer workers (1, 2)" in warning


def test_without_xla_a_warning_says_that_gpu_times_assume_it():
    (warning,) = plan(spec(train__jit_compile=False)).warnings
    assert warning.startswith("step times assume XLA (train.jit_compile=true)")
    cpu = MACHINE.model_copy(update={"gpus": 0})
    assert plan(spec(train__jit_compile=False, train__use_gpu=False), machine=cpu).warnings == ()


def test_cores_compute_feed_and_share_the_memory():
    cpu = MACHINE.model_copy(update={"gpus": 0})
    run = spec(train__use_gpu=False, train__cpus_per_worker=2)
    (stage,) = plan(run, machine=cpu).stages
    assert stage.step_s == pytest.approx(stage.compute_s + stage.feed_s)
    assert stage.memory.capacity == 10 * GIB / 4
    (one_core,) = plan(run.overlay({"train.cpus_per_worker": 1}), machine=cpu).stages
    assert one_core.compute_s == pytest.approx(2 * stage.compute_s, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train__gpus_per_worker": 4},
            "train.gpus_per_worker=4 exceeds the 2 GPUs of box; lower it",
        ),
        (
            {"train__cpus_per_worker": 9},
            "train.cpus_per_worker=9 exceeds the 8 CPUs of box; lower it",
        ),
        ({"train__global_batch_size": 1024}, "global_batch_size=1024 exceeds the 1000 rows"),
    ],
)
def test_an_impossible_run_is_refused(changes, message):
    with pytest.raises(JobError, match=message):
        plan(spec(**changes))
