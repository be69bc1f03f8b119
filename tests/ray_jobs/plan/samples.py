"""Machines, models and data whose plans can be calculated by hand."""

from typing import Any

from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Manifest
from ray_jobs.plan.estimate import Estimator, Plan
from ray_jobs.plan.layer_costs import LayerCost, ModelCosts, planned_manifest
from ray_jobs.plan.plan_spec import MachineSpec

GIB = 2.0**30

MACHINE = MachineSpec(
    instance="box",
    gpus=2,
    cpus=8,
    memory_gib=10,
    reserved_gib=1,
    tflops={"float32": 10, "mixed_bfloat16": 20},
    bandwidth_gb_s=100,
    flops_efficiency=1,
    bandwidth_efficiency=1,
    layer_us=1,
    link_gb_s=50,
    network_gbit_s=8,
    latency_us=10,
    usd_per_hour={"on_demand": 6, "spot": 2},
)
LAYER = LayerCost(flops=30e9, moved_bytes=1e6, kept_bytes=0.25 * GIB, weight_bytes=0, learns=True)
COSTS = ModelCosts(
    epochs=3,
    layers=(LAYER,),
    num_weights=1_000_000,
    num_learning=1_000_000,
    num_variables=10,
    num_slots=2_000_000,
    input_bytes=3000,
    sync_norms=0,
)


def spec(**changes: Any) -> RunSpec:
    """Return a run on GPUs; settings by path, with `__` instead of dots."""
    base = {
        "model.image.weights": None,
        "train.use_gpu": True,
        "train.jit_compile": True,
        "train.epochs": 3,
        "data.cache": "none",
    }
    given = {name.replace("__", "."): value for name, value in changes.items()}
    return RunSpec().overlay({**base, **given})


def manifest(of: RunSpec | None = None, num_rows: int = 1000) -> Manifest:
    return planned_manifest(of or spec(), num_rows, 4)


def plan(of: RunSpec, machine: MachineSpec = MACHINE, costs: ModelCosts = COSTS) -> Plan:
    return Estimator(of, "box", machine, [costs], manifest(of)).plan()
